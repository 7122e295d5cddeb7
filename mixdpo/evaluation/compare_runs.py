"""The table of a study: mean scores with intervals over prompts and seeds, and differences to a control."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import two_way_bootstrap
from mixdpo.evaluation.fit_results import PAIRS, pair_rows
from mixdpo.evaluation.study_design import Point, Study
from mixdpo.storage.files import Row, write_text, written_whole

START = "(before training)", "(the longer response wins)"
"""What runs of an outcome over prompts, and over held-out pairs, start from."""

COLUMNS = (
    *("outcome", "run", "chosen", "seeds", "prompts", "mean", "low", "high", "tokens", "ended", "control"),
    *("difference", "difference_low", "difference_high", "p", "verdict", "detectable"),
)

HEADING = "| {} | chosen | seeds × prompts | mean [95 %] | tokens | ended | against | difference | | detectable |"

MEAN = "| {run} | {chosen} | {seeds} × {prompts} | {mean:.3f} [{low:.3f}, {high:.3f}] | {tokens:.1f} | {ended:.3f} |"

GAIN = " {control} | {difference:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}] | {verdict} | {detectable:.3f} |"

NONE = " {control} | | | |"


def power(comparisons: int) -> float:
    """A difference of so many standard errors is found with power 80 % at a two-sided 5 % / comparisons: 1.96 + 0.84
    for one. A family is held to the level of Holm's first step."""
    return round(NormalDist().inv_cdf(1 - 0.025 / comparisons), 2) + 0.84


def detectable(plan: Study, prompts: int) -> str:
    """The smallest difference that the study can detect, in words, before the first run."""
    sd, seeds, family = plan.assumed_sd, len(plan.seeds), max(1, len(plan.holm))
    smallest = power(family) * (sd.prompts**2 / prompts + sd.seeds**2 / seeds) ** 0.5
    size = f"{smallest:.3f} with {prompts} prompts, {seeds} seeds"
    spread = f"the difference's standard deviation is {sd.prompts:g} over prompts, {sd.seeds:g} over seeds"
    limit = f"smallest detectable difference (power 80 %, two-sided {5 / family:.3g} %): {size}, if {spread}"
    return f"{limit}; a smaller difference is undecided, not absent"


def mean_score(plan: Study, name: str, parts: Sequence[str]) -> float:
    """Mean gold score of a job's responses to the prompts of these parts."""
    return float(_values(plan, name, parts)[0].mean())


def chosen_point(plan: Study, run: str, done: Set[str]) -> Point | None:
    """The grid point with the best score at the first seed. None while a point is missing: every run must
    choose among the same points."""
    points = {plan.name(run, point, plan.seeds[0]): point for point in plan.points}
    if len(points) == 1:
        return plan.points[0]
    if not points.keys() <= done:
        return None
    return points[max(points, key=lambda name: mean_score(plan, name, [str(plan.choose_by)]))]


def seeds_done(plan: Study, run: str, done: Set[str]) -> dict[int, str]:
    """Seed -> name of the job, for the jobs of a run that are done at its chosen point."""
    point = chosen_point(plan, run, done)
    names = {} if point is None else {seed: plan.name(run, point, seed) for seed in plan.seeds}
    return {seed: name for seed, name in names.items() if name in done}


def write_tables(plan: Study, done: Set[str]) -> str:
    """Write table.csv and table.md to the study's folder; returns the latter."""
    rows = {outcome: _decided(list(_rows(plan, done, outcome)), plan.holm) for outcome in plan.outcomes}
    with written_whole(Path(plan.folder, "table.csv")) as partial, partial.open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for of_outcome in rows.values() for row in of_outcome)
    lines = []
    for outcome, of_outcome in rows.items():
        table = [(MEAN + (GAIN if "difference" in row else NONE)).format(**row) for row in of_outcome]
        lines += [HEADING.format(outcome), "|---" * 10 + "|", *table, ""] if table else []
    for run in plan.runs:
        absent = [str(seed) for seed in plan.seeds if seed not in seeds_done(plan, run, done)]
        lines += [f"- missing: {run}, seeds {', '.join(absent)}"] if absent else []
    text = "\n".join(lines).replace(" nan ", "  ") + "\n"
    write_text(Path(plan.folder, "table.md"), text)
    return text


def _rows(plan: Study, done: Set[str], outcome: str) -> Iterator[Row]:
    """A row of each run with a finished seed, and one of the policy that the control started from."""
    parts = plan.outcomes[outcome]
    jobs = {run: seeds_done(plan, run, done) for run in plan.runs}
    tables = {run: {seed: _values(plan, name, parts) for seed, name in names.items()} for run, names in jobs.items()}
    tables[START[parts[0] in PAIRS]] = {s: _values(plan, n, parts, "before") for s, n in jobs[plan.control].items()}
    for run, by_seed in tables.items():
        if not by_seed or not next(iter(by_seed.values())).size:  # not done, or no pair is hard
            continue
        scores, tokens, ended = np.stack(list(by_seed.values()), 1)  # (S, N) each
        point = chosen_point(plan, run, done) if run in plan.runs else {}
        control = plan.control_of(run) if run in plan.runs else plan.control
        chosen = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in point.items())
        row = {"outcome": outcome, "run": run, "chosen": chosen, "seeds": len(by_seed), "prompts": scores.shape[1]}
        mean = two_way_bootstrap(scores)
        row |= {"mean": mean.mean, "low": mean.low, "high": mean.high, "tokens": tokens.mean(), "ended": ended.mean()}
        yield row | _difference(by_seed, tables[control], "" if run == control else control)


def _decided(rows: list[Row], family: Sequence[str]) -> list[Row]:
    """The rows, with the family decided together: the k-th smallest p becomes max over j ≤ k of
    min(1, (family − j + 1) p_j) (Holm 1979). A run that is not done yet counts, as the largest p."""
    found = sorted((row for row in rows if row["run"] in family and "p" in row), key=lambda row: row["p"])
    adjusted = np.maximum.accumulate([(len(family) - k) * row["p"] for k, row in enumerate(found)])
    for row, p in zip(found, np.minimum(1, adjusted).tolist(), strict=True):
        row["detectable"] *= power(len(family)) / power(1)
        row.update(p=p, verdict=f"{'decided' if p <= 0.05 else 'undecided'}, Holm p {p:.4f}")
    return rows


def _difference(ours: Mapping[int, Any], theirs: Mapping[int, Any], control: str) -> Row:
    """The difference to the control, seed by seed and prompt by prompt; none where `control` is empty."""
    both = [seed for seed in ours if seed in theirs]
    if not (control and both):
        return {"control": control}
    if len(both) < len(ours):  # the row's other numbers are of all its seeds
        control += f" (seeds {', '.join(map(str, both))})"
    gain = two_way_bootstrap(np.stack([ours[seed][0] - theirs[seed][0] for seed in both]))
    row = {"control": control, "difference": gain.mean, "difference_low": gain.low, "difference_high": gain.high}
    verdict = "decided" if gain.low > 0 or gain.high < 0 else "undecided"
    return row | {"p": gain.p(), "verdict": verdict, "detectable": power(1) * (gain.high - gain.low) / (2 * 1.96)}


def _values(plan: Study, name: str, parts: Sequence[str], when: str = "after") -> np.ndarray:
    """(3, N): gold score, length in tokens, and 1 if ended by itself, of a job's responses to these parts.

    Raises:
        InputError: the job's prompts are not the study's, or its responses have no scores.
    """
    path = Path(plan.folder, name, "responses.json")
    rows = pair_rows(path.parent) if parts[0] in PAIRS else json.loads(path.read_text("utf-8"))
    if parts[0] not in PAIRS and [r["prompt"] for r in rows] != [r["prompt"] for r in read_prompts(plan.prompts)]:
        raise InputError(f"{path} holds other prompts than {plan.prompts}: give the runs' GoldEvaluation that file")
    rows = [row[when] for row in rows if row.get("part", "all") in parts]
    if any(row["score"] is None for row in rows):
        raise InputError(f"{path} holds responses without a score: give the runs' GoldEvaluation a scorer")
    return np.array([[row[key] for row in rows] for key in ("score", "tokens", "ended")], dtype=float)
