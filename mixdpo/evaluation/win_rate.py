"""Win rates in percent from preferences, with intervals over prompts: raw, discrete and length-controlled.

A preference is the probability that the model's response is preferred over the baseline's, from 0 to 1. AlpacaEval
stores 1 + preference.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog, minimize
from scipy.special import expit

from mixdpo.data.sources import file_rows
from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import Interval, one_way_bootstrap

GAMED_WEIGHT = 0.2 / 2  # AlpacaEval's regularize_to_baseline_lambda, shared by its two gamed baselines


_GRADIENT = 1e-7  # largest norm of the mean loss' gradient at a solution: 1e-5 points; below, the loss is rounding


_PULL = 1e-6  # of a resample's fit towards that of all prompts, which decides what a resample leaves open: 1e-4 points


_SEPARATED = 1e-6  # mean of sides · d that is no rounding of the solver


_GAMED = ("preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
"""Columns of the gamed baselines (M, 4): comparisons of the baseline with itself, told to be verbose or concise, which
hold the length effect in place. Preference in [0, 1]; Δ / std(Δ); difficulty of the instruction; 0, or 1 for a row that
counts as one of the model's."""


_HUB = "AlpacaEval's file is in the data set tatsu-lab/alpaca_eval on the Hugging Face hub"


_INSTEAD = "report the win rate alone, or judge more prompts"


def resampled_win_rates(preferences: ArrayLike, samples: int = 1000, seed: int = 0) -> tuple[Interval, Interval]:
    """Win rate and discrete win rate with a bootstrap over the prompts.

    The win rate is 100 · mean preference. The discrete win rate is the percentage of wins and half the draws; a draw is
    what AlpacaEval stores as 1.5, so exactly one half.

    Args:
        preferences: (N,) in [0, 1].
    """
    values = np.asarray(preferences, dtype=np.float64)
    outcomes = (np.sign((1 + values) - 1.5) + 1) / 2  # of 1 + p, so that ½ is met where a mean is an ulp off
    return _mean_interval(values, samples, seed), _mean_interval(outcomes, samples, seed)


def _mean_interval(values: np.ndarray, samples: int, seed: int) -> Interval:
    return one_way_bootstrap(lambda rows, axis=-1: 100 * values[rows].mean(axis), len(values), samples, seed)


def standard_error_of_mean(preferences: ArrayLike) -> float:
    """Standard error of the win rate (N,) as AlpacaEval reports it: 100 · std / √N, ddof 1."""
    return float(100 * np.std(preferences, ddof=1) / np.sqrt(np.size(preferences)))


def label(difficulty: bool, gamed: bool) -> str:
    """Name of a length-controlled win rate. Only the rate with both terms is AlpacaEval's."""
    lacking = ["instruction difficulty"] * (not difficulty) + ["gamed baselines"] * (not gamed)
    return "length-controlled win rate" + " without " * bool(lacking) + " and ".join(lacking)


def resampled_length_controlled(
    preferences: ArrayLike,
    len_model: ArrayLike,
    len_baseline: ArrayLike,
    difficulty: ArrayLike | None = None,
    gamed: np.ndarray | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, Interval]:
    """The win rate if both responses were equally long (Dubois et al. 2024, AlpacaEval's `length_controlled_v1`).

    logit p = a · tanh(Δ / std(Δ)) + b · difficulty + c · [not gamed] with Δ = len_baseline - len_model, fitted by
    maximum likelihood to soft labels, gamed rows weighing 0.1. The win rate is 100 · mean σ(b · difficulty + c).
    AlpacaEval fits the same with an L1 penalty whose strength it cross-validates: 0.2 points away on average.

    A resample of the prompts has its own std(Δ) and fit; the gamed rows stay the same. A resample with wins or losses
    alone counts as nearly 100 or 0. AlpacaEval's `lc_standard_error` is another thing: how much the predicted
    preferences differ between instructions.

    Args:
        preferences: (N,) of the model, in [0, 1].
        len_model: (N,) characters of the model's responses.
        len_baseline: (N,) characters of the baseline's responses.
        difficulty: (N,) of the instructions; None leaves the term out.
        gamed: (M, 4) rows of `read_gamed`, which hold a and b in place; None fits the N prompts alone.

    Returns:
        The weights a, b (not without `difficulty`) and c of the fit to all prompts, and the win rate.

    Raises:
        InputError: there is no unique finite solution, because length differences are all equal, or because the terms
            separate wins from losses.
    """
    delta = np.subtract(len_baseline, len_model, dtype=np.float64)
    prompts = np.column_stack([preferences, delta, *([] if difficulty is None else [difficulty])])
    if not delta.std():
        raise InputError(f"every prompt's responses differ by the same number of characters: {_INSTEAD}")
    features, labels, _ = _design(prompts, gamed)
    _refuse_unsolvable(features, labels)
    fit = _weights(prompts, gamed, np.zeros(features.shape[1]))

    def rate(rows: np.ndarray) -> float:
        drawn = prompts[rows]
        weights = _weights(drawn, gamed, fit, _PULL)  # of all prompts: fit itself
        return float(100 * expit(drawn[:, 2:] @ weights[1:-1] + weights[-1]).mean())

    return fit, one_way_bootstrap(rate, len(prompts), samples, seed)


def _design(prompts: np.ndarray, gamed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N + M, 2 or 3), labels and weights (N + M,).

    Args:
        prompts: (N, 2 or 3) preference, Δ, and difficulty unless the term is left out.
    """
    preferences, delta, difficulty = prompts[:, 0], prompts[:, 1], prompts[:, 2:]
    spread, ones = delta.std(ddof=1), np.ones(len(prompts))
    length = np.tanh(delta / spread) if spread else np.zeros(len(prompts))  # 0: of some resample
    features = np.column_stack([length, difficulty, ones])
    gamed = np.empty((0, len(_GAMED))) if gamed is None else gamed
    labels, length, not_gamed = gamed[:, 0], gamed[:, 1], gamed[:, 3]
    more = np.column_stack([np.tanh(length), gamed[:, 2 : 2 + difficulty.shape[1]], not_gamed])
    weights = np.where(not_gamed, 1.0, GAMED_WEIGHT)
    return np.concatenate([features, more]), np.concatenate([preferences, labels]), np.concatenate([ones, weights])


def _weights(prompts: np.ndarray, gamed: np.ndarray | None, start: np.ndarray, pull: float = 0.0) -> np.ndarray:
    """Weights of the features: maximum likelihood for soft labels, by Newton steps in a trust region.

    Args:
        pull: strength of a ridge towards `start`.
    """
    features, labels, weights = _design(prompts, gamed)
    weights = weights / weights.sum()

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits, away = features @ x, x - start
        value = weights @ (np.logaddexp(0, logits) - labels * logits) + pull / 2 * away @ away
        return value, (weights * (expit(logits) - labels)) @ features + pull * away

    def hessian(x: np.ndarray) -> np.ndarray:
        logits = features @ x
        return (features.T * (weights * expit(logits) * expit(-logits))) @ features + pull * np.eye(len(x))

    result = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": _GRADIENT})
    if not result.success:
        raise InputError(f"the length-controlled fit did not converge ({result.message}): {_INSTEAD}")
    return result.x


def _refuse_unsolvable(features: np.ndarray, labels: np.ndarray) -> None:
    """A unique solution exists if no direction d separates wins from losses (Albert & Anderson 1984): sides · d >= 0
    with one of them above 0. A soft label is on both sides.

    Raises:
        InputError: the solution is not unique or not finite.
    """
    if np.linalg.matrix_rank(features) < features.shape[1]:
        raise InputError("length, difficulty and model cannot be told apart in these prompts: leave --difficulty out")
    sides = np.concatenate([features[labels > 0], -features[labels < 1]])
    if -linprog(-sides.sum(0), A_ub=-sides, b_ub=np.zeros(len(sides)), bounds=(-1, 1)).fun > _SEPARATED * len(sides):
        raise InputError(f"no finite solution: a limit in length or difficulty separates wins from losses: {_INSTEAD}")


def read_difficulties(path: str, indices: Sequence[int]) -> np.ndarray:
    """Difficulties (N,) of these prompts, from a .csv file with the columns index and instruction_difficulty.

    Raises:
        InputError: the file cannot be read, lacks a prompt, or has two difficulties for one.
    """
    difficulties: dict[float, float] = {}
    for number, (index, value) in _numbers(path, ("index", "instruction_difficulty")):
        if not np.isfinite(value) or difficulties.setdefault(index, value) != value:
            raise InputError(f"{path}, row {number}: index {index:g} needs one finite difficulty: correct the file")
    if lacking := [index for index in indices if index not in difficulties]:
        raise InputError(f"{path} has no difficulty for {len(lacking)} prompts (first: index {lacking[0]}); {_HUB}")
    return np.array([difficulties[index] for index in indices])


def read_gamed(path: str) -> np.ndarray:
    """The gamed baselines (M, 4) of a .csv file, columns as in `_GAMED`. Rows without a preference are left out, as
    AlpacaEval does.

    Raises:
        InputError: the file cannot be read, lacks a column, or has a number out of range.
    """
    gamed = np.array([row for _, row in _numbers(path, _GAMED) if not np.isnan(row[0])]).reshape(-1, 4)
    in_range = np.isfinite(gamed).all() and (gamed[:, 0] == gamed[:, 0].clip(0, 1)).all()
    if not len(gamed) or not in_range or not {*gamed[:, 3]} <= {0, 1}:
        raise InputError(f"{path}: need finite numbers, each preference from 0 to 1, on at least one row; {_HUB}")
    return gamed


def _numbers(path: str, names: Sequence[str]) -> Iterator[tuple[int, list[float]]]:
    """Row number, and these columns as numbers: True is 1, False 0, an empty cell NaN."""
    words = {"True": 1.0, "False": 0.0, "": np.nan}
    for number, given in file_rows(Path(path)):
        row = {name or "index": value for name, value in given.items()}  # pandas writes an index without a name
        if lacking := [name for name in names if name not in row]:
            raise InputError(f"{path} lacks the column {', '.join(lacking)}; it has {', '.join(row)}. {_HUB}")
        try:
            yield number, [float(words.get(row[name], row[name])) for name in names]
        except (ValueError, TypeError):
            raise InputError(f"{path}, row {number}: {', '.join(names)} should be numbers, not {row}") from None
