"""The table of a study: mean scores with intervals over prompts and seeds, and differences to a control."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain, product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import FEWEST, two_way_bootstrap
from mixdpo.evaluation.fit_results import PAIRS, pair_rows
from mixdpo.evaluation.study_design import Point, Study
from mixdpo.storage.files import Row, write_csv, write_text

Job = tuple[str, str, str]
"""Run, grid point in words, seed."""

Scores = dict[Job, list[Row]]
"""Of each finished job, and of the policy before training, a row for each prompt."""

START = "(before training)", "(the longer response wins)"
"""What runs of an outcome over prompts, and over held-out pairs, start from."""

COLUMNS = (
    *("outcome", "run", "chosen", "seeds", "prompts", "mean", "low", "high", "tokens", "ended", "control"),
    *("difference", "difference_low", "difference_high", "p", "verdict", "detectable"),
)

SCORES = ("run", "point", "seed", "prompt", "part", "score", "tokens", "ended")

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


def values(rows: Sequence[Row], parts: Sequence[str]) -> np.ndarray:
    """(3, N): gold score, length in tokens, and 1 if ended by itself, of the responses to prompts of these parts."""
    return np.array([[float(row[key]) for row in rows if row["part"] in parts] for key in SCORES[-3:]])


def in_words(point: Point) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in point.items())


def chosen_point(plan: Study, run: str, scores: Scores) -> Point | None:
    """The grid point with the best score at the first seed. None while a point is missing: every run must
    choose among the same points."""
    points = {(run, in_words(point), str(plan.seeds[0])): point for point in plan.points}
    if len(points) == 1:
        return plan.points[0]
    if not points.keys() <= scores.keys():
        return None
    return points[max(points, key=lambda job: values(scores[job], [str(plan.choose_by)])[0].mean())]


def seeds_done(plan: Study, run: str, scores: Scores) -> dict[int, Job]:
    """Seed -> job, for the jobs of a run that are done at its chosen point."""
    point = chosen_point(plan, run, scores)
    jobs = {} if point is None else {seed: (run, in_words(point), str(seed)) for seed in plan.seeds}
    return {seed: job for seed, job in jobs.items() if job in scores}


def finished_scores(plan: Study, done: Set[str]) -> Scores:
    """Of the jobs that are done, from their folders. Seeds that start from the same rows share them, as `0 1 2`."""
    every = product(plan.runs, plan.points, plan.seeds)
    folders = {(run, in_words(p), str(seed)): Path(plan.folder, plan.name(run, p, seed)) for run, p, seed in every}
    scores = {job: job_rows(plan, folder) for job, folder in folders.items() if folder.name in done}
    starts = seeds_done(plan, plan.control, scores).items()
    before = {seed: job_rows(plan, folders[job], "before") for seed, job in starts}
    for rows in list(before.values()):
        seeds = " ".join(str(seed) for seed in before if before[seed] == rows)
        for name, of_pairs in zip(START, (False, True), strict=True):
            if mine := [row for row in rows if (row["part"] in PAIRS) == of_pairs]:
                scores[name, "", seeds] = mine
    return scores


def write_tables(plan: Study, done: Set[str]) -> str:
    """Write scores.csv, table.csv and table.md to the study's folder; returns the last one."""
    scores = finished_scores(plan, done)
    every = ({**dict(zip(SCORES, job, strict=False)), **row} for job, rows in scores.items() for row in rows)
    write_csv(Path(plan.folder, "scores.csv"), SCORES, every)
    outcomes = tables(plan, scores)
    write_csv(Path(plan.folder, "table.csv"), COLUMNS, chain(*outcomes.values()))
    text = markdown(outcomes)
    for run in plan.runs:
        absent = [str(seed) for seed in plan.seeds if seed not in seeds_done(plan, run, scores)]
        text += f"- missing: {run}, seeds {', '.join(absent)}\n" if absent else ""
    write_text(Path(plan.folder, "table.md"), text)
    return text


def tables(plan: Study, scores: Scores) -> dict[str, list[Row]]:
    """Outcome -> rows of its table, from the rows of scores.csv alone."""
    return {outcome: _decided(list(_rows(plan, scores, outcome)), plan.holm) for outcome in plan.outcomes}


def markdown(rows: Mapping[str, Sequence[Row]]) -> str:
    """A Markdown table for each outcome."""
    lines = []
    for outcome, of_outcome in rows.items():
        table = [(MEAN + (GAIN if "difference" in row else NONE)).format(**row) for row in of_outcome]
        lines += [HEADING.format(outcome), "|---" * 10 + "|", *table, ""] if table else []
    return "\n".join(lines).replace(" nan ", "  ") + "\n"


def _rows(plan: Study, scores: Scores, outcome: str) -> Iterator[Row]:
    """A row of each run with a finished seed, and one of the policy that the control started from."""
    jobs = {run: seeds_done(plan, run, scores) for run in plan.runs}
    start = START[plan.outcomes[outcome][0] in PAIRS]
    jobs[start] = {s: job for s in plan.seeds for job in scores if job[0] == start and str(s) in job[2].split()}
    of_parts = {job: values(rows, plan.outcomes[outcome]) for job, rows in scores.items()}
    found = {run: {seed: of_parts[job] for seed, job in by_seed.items()} for run, by_seed in jobs.items()}
    for run, by_seed in found.items():
        if not by_seed or not next(iter(by_seed.values())).size:  # not done, or no pair is hard
            continue
        score, tokens, ended = np.stack(list(by_seed.values()), 1)  # (S, N) each
        control = plan.control_of(run) if run in plan.runs else plan.control
        (_, chosen, _), *_ = jobs[run].values()
        row = {"outcome": outcome, "run": run, "chosen": chosen, "seeds": len(by_seed), "prompts": score.shape[1]}
        mean = two_way_bootstrap(score)
        row |= {"mean": mean.mean, "low": mean.low, "high": mean.high, "tokens": tokens.mean(), "ended": ended.mean()}
        yield row | _difference(by_seed, found[control], "" if run == control else control)


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
    gains = np.stack([ours[seed][0] - theirs[seed][0] for seed in both])  # (S, N)
    gain, few = two_way_bootstrap(gains), gains.shape[1] < FEWEST
    row = {"control": control, "difference": gain.mean, "difference_low": gain.low, "difference_high": gain.high}
    row |= {"p": 1.0 if few else gain.p(), "verdict": "decided" if gain.decides(gains.shape[1]) else "undecided"}
    return row | {"detectable": math.nan if few else power(1) * (gain.high - gain.low) / (2 * 1.96)}


def job_rows(plan: Study, folder: Path, when: str = "after") -> list[Row]:
    """Of a job's responses to the prompts, and of its held-out pairs where an outcome is over pairs."""
    rows = job_scores(folder, plan.prompts, when) if plan.prompts else []
    parts = {part for outcome in plan.outcomes.values() for part in outcome}
    return rows + (pair_rows(folder, when) if parts & {*PAIRS} else [])


def job_scores(folder: Path, prompts: str, when: str = "after") -> list[Row]:
    """Part, gold score, length and end of a job's response to each prompt. `prompt` counts the prompts from 1.

    Raises:
        InputError: the job's prompts are not these, or its responses have no scores.
    """
    path = folder / "responses.json"
    rows = json.loads(path.read_text("utf-8"))
    if [row["prompt"] for row in rows] != [row["prompt"] for row in read_prompts(prompts)]:
        raise InputError(f"{path} holds other prompts than {prompts}: give the runs' GoldEvaluation that file")
    if any(row[when]["score"] is None for row in rows):
        raise InputError(f"{path} holds responses without a score: give the runs' GoldEvaluation a scorer")
    measured = ({key: row[when][key] + 0 for key in SCORES[-3:]} for row in rows)  # + 0: ended is 0 or 1
    parts = enumerate((row.get("part", "all") for row in rows), 1)
    return [{"prompt": n, "part": part, **each} for (n, part), each in zip(parts, measured, strict=True)]
