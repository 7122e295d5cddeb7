"""What a study found: mean scores with intervals over prompts and seeds, and differences to a control."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import Interval, two_way_bootstrap
from mixdpo.evaluation.study_design import Point, Study
from mixdpo.storage.files import written_whole

POWER = 2.8
"""1.96 + 0.84: a difference of so many standard errors is found with power 80 % at a two-sided 5 %."""


START = "(before training)"


COLUMNS = (
    *("outcome", "run", "chosen", "seeds", "prompts", "mean", "low", "high", "tokens", "ended", "control"),
    *("difference", "difference_low", "difference_high", "verdict", "detectable"),
)


def detectable(plan: Study, prompts: int) -> str:
    """The smallest difference that the design can find, before anything is run."""
    sd, seeds = plan.assumed_sd, len(plan.seeds)
    smallest = POWER * (sd["prompts"] ** 2 / prompts + sd["seeds"] ** 2 / seeds) ** 0.5
    return (
        f"smallest detectable difference (power 80 %, two-sided 5 %): {smallest:.3f} with {prompts} prompts, {seeds} "
        f"seeds, if it varies by {sd['prompts']:g} over prompts and by {sd['seeds']:g} over seeds (standard "
        "deviations); a smaller one is undecided, not absent"
    )


def mean_score(plan: Study, name: str, parts: Sequence[str]) -> float:
    """Mean gold score of a job's answers to the prompts of these parts."""
    return float(_values(plan, name, parts)[0].mean())


def chosen_point(plan: Study, run: str, done: Mapping[str, float]) -> Point | None:
    """The grid point with the best score at the first seed; None as long as one of them is missing, since a choice
    among fewer would not be the other runs' choice."""
    names = [plan.name(run, point, plan.seeds[0]) for point in plan.points]
    if len(names) == 1:
        return plan.points[0]
    if any(name not in done for name in names):
        return None
    scores = [mean_score(plan, name, [str(plan.choose_by)]) for name in names]
    return plan.points[int(np.argmax(scores))]


def write_tables(plan: Study, done: Mapping[str, float], stem: str = "table") -> str:
    """Write STEM.csv and STEM.md to the study's folder; returns the latter."""
    rows = [row for outcome in plan.outcomes for row in _rows(plan, done, outcome)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    table = "\n".join([*_markdown(plan, rows), *_missing(plan, done)]) + "\n"
    for name, content in ((f"{stem}.csv", text.getvalue()), (f"{stem}.md", table)):
        with written_whole(Path(plan.folder, name)) as partial:
            partial.write_text(content, "utf-8")
    return table


def seeds_done(plan: Study, run: str, done: Mapping[str, float]) -> dict[int, str]:
    """Seed -> name of the job, for what is done of a run at its chosen point."""
    point = chosen_point(plan, run, done)
    names = {} if point is None else {seed: plan.name(run, point, seed) for seed in plan.seeds}
    return {seed: name for seed, name in names.items() if name in done}


def _rows(plan: Study, done: Mapping[str, float], outcome: str) -> list[dict[str, Any]]:
    parts = plan.outcomes[outcome]
    tables = {
        run: {seed: _values(plan, name, parts) for seed, name in seeds_done(plan, run, done).items()}
        for run in plan.runs
    }
    controls = {run: plan.control_of(run) for run in plan.runs}
    if started := seeds_done(plan, plan.control, done):
        tables[START] = {seed: _values(plan, name, parts, "before") for seed, name in started.items()}
        controls[START] = plan.control
    rows = []
    for run, by_seed in tables.items():
        if not by_seed:
            continue
        scores, tokens, ended = np.stack(list(by_seed.values()), 1)  # (S, N) each
        point = chosen_point(plan, run, done) if run in plan.runs else {}
        chosen = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in point.items())
        row = {"outcome": outcome, "run": run, "chosen": chosen, "seeds": len(by_seed), "prompts": scores.shape[1]}
        row |= _interval(two_way_bootstrap(scores), "mean", "") | {"tokens": tokens.mean(), "ended": ended.mean()}
        rows.append(row | _difference(by_seed, tables[controls[run]], run, controls[run]))
    return rows


def _difference(ours: Mapping[int, Any], theirs: Mapping[int, Any], run: str, control: str) -> dict[str, Any]:
    """To the control, seed by seed and prompt by prompt; nothing for the control itself."""
    both = [seed for seed in ours if seed in theirs]
    if run == control or not both:
        return {"control": "" if run == control else control}
    if len(both) < len(ours):  # the row's other numbers are of all its seeds
        control += f" (seeds {', '.join(map(str, both))})"
    found = two_way_bootstrap(np.stack([ours[seed][0] - theirs[seed][0] for seed in both]))
    verdict = "decided" if found.low > 0 or found.high < 0 else "undecided"
    smallest = POWER * (found.high - found.low) / (2 * 1.96)
    return {
        "control": control,
        **_interval(found, "difference", "difference_"),
        "verdict": verdict,
        "detectable": smallest,
    }


def _interval(found: Interval, name: str, prefix: str) -> dict[str, float]:
    return {name: found.mean, f"{prefix}low": found.low, f"{prefix}high": found.high}


def _values(plan: Study, name: str, parts: Sequence[str], when: str = "after") -> np.ndarray:
    """(3, N) gold scores, lengths in tokens, and whether they ended, of a job's answers to these parts."""
    path = Path(plan.folder, name, "responses.json")
    rows, asked = json.loads(path.read_text("utf-8")), read_prompts(plan.prompts)
    if [row["prompt"] for row in rows] != [row["prompt"] for row in asked]:
        raise InputError(f"{path} responses other prompts than {plan.prompts}: give the runs' GoldEvaluation that file")
    rows = [row[when] for row in rows if row.get("part", "all") in parts]
    if any(row["score"] is None for row in rows):
        raise InputError(f"{path} holds answers without a score: the runs' GoldEvaluation needs a scorer")
    return np.array([[row[key] for row in rows] for key in ("score", "tokens", "ended")], dtype=float)


def _markdown(plan: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heading = "| {} | chosen | seeds × prompts | mean [95 % interval] | tokens | ended | against | difference | |"
    heading += " detectable |"
    lines = []
    for outcome in plan.outcomes:
        lines += [heading.format(outcome), "|---" * 10 + "|"]
        for row in (row for row in rows if row["outcome"] == outcome):
            mean = "{mean:.3f} [{low:.3f}, {high:.3f}] | {tokens:.1f} | {ended:.3f}".format(**row)
            against = f"{row['control']} | | | |"
            if "difference" in row:
                against = (
                    "{control} | {difference:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}] | {verdict} | "
                    "{detectable:.3f} |"
                ).format(**row)
            lines.append("| {run} | {chosen} | {seeds} × {prompts} | ".format(**row) + f"{mean} | {against}")
        lines.append("")
    return lines


def _missing(plan: Study, done: Mapping[str, float]) -> list[str]:
    found = {run: seeds_done(plan, run, done) for run in plan.runs}
    seeds = {run: [str(seed) for seed in plan.seeds if seed not in there] for run, there in found.items()}
    return [f"- missing: {run}, seeds {', '.join(absent)}" for run, absent in seeds.items() if absent]
