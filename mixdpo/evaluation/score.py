"""Verdicts files as a table: win rates with intervals, and beside them what could explain them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation import win_rate
from mixdpo.evaluation.bootstrap import Interval
from mixdpo.evaluation.judged_prompts import Judged, facts, judged_prompts, shared_prompts
from mixdpo.evaluation.verdicts import read_verdicts
from mixdpo.storage.files import write_json

Rates = dict[str, Interval | None]
"""Name of a win rate -> its estimate; None where there is none."""


@dataclass(frozen=True)
class Scores:
    """Of one model.

    Attributes:
        judged: what the rates are of.
        rates: where one is None, `notes` say why.
        standard_error: of the win rate, as AlpacaEval reports it.
    """

    judged: Judged
    rates: Rates
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
    of its two preferences. A prompt without a verdict in each order is left out, and the table says how many and why.

    The length-controlled win rate is AlpacaEval's with both --difficulty and --gamed. Without one of them the rate has
    another name, and cannot be compared with the leaderboard's.

    Args:
        verdicts: file of `mixdpo judge`.
        against: verdicts file of another model, by the same judge against the same baseline: scores both and their
            paired differences over the prompts that both have.
        difficulty: CSV with the columns index and instruction_difficulty. The index is the prompt's position, from 0,
            in the judged responses, which must therefore be in AlpacaEval's order. Get AlpacaEval's file by `hf
            download tatsu-lab/alpaca_eval df_gamed.csv --repo-type dataset` (or instruction_difficulty.csv).
        gamed: CSV with the columns preference (0 to 1), std_delta_len, instruction_difficulty and not_gamed_baseline:
            AlpacaEval's df_gamed.csv.
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
    difficulties = None if difficulty is None else win_rate.read_difficulties(difficulty, shared)
    extra = None if gamed is None else win_rate.read_gamed(gamed)
    scores = [_scores(each, shared, difficulties, extra, samples, seed) for each in judged]
    difference = _difference(*(each.rates for each in scores)) if against is not None else {}
    print(_table(scores, difference, len(shared)))
    if out is not None:
        inputs = {"samples": samples, "seed": seed, "difficulty": difficulty, "gamed": gamed, "prompts": len(shared)}
        write_json(out, {**inputs, "models": list(map(_content, scores)), "differences": _in_json(difference)})


def _scores(judged: Judged, indices: Sequence[int], difficulties: Any, gamed: Any, samples: int, seed: int) -> Scores:
    preferences, len_model, len_baseline = np.array([judged.prompts[index] for index in indices]).T
    raw, discrete = win_rate.resampled_win_rates(preferences, samples, seed)
    name, notes = win_rate.label(difficulties is not None, gamed is not None), []
    rates: Rates = {"win rate": raw, "discrete win rate": discrete, name: None}
    try:
        columns = preferences, len_model, len_baseline, difficulties, gamed
        rates[name] = win_rate.resampled_length_controlled(*columns, samples=samples, seed=seed)[1]
    except InputError as error:
        notes.append(f"{judged.file.path}: no {name}: {error}")
    return Scores(judged, rates, win_rate.standard_error_of_mean(preferences), notes)


def _difference(one: Rates, other: Rates) -> Rates:
    pairs = ((name, rate, other[name]) for name, rate in one.items())
    return {name: None if a is None or b is None else a - b for name, a, b in pairs}


def _table(scores: Sequence[Scores], difference: Rates, prompts: int) -> str:
    """Markdown: of each model the rates and what could explain them, then the difference, then notes."""
    baseline, names = scores[0].judged.file.header["baseline"], _names([each.judged for each in scores])
    rows: list[tuple[str, ...]] = [(f"against {baseline}, {prompts} prompts", "", "standard error", "95 % interval")]
    rows.append(("---", "---:", "---:", "---"))
    for name, each in zip(names, scores, strict=True):
        rows += [(name, "", "", ""), *_rate_rows(each.rates)]
        rows.append(("standard error of the win rate as AlpacaEval has it", "", f"{each.standard_error:.2f}", ""))
        rows += [(*row, "", "") for row in _rows_beside(each.judged)]
    if difference:
        rows += [(" minus ".join(names), "", "", ""), *_rate_rows(difference, "+")]
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for each in scores for note in each.notes)])


def _names(judged: Sequence[Judged]) -> list[str]:
    """Of the models; of their files where the models have one name."""
    models = [str(each.file.header["model"]) for each in judged]
    return models if len(set(models)) == len(models) else [str(each.file.path) for each in judged]


def _rate_rows(rates: Rates, sign: str = "") -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, rate in rates.items():
        cells = ("n/a",) * 3
        if rate is not None:
            interval = f"{rate.low:{sign}.2f} to {rate.high:{sign}.2f}"
            cells = (f"{rate.mean:{sign}.2f}", f"{rate.standard_error:.2f}", interval)
        rows.append((f"{name}, %", *cells))
    return rows


def _rows_beside(judged: Judged) -> list[tuple[str, str]]:
    """How many prompts the rates are of, and what else could explain them."""
    rows = {"prompts judged": str(len(judged.prompts)), "prompts left out": str(sum(judged.failed.values()))}
    if judged.failed:
        rows["why left out"] = "; ".join(f"{reason}: {count}" for reason, count in judged.failed.items())
    return [*rows.items(), *((name, "n/a" if v is None else f"{v:.1f}") for name, v in judged.facts.items())]


def _content(scores: Scores) -> dict[str, Any]:
    """Of one model, for the JSON file."""
    judged = scores.judged
    rates = {"rates": _in_json(scores.rates), "alpaca_eval_standard_error": scores.standard_error}
    counts = {"judged": len(judged.prompts), "left_out": judged.failed, "facts": judged.facts, "notes": scores.notes}
    return {"verdicts": str(judged.file.path), "header": judged.file.header, **rates, **counts}


def _in_json(rates: Rates) -> dict[str, Any]:
    names = {"value": "mean", "standard_error": "standard_error", "low": "low", "high": "high"}
    return {
        name: rate and {key: getattr(rate, attribute) for key, attribute in names.items()}
        for name, rate in rates.items()
    }
