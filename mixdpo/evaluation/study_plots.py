"""A study's plots, from what its runs leave: metrics.csv, route.json, responses.json."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.evaluation.compare_runs import mean_score, seeds_done
from mixdpo.evaluation.study_design import Study
from mixdpo.storage.files import written_whole

SMOOTHED = 5  # steps


CURVES = {
    "curves": ("train/preference_loss", "train/sft_loss", "rewards/margin"),
    "gradient_norms": ("gradient_norm/preference", "gradient_norm/sft"),
}


def write_plots(plan: Study, done: Mapping[str, float]) -> str:
    """Write PNG files to the study's folder; returns a line that says which, or why none."""
    jobs = {run: list(seeds_done(plan, run, done).values()) for run in plan.runs}
    if not (jobs := {run: names for run, names in jobs.items() if names}):
        return "no plots: nothing is done yet"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plots: they need matplotlib (pip install matplotlib); then the same command draws them"
    figures = {}
    if routes := {run: route for run, names in jobs.items() if (route := _route(plan, names[0]))}:
        figures["score_by_hard_fraction"] = _scores(Figure(), plan, jobs, routes)
        if rated := {run: route for run, route in routes.items() if route.get("margins_every_5%")}:
            figures["margins"] = _margins(Figure(), rated)
    figures |= {name: _curves(Figure(), plan, jobs, keys) for name, keys in CURVES.items()}
    for name, figure in figures.items():
        with written_whole(Path(plan.folder, f"{name}.png")) as partial:
            figure.savefig(partial, dpi=120, bbox_inches="tight")
    return f"plots: {plan.folder}/{{{','.join(figures)}}}.png"


def _scores(
    figure: Any, plan: Study, jobs: Mapping[str, Sequence[str]], routes: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Main outcome against the share of hard pairs: a point a seed, a line at the mean."""
    axes, (outcome, parts) = figure.subplots(), next(iter(plan.outcomes.items()))
    for number, (run, route) in enumerate(routes.items()):
        x = route["hard_fraction"] + 0.006 * number  # side by side where they share a fraction
        scores = [mean_score(plan, name, parts) for name in jobs[run]]
        axes.plot([x] * len(scores), scores, "o", color=f"C{number}", alpha=0.5)
        axes.plot([x - 0.003, x + 0.003], [np.mean(scores)] * 2, color=f"C{number}", label=run, linewidth=3)
    axes.set(xlabel="fraction of hard pairs (runs side by side)", ylabel=f"gold score, {outcome}")
    axes.legend(bbox_to_anchor=(1, 1), loc="upper left", fontsize="small")
    return figure


def _margins(figure: Any, routes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Cumulative margins of easy and hard pairs, a panel for each way of routing; runs that share it together."""
    groups: dict[str, list[str]] = {}
    for run, route in routes.items():
        groups.setdefault(json.dumps(route["margins_every_5%"]), []).append(run)
    figure.set_size_inches(4 * len(groups), 3)
    for axes, (margins, runs) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for kind, quantiles in json.loads(margins).items():
            style = {"label": kind, "color": {"easy": "C0", "hard": "C1"}[kind], "drawstyle": "steps-post"}
            axes.plot(quantiles, np.linspace(0, 1, len(quantiles)), **style)
        axes.set(xlabel="margin", ylabel="share with at most this margin")
        axes.set_title(", ".join(runs), fontsize="small", wrap=True)
        axes.legend()
    figure.tight_layout()
    return figure


def _curves(figure: Any, plan: Study, jobs: Mapping[str, Sequence[str]], keys: Sequence[str]) -> Any:
    """A panel for each metric, a line for each run (its first seed), a running mean over the steps that have it."""
    figure.set_size_inches(5 * len(keys), 3.5)
    lines = {}
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (run, names) in enumerate(jobs.items()):
            steps, values = _metric(Path(plan.folder, names[0], "metrics.csv"), key)
            if width := min(SMOOTHED, len(values)):
                means = np.convolve(values, np.full(width, 1 / width), "valid")
                (lines[run],) = axes.plot(
                    steps[width - 1 :], means, ".-", color=f"C{number}", linewidth=1, markersize=2
                )
        axes.set(xlabel="optimizer step", title=key)
    axes.legend(lines.values(), lines, bbox_to_anchor=(1, 1), loc="upper left", fontsize="small")
    return figure


def _metric(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that have a value of the metric, and the values."""
    with path.open(encoding="utf-8") as lines:
        found = [(int(row["step"]), float(row[key])) for row in csv.DictReader(lines) if row.get(key)]
    steps, values = np.array(found).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _route(plan: Study, name: str) -> dict[str, Any] | None:
    """None of a run on SFT samples, which has stages and no route."""
    path = Path(plan.folder, name, "route.json")
    return json.loads(path.read_text("utf-8")) if path.exists() else None
