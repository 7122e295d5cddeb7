"""Can a reference be repaired that was trained on data as noisy as the pool it scores? Three repairs, one seed each.

    python benchmarks/planted_noise_repairs.py [FOLDER]

Noise, slices, keep ratio and options are those of planted_noise.py, whose runs in the same FOLDER (default
runs/planted_noise) are used where they are there. All references are trained for two passes on noisy samples, and score
slice 3; each row of the table then trains a fresh adapter on the 60 % of slice 3 that its scores keep.

a. The third of the samples of slices 0 to 2 with the lowest base loss trains the reference. Control: slice 1 does.
b. Cross-fitting: two references on two halves of slice 3, each scores the other half. Control: each scores its own.
   Beside them: one reference of all of slice 3, which scores what it was trained on. (That of slices 0 to 2 did not.)
c. The scores of the reference of slices 0 to 2, both tails cut: by |score − median|, or an equal share at either end.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cleaning_runs import Job, held_out, run_all, write
from measuring import about, table
from noise import NoisySFTDataModule, PlantedNoise, detection, kind_of, labelled, planted_tokens
from planted_noise import NOISE, PLANTED, by_kind, cleaning, jobs, slices

from mixdpo.batches.steps import Slices, plan_stages
from mixdpo.batches.token_pool import TokenPool
from mixdpo.storage.files import write_json
from mixdpo.storage.identity import content_hash
from mixdpo.token_cleaning.run_tokens import RunTokens, read_cleaning
from mixdpo.token_cleaning.selection import Selection, select

KEEP = Selection(keep_ratio=0.6)
UNREPAIRED = "keep-0.6"
CHOSEN = ["--data", "planted_noise_repairs.ChosenSamplesDataModule", *NOISE[2:]]
NOT_VALIDATED = ["--trainer.limit_val_batches", "0"]
SCORED_ONLY = ["--trainer.max_steps", "1", *NOT_VALIDATED]
EARLIER = Path("benchmarks/results/planted_noise.json")
FOUND = ("precision", "recall", "kept_noise_rate")
HEADINGS = ["scores of slice 3 by", "η of its data", "AUC", *PLANTED.kinds, "precision", "recall", "η kept", "loss"]


class ChosenSamplesDataModule(NoisySFTDataModule):
    def __init__(self, source: str, chosen: str, noise: PlantedNoise = PLANTED, **options: Any) -> None:
        """`NoisySFTDataModule` with a few of its training samples. The noise is planted first, so it is the same.

        Args:
            source: As for SFTDataModule.
            chosen: JSON file with the list of their `sample_id`s.
            noise: How much, of which kinds, and the seed.
        """
        super().__init__(source, noise, **options)
        self.chosen = chosen

    def _pool_of(self, samples: Any, name: str) -> TokenPool:
        pool = super()._pool_of(samples, name)
        if name != "train":
            return pool
        rows = np.flatnonzero(np.isin(pool.samples["sample_id"], json.loads(Path(self.chosen).read_text())))
        few = TokenPool.of(pool.samples.select(rows), pool.identity)  # whose `ids` differ
        self.counts[name] |= {"samples": len(rows), "response tokens": len(few)}
        return few


def lowest_third(tokens: RunTokens) -> np.ndarray:
    """Indices of the third of the pool's samples with the lowest mean score per response token."""
    means = [tokens.scores[tokens.pool.of_sample(i)].mean() for i in range(len(tokens.pool.samples))]
    return np.sort(np.argsort(means, kind="stable")[: len(means) // 3])


def either_by(is_own: bool, first: np.ndarray, one: RunTokens, other: RunTokens) -> RunTokens:
    """Samples in `first` scored by the reference of `one`, others by that of `other`, if each is to score its own."""
    samples = one.samples_with(one.scores)
    is_first = np.isin(np.repeat(samples, np.diff(one.pool.offsets)[samples]), first)
    places = one.pool.tokens(samples)
    return rescored(one, np.where(is_first == is_own, one.scores[places], other.scores[places]))


def near_median(tokens: RunTokens) -> RunTokens:
    scores = tokens.scores[~np.isnan(tokens.scores)]
    return rescored(tokens, -np.abs(scores - np.median(scores)))


def both_ends_cut(tokens: RunTokens) -> RunTokens:
    scores = tokens.scores[~np.isnan(tokens.scores)]
    ranks = np.argsort(np.argsort(scores, kind="stable"))
    return rescored(tokens, -np.abs(ranks - (len(ranks) - 1) / 2))


def rescored(tokens: RunTokens, scores: np.ndarray) -> RunTokens:
    """The same samples with other scores, in the order of their tokens, and the tokens that these keep."""
    samples = tokens.samples_with(tokens.scores)
    new = replace(tokens, scores=np.full_like(tokens.scores, np.nan), weights=np.full_like(tokens.weights, np.nan))
    places = tokens.pool.tokens(samples)
    new.scores[places] = scores
    new.weights[places] = select(new.scores[places], tokens.pool.offsets_of(samples), KEEP)[0]
    return new


def on_chosen(name: str, config: str, folder: Path, ids: Iterable[int], options: list[str]) -> Job:
    """A run on all samples with these ids, as one slice."""
    file = folder / "chosen" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [int(each) for each in ids])
    return (name, config, [*CHOSEN, "--data.chosen", str(file), *NOT_VALIDATED, *options])


def on_masks(name: str, folder: Path, tokens: RunTokens) -> Job:
    """A run on the tokens of slice 3 that were kept."""
    masks = folder / "masks" / f"{name}-{content_hash([tokens.weights.tobytes()])}"  # other masks are another command
    masks.mkdir(parents=True, exist_ok=True)
    tokens.write(masks)
    options = ["--model.cleaning.masks", str(masks), "--model.cleaning.reference", "null"]
    return (name, "fixed", [*NOISE, *slices("[3]"), *options])


def row(name: str, noise: float | None, tokens: RunTokens, run: Path | None = None) -> list[Any]:
    found = detection(*labelled(tokens, tokens.samples_with(tokens.scores)))
    loss = held_out(run)["loss"] if run else None
    return [name, noise, found["auc"], *by_kind(tokens).values(), *(found[key] for key in FOUND), loss]


def earlier_rows() -> tuple[str, list[list[Any]]]:
    """The commit of planted_noise.json, and of its runs random tokens and all tokens."""
    there = json.loads(EARLIER.read_text())
    one, every = (there["stages"][name][0]["planted"] for name in ("random", "keep-1.0"))
    found = [one["auc"], *there["auc_by_kind"]["random"].values(), *(one[key] for key in FOUND)]
    unscored = [None] * (len(found) - 1)
    rows = [["random tokens", None, *found], ["all tokens", None, *unscored, every["kept_noise_rate"]]]
    losses = (there["held_out_loss"][name]["loss"] for name in ("random", "keep-1.0"))
    return there["about"]["commit"], [[*cells, loss] for cells, loss in zip(rows, losses, strict=True)]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/planted_noise")
    paths: dict[str, Path] = {}

    def go(*some: Job) -> None:
        paths.update(run_all(folder, list(some), at_once=1))

    def scored(*some: Job) -> list[RunTokens]:
        go(*some)
        return [read_cleaning(str(paths[name])) for name, *_ in some]

    def reference(name: str) -> str:
        return str(paths[name] / "adapter")

    def scoring(name: str, by: str, *options: str) -> Job:
        given = ["--model.cleaning.reference", reference(by), *options]
        return (name, "fixed", [*NOISE, *slices("[3]"), *given])

    go(("warm_up", "full", [*NOISE, *slices("[0, 1, 2]", passes=2)]))
    (unrepaired,) = scored(*(job for job in jobs(reference("warm_up"), "") if job[0] == UNREPAIRED))
    pool = unrepaired.pool
    ids, marks = np.array(pool.samples["sample_id"]), planted_tokens(pool)
    *seen, last = (s.samples for s in plan_stages(len(ids), Slices(6, only=[0, 1, 2, 3]), batch_size=8))
    base = cleaning("Loss, init_args: {role: base}", "{keep_ratio: 0.6, scope: global}", "null")
    (losses,) = scored(on_chosen("base_loss", "fixed", folder, ids[np.concatenate(seen)], [*base, *SCORED_ONLY[:2]]))
    data = {"low": lowest_third(losses), "third": seen[1], "own": last, "half-0": last[::2], "half-1": last[1::2]}
    twice = ["--data.slices.passes", "2"]
    go(*(on_chosen(f"reference-{name}", "full", folder, ids[few], twice) for name, few in data.items()))
    low, own = scored(*(scoring(name, f"reference-{name}") for name in ("low", "own")))
    others = ("third", "half-0", "half-1")
    third, *halves = scored(*(scoring(name, f"reference-{name}", *SCORED_ONLY) for name in others))
    crossed, own_half = (either_by(is_own, data["half-0"], *halves) for is_own in (False, True))
    middle = near_median(unrepaired)
    go(on_masks("crossed", folder, crossed), on_masks("middle", folder, middle))
    noise = {name: marks[pool.tokens(few)].mean() for name, few in data.items()}
    noise["all"], noise["halves"] = (marks[pool.tokens(np.concatenate(few))].mean() for few in (seen, [last]))
    kinds = Counter(kind_of(sample, PLANTED)[0] for sample in ids[data["low"]].tolist())
    commit, earlier = earlier_rows()
    rows = [
        row("slices 0 to 2, unrepaired", noise["all"], unrepaired, paths[UNREPAIRED]),
        row("(a) the third of them with the lowest base loss", noise["low"], low, paths["low"]),
        row("control: a third of them, slice 1", noise["third"], third),
        row("slice 3 itself", noise["own"], own, paths["own"]),
        row("(b) halves of slice 3, each scores the other", noise["halves"], crossed, paths["crossed"]),
        row("control: the same, each scores its own half", noise["halves"], own_half),
        row("(c) slices 0 to 2, cut by distance from the median", noise["all"], middle, paths["middle"]),
        row("(c) the same, a fifth cut at either end", noise["all"], both_ends_cut(unrepaired)),
        *earlier,
    ]
    done = {name: json.loads((path / "done.json").read_text()) for name, path in paths.items()}
    runs = {name: {key: facts[key] for key in ("seconds", "commit")} for name, facts in done.items()}
    content = {"about": about() | {"threads": 1}, "runs": runs, "last_two_rows": f"{EARLIER}, commit {commit}"}
    content |= {"headings": HEADINGS, "rows": rows, "kinds_of_low": kinds}
    write("planted_noise_repairs", content, table(HEADINGS, rows))


if __name__ == "__main__":
    main()
