"""Does token cleaning find noise that was planted, and does it help? Every scorer, every round, every keep ratio.

    pip install -c constraints.txt matplotlib && python benchmarks/planted_noise.py [FOLDER]

The training responses hold planted noise (noise.py), the held-out ones do not. Two passes over slices 0 to 2 of 6
train the reference on every token, a second reference on the same slices without noise, as if they had been curated;
all scorers are measured on slice 3, with the first. Writes a JSON, tables and a plot to benchmarks/results: AUC,
precision and recall of each scorer and of each self-evolving round, by kind of noise as well; held-out loss against the
keep ratio with the measured noise rate among the kept tokens; of some, the gold score of the task `constraints`. Runs
are kept in FOLDER (default runs/planted_noise): a stopped comparison goes on where it was.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cleaning_runs import Job, gold_scores, held_out, run_all, write
from measuring import about, table
from noise import PlantedNoise, detection, kind_of, labelled, stages_with_noise

from mixdpo.errors import InputError
from mixdpo.token_cleaning.run_tokens import RunTokens, read_cleaning

SPLIT = ["--data.validation", "0.06"]
PLANTED = PlantedNoise(rate=0.2, seed=0)
NOISE = [
    "--data",
    "noise.NoisySFTDataModule",
    "--data.noise",
    f"{{rate: {PLANTED.rate}, seed: {PLANTED.seed}}}",
    *SPLIT,
]
GOLD = ("keep-1.0", "keep-0.6", "random", "self_evolving")
RATIOS = (0.3, 0.45, 0.6, 0.8, 1.0)
CLEAN = ", clean reference"
SCORERS = "mixdpo.token_cleaning.scorers"
OUT = Path("benchmarks/results/planted_noise.png")


def slices(only: str, passes: int = 1) -> list[str]:
    return ["--data.slices", f"{{count: 6, only: {only}, passes: {passes}}}"]


def cleaning(scorer: str, selection: str, reference: str) -> list[str]:
    text = f"{{scorer: {{class_path: {SCORERS}.{scorer}}}, selection: {selection}, reference: {reference}}}"
    return ["--model.cleaning", text]


def jobs(reference: str, clean: str) -> list[Job]:
    """Runs on slice 3 for each keep ratio and scorer; on slices 3 and 4 from either reference, frozen or refreshed."""
    ratio = "{keep_ratio: 0.6, scope: %s}"
    excess = "ExcessLoss, init_args: {worse: policy, better: cleaning_reference}"
    history = "ExcessLoss, init_args: {worse: cleaning_reference, better: policy, normalise: true}"
    by_scorer = {
        "Rho-1": cleaning(excess, ratio % "batch", reference),
        "ssToken (loss term)": cleaning(history, ratio % "sample", reference),
        "ProFit": cleaning("Probability", "{keep_ratio: null, threshold: 0.1}", "null"),
        "DFT": cleaning("Probability", "null", "null"),
        "high loss": cleaning("Loss", ratio % "batch", "null"),
        "random": cleaning("Random", ratio % "global", "null"),
    }
    one = [*NOISE, *slices("[3]")]
    given = ["--model.cleaning.reference", reference]
    all_jobs: list[Job] = [
        (f"keep-{k}", "fixed", [*one, *given, "--model.cleaning.selection.keep_ratio", str(k)]) for k in RATIOS
    ]
    all_jobs += [(name, "fixed", [*one, *options]) for name, options in by_scorer.items()]
    for which, adapter in (("", reference), (CLEAN, clean)):
        rest = [*NOISE, *slices("[3, 4]"), "--model.cleaning.warm_up_stages", "0"]
        rest += ["--model.adapter", adapter, "--model.cleaning.reference", adapter]
        all_jobs.append((f"self_evolving{which}", "self_evolving", rest))
        # the same start and slices with the reference frozen: what refreshing it adds
        all_jobs.append((f"frozen{which}", "self_evolving", [*rest, "--trainer.callbacks", "[]"]))
    return all_jobs


def by_kind(cleaning: RunTokens) -> dict[str, float]:
    """AUC on the samples of each kind of noise, over all that was scored."""
    ids, scored = cleaning.pool.samples["sample_id"][:], cleaning.samples_with(cleaning.scores)
    aucs = {}
    for kind in PLANTED.kinds:
        samples = np.array([i for i in scored if kind_of(ids[i], PLANTED)[0] == kind])
        aucs[kind] = detection(*labelled(cleaning, samples))["auc"]
    return aucs


def bound_term(kept_tokens: int, delta: float = 0.05) -> float:
    """√(2 log(4/δ) / M): what the paper's bound (arXiv 2502.01968), with probability 1 − δ, adds to the noise rate of
    the kept labels. It shrinks with the M kept tokens: .009 at 10⁵, so that cleaning is about the noise rate.

    Raises:
        InputError: no token is kept.
    """
    if kept_tokens < 1:
        raise InputError(f"the bound needs at least one kept token, not {kept_tokens}")
    return math.sqrt(2 * math.log(4 / delta) / kept_tokens)


def plot(points: list[dict[str, float]], full_tokens: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6.4, 4))
    ratios = [point["keep_ratio"] for point in points]
    left.plot(ratios, [point["loss"] for point in points], "o-", color="#1f5fa8")
    left.set_xlabel("keep ratio k")
    left.set_ylabel("held-out response loss, nats per token", color="#1f5fa8")
    right = left.twinx()
    right.plot(ratios, [point["noise"] for point in points], "s--", color="#d9761a")
    right.set_ylabel("planted noise among the kept tokens, η(k)", color="#d9761a")
    right.set_ylim(bottom=0)
    low, high = bound_term(full_tokens), bound_term(round(full_tokens * min(ratios)))
    left.set_title(f"√(2 log(4/δ)/M) is {low:.3f} at k = 1, {high:.3f} at k = {min(ratios)} (δ = .05)", fontsize=9)
    figure.tight_layout()
    figure.savefig(OUT, dpi=120)


def finding(name: str, stage: dict[str, Any], loss: float | None = None) -> list[Any]:
    planted = stage["planted"]
    found = [planted[key] for key in ("auc", "precision", "recall", "share", "kept_noise_rate")]
    return [name, *found, loss]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/planted_noise")
    options = slices("[0, 1, 2]", passes=2)
    warm_ups = [("warm_up", "full", [*NOISE, *options]), ("clean_warm_up", "full", [*SPLIT, *options])]
    paths = run_all(folder, jobs(*(str(path / "adapter") for path in run_all(folder, warm_ups).values())))
    losses = {name: held_out(path) for name, path in paths.items()}
    found = {name: stages_with_noise(path) for name, path in paths.items()}
    kinds = {name: by_kind(read_cleaning(str(path))) for name, path in paths.items()}
    gold = gold_scores({name: paths[name] for name in GOLD})
    rows = [finding("Token Cleaning", found["keep-0.6"][0], losses["keep-0.6"]["loss"])]
    of_slice_3 = [name for name in paths if len(found[name]) == 1 and not name.startswith("keep")]
    rows += [finding(name, found[name][0], losses[name]["loss"]) for name in of_slice_3]
    for name in (name for name in paths if len(found[name]) == 2):
        rows += [finding(f"{name}, slice {3 + i}", stage) for i, stage in enumerate(found[name])]
        rows[-1][-1] = losses[name]["loss"]
    points = [
        {
            "keep_ratio": k,
            "loss": losses[f"keep-{k}"]["loss"],
            "noise": found[f"keep-{k}"][0]["planted"]["kept_noise_rate"],
        }
        for k in RATIOS
    ]
    plot(points, found["keep-1.0"][0]["kept_tokens"])
    headings = ["scorer", "AUC", "precision", "recall", "η before", "η kept", "held-out loss"]
    tables = [table(headings, rows)]
    by_ratio = [[*point.values(), gold.get(f"keep-{point['keep_ratio']}")] for point in points]
    tables += [table(["keep ratio", "held-out loss", "η kept", "gold score"], by_ratio)]
    others = [[name, losses[name]["loss"], gold[name]] for name in GOLD if not name.startswith("keep")]
    tables += [table(["run", "held-out loss", "gold score"], others)]
    aucs = [[name, *values.values()] for name, values in kinds.items()]
    tables += [table(["AUC by kind of noise", *PLANTED.kinds], aucs)]
    content = {"about": about() | {"threads": 1}, "keep_ratios": points, "held_out_loss": losses, "gold": gold}
    write("planted_noise", content | {"auc_by_kind": kinds, "stages": found}, "\n".join(tables))


if __name__ == "__main__":
    main()
