"""A study's plots as SVG files, from what its runs leave: metrics.csv, route.json, responses.json."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation.compare_runs import mean_score, seeds_done
from mixdpo.evaluation.study_design import Study
from mixdpo.pages.charts import Panel, line_chart
from mixdpo.storage.files import written_whole

SMOOTHED = 5  # steps

CURVES = ("train/preference_loss", "train/sft_loss", "rewards/margin")


def write_plots(plan: Study, done: Mapping[str, float]) -> str:
    """Write SVG files to the study's folder; returns a line that says which, or why none."""
    jobs = {run: names for run in plan.runs if (names := list(seeds_done(plan, run, done).values()))}
    if not jobs:
        return "no plots: nothing is done yet"
    folders = {run: Path(plan.folder, names[0]) for run, names in jobs.items()}  # of the first seed
    # a run on SFT samples has stages and no route
    paths = {run: path for run, folder in folders.items() if (path := folder / "route.json").exists()}
    routes = {run: json.loads(path.read_text("utf-8")) for run, path in paths.items()}
    charts = {"score_by_hard_fraction": _scores(plan, jobs, routes)} if routes else {}
    charts |= {"margins": panels} if (panels := _margins(routes)) else {}
    charts["curves"] = [_curve(key, folders) for key in CURVES]
    try:
        for name, panels in charts.items():
            with written_whole(Path(plan.folder, f"{name}.svg")) as partial:
                partial.write_text(line_chart(panels), "utf-8")
    except InputError as error:  # after hours of runs, whose table needs no plots
        return f"no plots: {error}; then the same command draws them"
    return f"plots: {plan.folder}/{{{','.join(charts)}}}.svg"


def _scores(plan: Study, jobs: Mapping[str, list[str]], routes: Mapping[str, Any]) -> list[Panel]:
    """Main outcome against the share of hard pairs: a point a seed, a line at the mean."""
    outcome, parts = next(iter(plan.outcomes.items()))
    panel = Panel("", "fraction of hard pairs (runs side by side)", f"gold score, {outcome}")
    for number, (run, route) in enumerate(routes.items()):
        x = route["hard_fraction"] + 0.006 * number  # side by side where they share a fraction
        scores = [mean_score(plan, name, parts) for name in jobs[run]]
        panel.lines.append(("", [x] * len(scores), scores, {"marker": "o", "color": f"C{number}", "linestyle": ""}))
        mean = {"color": f"C{number}", "linewidth": 3}
        panel.lines.append((run, [x - 0.003, x + 0.003], [float(np.mean(scores))] * 2, mean))
    return [panel]


def _margins(routes: Mapping[str, Any]) -> list[Panel]:
    """Cumulative margins of easy and hard pairs, a panel for each way of routing; runs that share it together."""
    groups: dict[str, list[str]] = {}
    for run, route in routes.items():
        if margins := route.get("margins_every_5%"):
            groups.setdefault(json.dumps(margins), []).append(run)
    panels = [Panel(", ".join(runs), "margin", "share with at most this margin") for runs in groups.values()]
    for panel, margins in zip(panels, map(json.loads, groups), strict=True):
        for kind, quantiles in margins.items():
            style = {"color": {"easy": "C0", "hard": "C1"}[kind], "drawstyle": "steps-post"}
            panel.lines.append((kind, quantiles, np.linspace(0, 1, len(quantiles)).tolist(), style))
    return panels


def _curve(key: str, folders: Mapping[str, Path]) -> Panel:
    """One metric, a line for each run (its first seed), a running mean over the steps that have it."""
    panel = Panel(key, "optimizer step", "")
    for number, (run, folder) in enumerate(folders.items()):
        with (folder / "metrics.csv").open(encoding="utf-8") as lines:
            rows = [(int(row["step"]), float(row[key])) for row in csv.DictReader(lines) if row.get(key)]
        rows = [(step, value) for step, value in rows if np.isfinite(value)]
        if width := min(SMOOTHED, len(rows)):
            means = np.convolve([value for _, value in rows], np.full(width, 1 / width), "valid")
            style = {"color": f"C{number}", "linewidth": 1, "marker": ".", "markersize": 2}
            panel.lines.append((run, [step for step, _ in rows[width - 1 :]], means.tolist(), style))
    return panel
