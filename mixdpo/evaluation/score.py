"""Verdicts files as a table: win rates with intervals, and beside them what could explain them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import Interval
from mixdpo.evaluation.judged_prompts import Judged, facts, judged_prompts, shared_prompts
from mixdpo.evaluation.verdicts import read_verdicts
from mixdpo.evaluation.win_rate import (
    GamedBaselines,
    label,
    read_difficulties,
    read_gamed,
    resampled_length_controlled,
    resampled_win_rates,
    standard_error_of_mean,
)
from mixdpo.storage.files import write_json


@dataclass(frozen=True)
class Scores:
    """Of one model.

    Attributes:
        rates: name of a win rate -> its estimate; None where there is none, and `notes` says why.
        standard_error: of the win rate, as AlpacaEval reports it.
    """

    rates: dict[str, Interval | None]
    standard_error: float
    notes: list[str]


def score(
    verdicts: str,
    against: str | None = None,
    difficulty: str | None = None,
    gamed: str | None = None,
    samples: int = 1000,
    seed: int = 0,
    out: str | None = None,
) -> None:
    """Print win rates from verdicts, raw, discrete and length-controlled, each with standard error and interval.

    Standard errors and 95 % intervals are a bootstrap over prompts. A prompt judged in both orders counts with the mean
    of its two preferences; one without a verdict in each order is left out, and the table says how many and why.

    The length-controlled win rate is AlpacaEval's with both --difficulty and --gamed; else its name says what it is
    without, and it cannot be compared with the leaderboard's.

    Args:
        verdicts: file of `mixdpo judge`.
        against: verdicts file of another model, by the same judge against the same baseline: scores both and their
            paired differences over the prompts that both have.
        difficulty: CSV with the columns index and instruction_difficulty; index is the prompt's position, from 0, in
            the judged outputs, which must therefore be in AlpacaEval's order. Without it the length-controlled win
            rate has no such term, says so, and is not the leaderboard's. AlpacaEval's is not part of this package: `hf
            download tatsu-lab/alpaca_eval df_gamed.csv --repo-type dataset` (or instruction_difficulty.csv there).
        gamed: CSV with the columns preference (0 to 1), std_delta_len, instruction_difficulty and not_gamed_baseline:
            AlpacaEval's df_gamed.csv. Without it the length-controlled win rate says so and is not the leaderboard's.
        samples: resamples of the prompts.
        seed: of the resampling.
        out: the .json file to write as well, replaced if it exists.

    Raises:
        InputError: a file cannot be read or lacks an index, fewer than two prompts were judged, or two files do not
            have judge, baseline or instructions in common.
    """
    judged = [judged_prompts(read_verdicts(path)) for path in (verdicts, against) if path is not None]
    shared = shared_prompts(judged)
    if against is not None:  # lengths beside rates must be of the same prompts
        common = set(shared)
        among = [[v for v in each.file.verdicts if v.index in common] for each in judged]
        judged = [replace(each, facts=facts(verdicts)) for each, verdicts in zip(judged, among, strict=True)]
    difficulties = None if difficulty is None else read_difficulties(difficulty, shared)
    extra = None if gamed is None else read_gamed(gamed)
    scores = [_scores(each, shared, difficulties, extra, samples, seed) for each in judged]
    differences = _differences(*scores) if against is not None else {}
    print(_table(judged, scores, differences, len(shared)))
    if out is not None:
        inputs = {"samples": samples, "seed": seed, "difficulty": difficulty, "gamed": gamed, "prompts": len(shared)}
        models = [_content(*each) for each in zip(judged, scores, strict=True)]
        write_json(out, {**inputs, "models": models, "differences": _in_json(differences)})


def _scores(
    judged: Judged,
    indices: Sequence[int],
    difficulties: np.ndarray | None,
    gamed: GamedBaselines | None,
    samples: int,
    seed: int,
) -> Scores:
    preferences, len_model, len_baseline = np.array([judged.prompts[index] for index in indices]).T
    raw, discrete = resampled_win_rates(preferences, samples, seed)
    name, notes = label(difficulties is not None, gamed is not None), []
    rates: dict[str, Interval | None] = {"win rate": raw, "discrete win rate": discrete, name: None}
    try:
        columns = preferences, len_model, len_baseline, difficulties, gamed
        rates[name] = resampled_length_controlled(*columns, samples=samples, seed=seed)[1]
    except InputError as error:
        notes.append(f"{judged.file.path}: no {name}: {error}")
    return Scores(rates, standard_error_of_mean(preferences), notes)


def _differences(one: Scores, other: Scores) -> dict[str, Interval | None]:
    pairs = ((name, rate, other.rates[name]) for name, rate in one.rates.items())
    return {name: None if a is None or b is None else a - b for name, a, b in pairs}


def _table(
    judged: Sequence[Judged], scores: Sequence[Scores], differences: Mapping[str, Interval | None], prompts: int
) -> str:
    """Markdown: the rates of each model and what else there is to know about it, then differences, then notes."""
    rows = [(f"against {judged[0].file.header['baseline']}, {prompts} prompts", "", "standard error", "95 % interval")]
    rows.append(("---", "---:", "---:", "---"))
    for name, each, theirs in zip(_names(judged), judged, scores, strict=True):
        rows += [(name, "", "", ""), *_rate_rows(theirs.rates)]
        rows.append(("standard error of the win rate as AlpacaEval has it", "", f"{theirs.standard_error:.2f}", ""))
        rows += [(*row, "", "") for row in _facts_rows(each)]
    if differences:
        rows += [(f"{' minus '.join(_names(judged))}", "", "", ""), *_rate_rows(differences, "+")]
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for each in scores for note in each.notes)])


def _names(judged: Sequence[Judged]) -> list[str]:
    """Of the models; of their files where the models have one name."""
    models = [str(each.file.header["model"]) for each in judged]
    return models if len(set(models)) == len(models) else [str(each.file.path) for each in judged]


def _rate_rows(rates: Mapping[str, Interval | None], sign: str = "") -> list[tuple[str, ...]]:
    rows = []
    for name, rate in rates.items():
        cells = ("n/a",) * 3
        if rate is not None:
            interval = f"{rate.low:{sign}.2f} to {rate.high:{sign}.2f}"
            cells = (f"{rate.mean:{sign}.2f}", f"{rate.standard_error:.2f}", interval)
        rows.append((f"{name}, %", *cells))
    return rows


def _facts_rows(judged: Judged) -> list[tuple[str, str]]:
    left_out = "; ".join(f"{reason}: {count}" for reason, count in judged.failed.items())
    facts = {name: "n/a" if value is None else f"{value:.1f}" for name, value in judged.facts.items()}
    counts = {"prompts judged": str(len(judged.prompts)), "prompts left out": str(sum(judged.failed.values()))}
    return [*counts.items(), *([("why left out", left_out)] if left_out else []), *facts.items()]


def _content(judged: Judged, scores: Scores) -> dict[str, Any]:
    """Of one model, for the JSON file."""
    said = {"verdicts": str(judged.file.path), "header": judged.file.header, "rates": _in_json(scores.rates)}
    counts = {"judged": len(judged.prompts), "left_out": judged.failed, "facts": judged.facts, "notes": scores.notes}
    return {**said, "alpaca_eval_standard_error": scores.standard_error, **counts}


def _in_json(rates: Mapping[str, Interval | None]) -> dict[str, dict[str, float] | None]:
    return {name: None if rate is None else _summary(rate) for name, rate in rates.items()}


def _summary(rate: Interval) -> dict[str, float]:
    return {"value": rate.mean, "standard_error": rate.standard_error, "low": rate.low, "high": rate.high}
