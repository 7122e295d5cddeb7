"""Win rates from pairwise preferences, with intervals over prompts.

A preference is the probability that the model's output is preferred over the baseline's: 0 to 1, where AlpacaEval
writes 1 to 2. Win rates are in percent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mixdpo.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A statistic, its value in resamples of the prompts, and what follows from both (Efron & Tibshirani 1993)."""

    value: float
    resamples: np.ndarray

    @property
    def standard_error(self) -> float:
        return float(self.resamples.std(ddof=1))

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, by percentiles."""
        low, high = np.quantile(self.resamples, [0.025, 0.975])
        return float(low), float(high)

    def summary(self) -> dict[str, float]:
        """In JSON's types."""
        low, high = self.interval
        return {"value": self.value, "standard_error": self.standard_error, "low": low, "high": high}

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Paired difference: both from the same prompts in the same order, resampled with the same seed."""
        return Estimate(self.value - other.value, self.resamples - other.resamples)


def win_rate(preferences: ArrayLike) -> float:
    """100 · mean preference (N,).

    Raises:
        InputError: none, or one that is not in [0, 1].
    """
    return float(100 * checked(preferences).mean())


def discrete_win_rate(preferences: ArrayLike) -> float:
    """Wins and half the draws, in percent of N; a draw is what AlpacaEval stores as 1.5, so exactly one half.

    Raises:
        InputError: as `win_rate`.
    """
    return float(100 * _outcomes(checked(preferences)).mean())


def standard_error_of_mean(preferences: ArrayLike) -> float:
    """Of the win rate as AlpacaEval reports it: 100 · std / √N, ddof 1.

    Raises:
        InputError: as `win_rate`, or there is only one.
    """
    values = checked(preferences)
    need_several(len(values))
    return float(100 * values.std(ddof=1) / np.sqrt(len(values)))


def resampled_win_rates(preferences: ArrayLike, samples: int = 1000, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Win rate and discrete win rate with a bootstrap over the prompts (N,).

    Raises:
        InputError: as `win_rate`, only one prompt, or fewer than two samples.
    """
    values = checked(preferences)
    columns = 100 * np.stack([values, _outcomes(values)], 1)
    raw, discrete = bootstrap(lambda rows: columns[rows].mean(0), len(values), samples, seed).T
    return Estimate(win_rate(values), raw), Estimate(discrete_win_rate(values), discrete)


def bootstrap(statistic: Callable[[np.ndarray], ArrayLike], size: int, samples: int, seed: int) -> np.ndarray:
    """(samples, …) values of a statistic of drawn rows; one seed and size draw the same rows for any statistic."""
    need_several(size)
    if samples < 2:
        raise InputError(f"samples {samples}: a standard error needs at least 2, 1000 is usual")
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(size, size=size)) for _ in range(samples)])


def checked(preferences: ArrayLike) -> np.ndarray:
    values = np.asarray(preferences, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise InputError(f"preferences of the shape {values.shape}: need a list with one for each judged prompt")
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError("a preference is not in [0, 1]: leave prompts without a verdict out; AlpacaEval's is 1 above")
    return values


def need_several(prompts: int) -> None:
    if prompts < 2:
        raise InputError("only one prompt was judged, which says nothing about others: judge at least two")


def _outcomes(values: np.ndarray) -> np.ndarray:
    """1 win, ½ draw, 0 loss: of 1 + p, as AlpacaEval stores it, so that ½ is met where a mean is an ulp off."""
    return (np.sign((1 + values) - 1.5) + 1) / 2
