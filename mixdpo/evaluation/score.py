"""Verdicts files as a table: win rates with intervals, and the numbers that could explain the rates."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation import win_rate
from mixdpo.evaluation.bootstrap import Interval
from mixdpo.evaluation.verdicts import Verdict, read_verdicts
from mixdpo.storage.identity import differences

Rates = dict[str, Interval | None]
"""Name of a win rate -> its estimate; None where there is none."""


class Judged(NamedTuple):
    """One verdicts file, prompt by prompt.

    Attributes:
        verdicts: every verdict in the file, failed ones included.
        prompts: {index: preference, characters of the model's and of the baseline's response} of the judged prompts.
        left_out: {reason: number of prompts left out}.
    """

    path: str
    head: dict[str, Any]
    verdicts: list[Verdict]
    prompts: dict[int, tuple[float, int, int]]
    left_out: dict[str, int]


def score(
    verdicts: str,
    against: str | None = None,
    difficulty: str | None = None,
    gamed: str | None = None,
    samples: int = 1000,
    seed: int = 0,
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

    Raises:
        InputError: a file cannot be read or lacks an index, fewer than two prompts were judged, or two files do not
            have judge, baseline or instructions in common.
    """
    judged = [judged_prompts(path) for path in (verdicts, against) if path is not None]
    shared = shared_prompts(judged)
    difficulties = None if difficulty is None else win_rate.read_difficulties(difficulty, shared)
    more = difficulties, None if gamed is None else win_rate.read_gamed(gamed)
    # file names, where both models have the same name
    names = [str(each.head["model"]) for each in judged]
    names = names if len(set(names)) == len(names) else [each.path for each in judged]
    baseline, rates = judged[0].head["baseline"], list[Rates]()
    title = (f"against {baseline}, {len(shared)} prompts", "", "standard error", "95 % interval")
    rows: list[tuple[str, ...]] = [title, ("---", "---:", "---:", "---")]
    for name, each in zip(names, judged, strict=True):
        columns = np.array([each.prompts[index] for index in shared]).T
        rates.append(_rates(columns, *more, samples, seed))
        # lengths beside rates are of the same prompts
        among = [v for v in each.verdicts if against is None or v.index in set(shared)]
        rows += [(name, "", "", ""), *_rate_rows(rates[-1]), *_rows_beside(columns[0], each.left_out, among)]
    if against is not None:
        pairs = ((name, rate, rates[1][name]) for name, rate in rates[0].items())
        difference: Rates = {name: None if a is None or b is None else a - b for name, a, b in pairs}
        rows += [(" minus ".join(names), "", "", ""), *_rate_rows(difference, "+")]
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")


def _rates(columns: Any, difficulties: Any, gamed: Any, samples: int, seed: int) -> Rates:
    """Rates of preferences and lengths (3, N); prints why the length-controlled rate is missing."""
    preferences, ours, theirs = columns
    raw, discrete = win_rate.resampled_win_rates(preferences, samples, seed)
    name = win_rate.label(difficulties is not None, gamed is not None)
    rates: Rates = {"win rate": raw, "discrete win rate": discrete, name: None}
    try:
        fit = win_rate.resampled_length_controlled
        _, rates[name] = fit(preferences, ours, theirs, difficulties, gamed, samples=samples, seed=seed)
    except InputError as error:
        print(f"no {name}: {error}\n")
    return rates


def _rate_rows(rates: Rates, sign: str = "") -> list[tuple[str, ...]]:
    return [(f"{name}, %", *_cells(rate, sign)) for name, rate in rates.items()]


def _cells(rate: Interval | None, sign: str) -> tuple[str, str, str]:
    if rate is None:
        return "n/a", "n/a", "n/a"
    return f"{rate.mean:{sign}.2f}", f"{rate.standard_error:.2f}", f"{rate.low:{sign}.2f} to {rate.high:{sign}.2f}"


def _rows_beside(preferences: Any, left_out: dict[str, int], verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Rows with the win rate's standard error, the prompts left out, lengths and position bias, of failed verdicts too.

    The preference for the response shown first weighs both orders alike, so that a strong model is no bias. 50 is no
    bias.
    """
    reasons = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
    prompts = list({verdict.index: verdict for verdict in verdicts}.values())
    model_first = _mean(v.preference for v in verdicts if v.order == "model_first" and v.failed is None)
    baseline_first = _mean(1 - v.preference for v in verdicts if v.order == "baseline_first" and v.failed is None)
    means = {
        "length of the model's responses, characters": _mean(verdict.len_model for verdict in prompts),
        "length of the baseline's responses, characters": _mean(verdict.len_baseline for verdict in prompts),
        "length of the model's responses, tokens": _mean(v.tokens for v in prompts if v.tokens is not None),
        "responses that ended by themselves, %": _mean(100 * v.ended for v in prompts if v.ended is not None),
        "empty responses, %": _mean(100 * (verdict.len_model == 0) for verdict in prompts),
        "preference for the response shown first, %": 50 * (model_first + baseline_first),
    }
    error = win_rate.standard_error_of_mean(preferences)
    return [
        ("standard error of the win rate as AlpacaEval has it", "", f"{error:.2f}", ""),
        (f"prompts left out: {sum(left_out.values())}", reasons or "none", "", ""),
        *((name, "n/a" if np.isnan(mean) else f"{mean:.1f}", "", "") for name, mean in means.items()),
    ]


def judged_prompts(path: str) -> Judged:
    """
    Raises:
        InputError: fewer than two prompts have a verdict.
    """
    head, verdicts = read_verdicts(path)
    orders = 2 if head["judge"].get("order") == "both" else 1
    prompts, left_out = {}, Counter[str]()
    for index, each in groupby(verdicts, lambda verdict: verdict.index):
        of_prompt = list(each)
        failed = [verdict.failed.partition(":")[0] for verdict in of_prompt if verdict.failed is not None]
        if failed or len(of_prompt) < orders:
            left_out[failed[0] if failed else "judged in one order only"] += 1
        else:
            prompts[index] = fmean(v.preference for v in of_prompt), of_prompt[0].len_model, of_prompt[0].len_baseline
    left_out["not judged yet"] = head["prompts"] - len({verdict.index for verdict in verdicts})
    reasons = {reason: count for reason, count in left_out.most_common() if count}
    if len(prompts) < 2:
        raise InputError(f"{path} has {len(prompts)} judged prompts (left out: {reasons}): judge at least two")
    return Judged(path, head, verdicts, prompts, reasons)


def _mean(values: Iterable[float]) -> float:
    return fmean(list(values) or [np.nan])


def shared_prompts(judged: Sequence[Judged]) -> list[int]:
    """Indices of the prompts that all files judged.

    Raises:
        InputError: the files were not judged alike, or have fewer than two prompts in common.
    """
    one, other = judged[0], judged[-1]
    shared = sorted(one.prompts.keys() & other.prompts.keys())
    head, other_head = ({key: each.head[key] for key in ("baseline", "judge")} for each in (one, other))
    changed = differences(head, other_head)
    if unequal := [index for index in shared if one.prompts[index][2] != other.prompts[index][2]]:
        changed.append(f"the instructions or their order (first: index {unequal[0]})")
    if changed:
        raise InputError(f"{one.path} and {other.path} differ in {'; '.join(changed)}: judge both models alike")
    if len(shared) < 2:
        raise InputError(f"{one.path} and {other.path} have {len(shared)} judged prompts in common: need two or more")
    return shared
