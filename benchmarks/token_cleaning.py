"""Token cleaning against its published procedure: scoring, selection, storage. Writes a JSON and prints Markdown.

    python benchmarks/token_cleaning.py [--samples 96] [--parts a,b,c] [--sweep | --profile]

a, scoring: losses of base and reference (LoRA r 16 with random B) on SmolLM2-135M-Instruct in fp32, every run in a
process of its own. Seconds are for both models, each token counted once. Published: batches of 6 in file order, full
logits, loss computed twice, nested lists. Spared it are its second model load (one adapter is switched off and on) and
its padding of each row of losses to 2,048.
b, selection: 2.01M of 3.35M scores: k·M is whole, because theirs rounds down and ours to the nearest. Those between -1
and 1 are rounded to 1e-3, so that ties straddle the cut. Best of three, as for storage.
c, storage: 5M float32 scores written and read through a warm page cache. A flat file's offsets belong to the data.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Clock, about, in_fresh_process, table, timed
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import profile

from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import encode_rows
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.loading import load_base, load_tokenizer
from mixdpo.model.packaged import PACKAGED
from mixdpo.token_cleaning.scoring import add_losses, open_losses
from mixdpo.token_cleaning.selection import Selection, select

SEED = 0
ROWS, MAX_LENGTH, LONGEST_SHARE = 3000, 1024, 0.1
PUBLISHED_BATCH, RANK, B_STD, TOLERANCE = 6, 16, 0.01, 1e-3
SIDES = ["published", "ours"]
ROUNDS = [SIDES, SIDES[::-1]]
SWEEP = [1024, 2048, 4096]
KEEP, SELECTED, STORED, MADE_SAMPLES, REPEATS = 0.6, 3_350_000, 5_000_000, 50_000, 3
SPEED_GOALS, MEMORY_GOAL, SELECTION_GOAL = {"as they lie": 2.3, "longer-tailed": 3.0}, 0.5, 50
Samples = list[dict[str, Any]]


def length_regimes(source: str, count: int) -> dict[str, Samples]:
    """`count` samples in file order, and `count` of which a tenth are the longest of the first 3,000 rows."""
    rows = read_samples(source, limit=ROWS).dataset
    encoded = encode_rows(rows, load_tokenizer(PACKAGED), max_length=MAX_LENGTH, overlong="drop")[0]
    samples = encoded.select_columns(["input_ids", "spans"]).to_list()
    generator = np.random.default_rng(SEED)
    longest_first = np.argsort([-len(sample["input_ids"]) for sample in samples], kind="stable")
    tail, rest = np.split(longest_first, [round(LONGEST_SHARE * count)])
    chosen = generator.permutation([*tail, *generator.choice(rest, count - len(tail), replace=False)])
    return {"as they lie": samples[:count], "longer-tailed": [samples[i] for i in chosen]}


def responses(sample: dict[str, Any]) -> list[int]:
    """Positions of the response tokens."""
    spans = zip(sample["spans"][::2], sample["spans"][1::2], strict=True)
    return [position for start, end in spans for position in range(start, end)]


def published_losses(model: Any, samples: Samples) -> list[list[list[float]]]:
    """Base and reference -> sample -> position -> loss, 0 where the token is no response."""
    with torch.no_grad():
        with model.disable_adapter():
            base = published_pass(model, samples)
        return [base, published_pass(model, samples)]


def published_pass(model: Any, samples: Samples) -> list[list[float]]:
    losses = []
    for start in range(0, len(samples), PUBLISHED_BATCH):
        batch = padded(samples[start : start + PUBLISHED_BATCH])
        output = model(**batch, use_cache=False)
        logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
        found = cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
        for row, mask in zip(found.view(labels.shape).tolist(), batch["attention_mask"], strict=True):
            losses.append([0.0, *row[: int(mask.sum()) - 1]])
    return losses


def padded(samples: Samples) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    labels = [torch.full_like(one, -100) for one in ids]
    for label, one, sample in zip(labels, ids, samples, strict=True):
        label[responses(sample)] = one[responses(sample)]
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": labels}


def our_losses(model: Any, samples: Samples, **options: int) -> list[np.ndarray]:
    pool = TokenPool(samples, np.cumsum([0, *(len(responses(sample)) for sample in samples)]))
    losses = {"base": open_losses(pool), "policy": open_losses(pool)}
    for name, values in losses.items():
        add_losses(values, model, name, pool, range(len(samples)), **options)
    return [values for values, _ in losses.values()]


def two_roles() -> Any:
    """The model with its adapter `policy`, the same numbers in every process."""
    torch.manual_seed(SEED)
    model = add_adapters(load_base(PACKAGED, quantization="none", dtype="float32"), Lora(rank=RANK))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=B_STD)
    return model.eval()


def run_side(side: str, samples: Samples, **options: int) -> tuple[dict[str, float], np.ndarray]:
    """What one side costs, and its losses (2, M)."""
    model = two_roles()
    compute = partial({"published": published_losses, "ours": our_losses}[side], model, **options)
    compute(samples[:2])  # warm-up
    with Clock() as clock:
        losses = compute(samples)
    seconds, cpu_seconds, peak, resident = clock.costs.values()
    if side == "published":
        flat = [[row[p] for row, s in zip(rows, samples, strict=True) for p in responses(s)] for rows in losses]
        losses = [np.array(values) for values in flat]
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    speeds = {"response_tokens_per_second": len(losses[0]) / seconds, "tokens_per_second": tokens / seconds}
    memory = {"resident_mb": resident, "peak_mb": peak, "peak_above_resident_mb": peak - resident}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds} | speeds | memory, np.stack(losses)


def scoring(source: str, count: int) -> dict[str, Any]:
    return {name: compare_sides(name, samples) for name, samples in length_regimes(source, count).items()}


def compare_sides(regime: str, samples: Samples) -> dict[str, Any]:
    runs = [{side: in_fresh_process(run_side, side, samples) for side in order} for order in ROUNDS]
    losses = np.stack([values for run in runs for _, values in run.values()])
    difference = float(np.abs(losses - losses[0]).max())
    if not difference < TOLERANCE:
        raise SystemExit(f"the losses of the two sides differ by {difference}: there is nothing to compare")
    lengths = [len(sample["input_ids"]) for sample in samples]
    batches = [lengths[i : i + PUBLISHED_BATCH] for i in range(0, len(lengths), PUBLISHED_BATCH)]
    padding = 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    sizes = {"samples": len(samples), "tokens": sum(lengths), "response_tokens": losses.shape[-1]}
    sizes |= {"published_padding_share": padding, "largest_loss_difference": difference}
    sizes |= {"mean_distance_of_base_and_reference": float(np.abs(losses[0, 0] - losses[0, 1]).mean())}
    costs = {key: {side: [run[side][0][key] for run in runs] for side in SIDES} for key in runs[0]["ours"][0]}
    rows = [["largest loss difference", "", f"{difference:.1e}", "", "", f"< {TOLERANCE}"]]
    goals = {"tokens_per_second": SPEED_GOALS[regime], "peak_above_resident_mb": MEMORY_GOAL}
    for key, sides in costs.items():
        sides["ratios"] = [ours / published for published, ours in zip(*sides.values(), strict=True)]
        published, ours, ratio = map(statistics.median, sides.values())
        each = ", ".join(f"{value:.2f}" for value in sides["ratios"])
        goal = f"{goals[key]:g}" if key in goals else ""
        rows.append([key, f"{published:,.0f}", f"{ours:,.0f}", f"{ratio:.2f}", each, goal])
    title = f"{regime}: {len(samples)} samples, {padding:.0%} padding as published"
    print(table([title, "published", "ours", "ours / published", "each round", "goal"], rows))
    return sizes | {"costs": costs, "goals": goals}


def made_scores(count: int) -> tuple[np.ndarray, np.ndarray, list[list[float]]]:
    """(count,) float32 scores, (50,001,) offsets of samples with geometric lengths, and the scores as nested lists."""
    generator = np.random.default_rng(SEED)
    scores = generator.standard_normal(count, dtype=np.float32)
    scores = np.where(np.abs(scores) < 1, np.round(scores, 3), scores)
    cuts = np.sort(generator.choice(np.arange(1, count), MADE_SAMPLES - 1, replace=False))
    return scores, np.array([0, *cuts, count]), [piece.tolist() for piece in np.split(scores, cuts)]


def published_selection(nested: list[list[float]]) -> list[list[bool]]:
    tokens = [(score, i, j) for i, scores in enumerate(nested) for j, score in enumerate(scores)]
    mask = [[False] * len(scores) for scores in nested]
    for _, i, j in sorted(tokens, key=lambda token: token[0], reverse=True)[: int(KEEP * len(tokens))]:
        mask[i][j] = True
    return mask


def selection() -> dict[str, Any]:
    scores, offsets, nested = made_scores(SELECTED)
    published = [timed(partial(published_selection, nested)) for _ in range(REPEATS)]
    ours = [timed(partial(select, scores, offsets, Selection(KEEP))) for _ in range(REPEATS)]
    mask, threshold = ours[0][0]
    is_tie = scores == threshold
    assert 0 < np.count_nonzero(is_tie & mask) < np.count_nonzero(is_tie), "no ties straddle the cut"
    assert np.array_equal(np.concatenate(published[0][0]), mask), "the masks differ"
    seconds = {side: [run[1] for run in runs] for side, runs in zip(SIDES, (published, ours), strict=True)}
    best = [min(values) for values in seconds.values()]
    row = ["seconds", *(f"{value:.3f}" for value in best), f"{best[0] / best[1]:.0f}", SELECTION_GOAL]
    print(table(["selection of 3.35M scores", "published", "ours", "published / ours", "goal"], [row]))
    sizes = {"scores": SELECTED, "samples": MADE_SAMPLES, "ties_at_cut": np.count_nonzero(is_tie)}
    return sizes | {"seconds": seconds, "ratio": best[0] / best[1], "goal": SELECTION_GOAL}


def storage() -> dict[str, dict[str, float]]:
    scores, _, nested = made_scores(STORED)
    flat, pickled = partial(np.save, arr=scores), partial(torch.save, nested)
    ways: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "flat .npy": (flat, np.load),
        "flat .npy, memory-mapped, summed": (flat, lambda path: np.load(path, mmap_mode="r").sum()),
        "nested lists, torch.save (published)": (pickled, torch.load),
        "nested lists, torch.save, weights_only=False": (pickled, partial(torch.load, weights_only=False)),
        "nested lists, json": (lambda path: path.write_text(json.dumps(nested)), lambda p: json.loads(p.read_text())),
    }
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npy"
        for name, way in ways.items():
            store, load = (min(timed(partial(act, path))[1] for _ in range(REPEATS)) for act in way)
            costs[name] = {"store_seconds": store, "load_seconds": load, "megabytes": path.stat().st_size / 1e6}
    rows = ([name, *(f"{value:.3f}" for value in cost.values())] for name, cost in costs.items())
    print(table(["storage of 5M scores", "store, s", "load, s", "MB"], rows))
    return costs


def sweep(samples: Samples) -> None:
    keys = ["tokens_per_second", "seconds", "cpu_seconds", "peak_above_resident_mb"]
    costs = {size: in_fresh_process(run_side, "ours", samples, batch_tokens=size)[0] for size in SWEEP}
    rows = ([size, *(f"{cost[key]:.1f}" for key in keys)] for size, cost in costs.items())
    print(table(["batch_tokens", *keys], rows))


def print_profile(samples: Samples) -> None:
    model = two_roles()
    with profile() as profiler:
        our_losses(model, samples)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--source", default="data/sft.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/token_cleaning.json"))
    parser.add_argument("--parts", default="a,b,c")
    parser.add_argument("--sweep", action="store_true", help="only our scoring, at several batch_tokens")
    parser.add_argument("--profile", action="store_true", help="only our scoring, and where its time goes")
    options = parser.parse_args()
    if options.sweep or options.profile:
        for name, samples in length_regimes(options.source, options.samples).items():
            print(name)
            (sweep if options.sweep else print_profile)(samples)
        return
    parts = {"a": ("scoring", partial(scoring, options.source, options.samples))}
    parts |= {"b": ("selection", selection), "c": ("storage", storage)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts.split(","):  # each is kept as soon as it is measured, with what it was measured on
        name, measure = parts[part]
        report[name] = {"about": about(), "measured": measure()}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
