"""Does token cleaning find noise that was planted, and does it help? Every scorer, every round, every keep ratio.

    pip install -c constraints.txt matplotlib && python benchmarks/planted_noise.py [FOLDER]

The training responses hold planted noise (data.noise), the held-out ones do not. Two passes over slices 0 to 2 of 6
train the reference on every token; all scorers are measured on slice 3. Writes a JSON, two tables and one plot to
benchmarks/results: AUC, precision and recall of each scorer on the same slice and of each self-evolving round; held-out
loss against the keep ratio with the measured noise rate among the kept tokens. Runs are kept in FOLDER (default
runs/planted_noise): a stopped comparison goes on where it was.
"""

import math
import sys
from pathlib import Path
from typing import Any

from cleaning_runs import Job, about, held_out, run, run_all, stages, table, write

from mixdpo.errors import InputError

NOISE = ["--data.noise", "{rate: 0.2, seed: 0}", "--data.validation", "0.06"]
RATIOS = (0.3, 0.45, 0.6, 0.8, 1.0)
SCORERS = "mixdpo.token_cleaning.scorers"
OUT = Path("benchmarks/results/planted_noise.png")


def slices(only: str, passes: int = 1) -> list[str]:
    return ["--data.slices", f"{{count: 6, only: {only}, passes: {passes}}}"]


def cleaning(scorer: str, selection: str, reference: str) -> list[str]:
    text = f"{{scorer: {{class_path: {SCORERS}.{scorer}}}, selection: {selection}, reference: {reference}}}"
    return ["--model.cleaning", text]


def jobs(reference: str) -> list[Job]:
    """Runs on slice 3 for each keep ratio and scorer; and on slices 3 and 4, reference frozen and refreshed."""
    ratio = "{keep_ratio: 0.6, scope: %s}"
    excess = "ExcessLoss, init_args: {worse: policy, better: reference}"
    history = "ExcessLoss, init_args: {worse: reference, better: policy, normalise: true}"
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
    rest = [*NOISE, *slices("[3, 4]")]
    start = ["--model.adapter", reference, "--model.cleaning.warm_up_stages", "0"]
    all_jobs.append(("self_evolving", "self_evolving", [*rest, *given, *start]))
    # the same start and slices with the reference frozen: what refreshing it adds
    all_jobs.append(("frozen", "self_evolving", [*rest, *given, *start, "--trainer.callbacks", "[]"]))
    return all_jobs


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
    reference = run(folder, ("warm_up", "full", [*NOISE, *slices("[0, 1, 2]", passes=2)])) / "adapter"
    paths = run_all(folder, jobs(str(reference)))
    losses = {name: held_out(path) for name, path in paths.items()}
    found = {name: stages(path) for name, path in paths.items()}
    rows = [finding("Token Cleaning", found["keep-0.6"][0], losses["keep-0.6"]["loss"])]
    one_slice = [name for name in paths if name not in ("self_evolving", "frozen") and not name.startswith("keep")]
    rows += [finding(name, found[name][0], losses[name]["loss"]) for name in one_slice]
    for name in ("frozen", "self_evolving"):
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
    by_ratio = table(["keep ratio", "held-out loss", "η kept"], [list(point.values()) for point in points])
    content = {"about": about(), "keep_ratios": points, "held_out_loss": losses, "stages": found}
    write("planted_noise", content, table(headings, rows) + "\n\n" + by_ratio)


if __name__ == "__main__":
    main()
