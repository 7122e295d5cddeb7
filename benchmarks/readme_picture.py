"""Makes the README's picture from committed rows.

    python benchmarks/readme_picture.py [--out docs/mixdpo.png]

Left: the 240 pairs of the second study (noisy_labels.py --study default_recipe, made again here), sorted by margin and
routed as there. Right: the scores of that study's runs with 95 % intervals (results/default_recipe_scores.csv).
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from noisy_labels import CHOSEN_SIGMA, DATA, PAIRS, SEEDS, lines_of, picked, rank
from tables import RESULTS, ROOT, read_scores, study_of

from mixdpo.evaluation import compare_runs
from mixdpo.evaluation.compare_runs import START
from mixdpo.routing import Routing
from mixdpo.storage.files import Row

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

STUDY = "default_recipe"
EASY, HARD = "#1f5fa8", "#c75b0a"
MIXDPO, OTHER, START_COLOR = "#6b21a8", "#404040", "#8a8a8a"
NAMES = {
    START[0]: "before training",
    "mixdpo_paper_cosine": "MixDPO (default: one cosine)",
    "mixdpo": "MixDPO, staged cosine",
    "mixdpo_sft_quarter": "MixDPO, staged, SFT weight ¼",
    "sft_then_dpo": "SFT on hard pairs, then DPO",
    "dpo_easy_only": "DPO on easy pairs only",
    "dpo": "DPO on all pairs",
    "sft_then_dpo_random": "SFT on random pairs, then DPO",
    "sft_then_dpo_cleaned": "SFT on cleaned tokens, then DPO",
}
"""Run of the study -> what the picture calls it. `mixdpo` of that study is today's control mixdpo_staged."""


def margins() -> np.ndarray:
    """Of the study's pairs, in points of the noisy judge."""
    rows = lines_of(ROOT / DATA / "constraints_pairs.jsonl")[:PAIRS]
    return np.array([row["margin"] for row in rank(rows, CHOSEN_SIGMA, picked(rows, SEEDS[STUDY]))])


def scores(path: Path) -> list[Row]:
    """Rows of the study's main outcome."""
    plan = study_of(STUDY)
    outcome, parts = next(iter(plan.outcomes.items()))
    (rows,) = compare_runs.tables(replace(plan, outcomes={outcome: parts}), read_scores(path)).values()
    return rows


def draw_route(axes: Axes, margins: np.ndarray, hard_fraction: float) -> None:
    route = Routing(hard_fraction=hard_fraction).plan(margins, np.arange(len(margins)))
    heights, is_hard = margins[route.order], route.is_hard[route.order]
    axes.bar(range(len(heights)), heights, width=1.0, color=np.where(is_hard, HARD, EASY))
    first, top = int(np.argmax(is_hard)), heights[0]
    axes.axvline(first - 0.5, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(first + 4, top, f"τ = {route.threshold:g}", va="top", fontsize=12)
    bold: dict[str, Any] = {"va": "top", "fontsize": 12, "fontweight": "bold"}
    axes.text(6, top * 0.3, "easy pairs →\npreference loss", color="white", **bold)
    axes.text(first + 4, top * 0.72, "hard pairs\n→ SFT on\nchosen\nresponse", color=HARD, **bold)
    axes.set(xlim=(-1, len(heights)), xticks=[], xlabel=f"{len(heights)} pairs, in the order of training →")
    axes.set_ylabel("margin: score of chosen − rejected")
    axes.set_title("What MixDPO does", loc="left", fontweight="bold")


def draw_scores(axes: Axes, rows: list[Row]) -> None:
    ranked = sorted(rows, key=lambda row: (row["run"] not in START, row["mean"]))
    for height, row in enumerate(ranked):
        color = START_COLOR if row["run"] in START else MIXDPO if row["run"].startswith("mixdpo") else OTHER
        axes.plot([row["low"], row["high"]], [height, height], color=color, linewidth=2.5, alpha=0.5)
        axes.plot(row["mean"], height, "o", color=color, markersize=8)
        axes.text(row["mean"], height + 0.2, f"{row['mean']:.3f}", ha="center", va="bottom", color=color, fontsize=10)
    decided = [" *" * (row.get("verdict", "").split(",")[0] == "decided") for row in ranked]
    axes.set_yticks(range(len(ranked)), [NAMES[row["run"]] + mark for row, mark in zip(ranked, decided, strict=True)])
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    axes.set_ylim(-0.5, len(ranked) - 0.25)
    seeds, prompts = max((row["seeds"], row["prompts"]) for row in rows)
    axes.set_xlabel(
        f"gold score, {prompts} held-out prompts × {seeds} seeds, 95 %\n* decidedly below the default", loc="right"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_title("What our second study found: 135M, noisy labels", loc="right", fontweight="bold")


def make(out: Path, results: Path = RESULTS) -> Path:
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 13}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.4), width_ratios=(1, 0.8), facecolor="white")
        draw_route(left, margins(), study_of(STUDY).options["data.routing.hard_fraction"])
        draw_scores(right, scores(results / f"{STUDY}_scores.csv"))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout(w_pad=1)
        figure.savefig(out, dpi=150)
        pyplot.close(figure)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/mixdpo.png")
    print(make(parser.parse_args().out))
