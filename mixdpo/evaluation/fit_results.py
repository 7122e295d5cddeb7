"""What a fit ends with: a table, results.json, results.md, and the commands that come next."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.evaluation.bootstrap import Interval, one_way_bootstrap
from mixdpo.storage.files import read_text, write_json, write_text

HELD_OUT, ORDER = "heldout.csv", "order.csv"
"""Files of a run: a row for each held-out pair at the last validation; a row for each pair in the order of training."""

ORDER_COLUMNS = ("step", "pair_id", "row", "margin", "hard", "preference_share")

PAIRS = "easy pairs", "hard pairs"
"""Parts of the held-out pairs, as of held-out prompts."""

NEXT = """run folder: {0}
  python -m mixdpo report {0}        a page with the run's pictures; of several runs, a comparison
  python -m mixdpo chat {0}          talk to the policy
  python -m mixdpo export {0} OUT    an adapter or a plain model for other tools"""


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns (N,) of a CSV file of a run: pair ids as int64, others as floats, NaN where a cell is empty; none
    without the file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    rows = [row for row in rows if len(row) == len(head)]  # a kill may cut the last one
    kinds = {"pair_id": int}  # of 64 bits, which a float would round
    return {name: np.array([kinds.get(name, float)(row[i] or "nan") for row in rows]) for i, name in enumerate(head)}


def pair_rows(folder: Path, when: str) -> list[dict[str, Any]]:
    """A run's held-out pairs as rows of a study's scores. The score is 1 where the policy has the pair right, `before`
    where the longer response is the chosen one. There are no tokens."""
    pairs = read_columns(folder / HELD_OUT)
    scores = pairs["rewards/accuracy" if when == "after" else "length_accuracy"].tolist()
    rows = enumerate(zip(pairs["hard"].astype(int).tolist(), scores, strict=True), 1)
    return [{"prompt": n, "part": PAIRS[h], "score": s, "tokens": np.nan, "ended": np.nan} for n, (h, s) in rows]


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> Interval:
    """Σ w v / Σ w over pairs (N,), with its 95 % interval over resampled pairs."""
    if len(values) == 1:  # there is nothing to draw
        return Interval(float(values[0]), 0.0, 1.0)
    sums = values * weights
    return one_way_bootstrap(lambda rows, axis=-1: sums[rows].sum(axis) / weights[rows].sum(axis), len(values), 2_000)


def held_out_summary(pairs: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Lines of the table about held-out pairs: accuracy beside that of the longer response, log-probs, displacement."""
    lines, hard, weight = {}, pairs["hard"], pairs["weight"]
    for name, group in {"": hard >= 0, "easy ": hard == 0, "hard ": hard == 1}.items():
        if group.any():
            ours = weighted_mean(pairs["rewards/accuracy"][group], weight[group])
            longer = np.average(pairs["length_accuracy"][group], weights=weight[group])
            title = f"reward accuracy, {group.sum()} {name}held-out pairs (the longer response wins)"
            lines[title] = f"{ours:.3f} ({longer:.3f})"
    log_probs = [np.average(pairs[f"log_probs/{side}"], weights=weight) for side in ("chosen", "rejected")]
    lines["log-prob per token, chosen and rejected, nats"] = "{:.3f}, {:.3f}".format(*log_probs)
    if "displacement/chosen" in pairs:
        nats = np.average(pairs["displacement/chosen"], weights=weight)
        became = f": chosen responses became {'more' if nats > 0 else 'LESS'} likely than under the reference"
        lines["displacement of the chosen log-prob, nats"] = f"{nats:+.2f}{became if round(nats, 2) else ''}"
    return lines | {"optimizer steps of the policy on held-out pairs": f"{pairs['step'][0]:.0f}"}


def show_on(loggers: Sequence[Any], folder: Path, step: int) -> None:
    """Histograms of margins and rewards, the table, and sample responses, on TensorBoard and Weights & Biases."""
    names = {ORDER: ("margin",), HELD_OUT: ("rewards/chosen", "rewards/rejected", "rewards/margin")}
    found = {f"run/{name}": read_columns(folder / file).get(name) for file, of in names.items() for name in of}
    finite = {name: values[np.isfinite(values)] for name, values in found.items() if values is not None}
    histograms = {name: values for name, values in finite.items() if len(values)}
    responses = json.loads(read_text(path))[:8] if (path := folder / "responses.json").exists() else []
    samples = [[row["prompt"], row["before"]["text"], row["after"]["text"]] for row in responses]
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            from wandb import Histogram

            logger.experiment.log({name: Histogram(values) for name, values in histograms.items()})
            logger.log_table("run/responses", columns=["prompt", "before", "after"], data=samples)
        elif type(logger).__name__ == "TensorBoardLogger":
            for name, values in histograms.items():
                logger.experiment.add_histogram(name, values, step)
            texts = ["**prompt**: {}\n\n**before**: {}\n\n**after**: {}".format(*sample) for sample in samples]
            texts.insert(0, read_text(folder / "results.md"))
            logger.experiment.add_text("run/results", "\n\n---\n\n".join(texts), step)


def write_results(folder: Path, gold: Mapping[str, Any], metrics: Mapping[str, float], facts: Mapping[str, str]) -> str:
    """Write results.json and results.md to the run's folder, and return what the run prints as it ends.

    Args:
        gold: rows of GoldEvaluation's table; none without it.
        metrics: the last value of what callbacks can monitor; none where these are of another policy.
        facts: further lines: optimizer steps, speed, memory, the checkpoint that adapter/ holds.
    """
    from mixdpo.evaluation.gold import markdown  # imports torch, which studies and pages need not wait for

    pairs = read_columns(folder / HELD_OUT) if metrics else {}
    losses = {name: value for name, value in metrics.items() if name.startswith("val/loss")}
    summary = held_out_summary(pairs) if pairs else {f"held-out {n[4:]}, nats": f"{v:.4f}" for n, v in losses.items()}
    table = markdown(gold, summary := summary | dict(facts))
    content = {"heldout_prompts": gold, "summary": summary, "steps": int(facts["optimizer steps"])}
    write_json(folder / "results.json", content | {"metrics": dict(metrics)})
    write_text(folder / "results.md", table + "\n")
    lines = NEXT.format(folder) if (folder / "config.yaml").exists() else f"run folder: {folder}"
    return f"\n{table}\n\n{lines}"
