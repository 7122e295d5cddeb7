"""Percentile intervals of a mean, from resampled items or from resampled seeds and prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from mixdpo.errors import InputError

FEWEST = 6
"""Rows that a verdict needs. If 5 rows all have one sign, a sign test still has p = 2 / 2⁵ = 0.06."""
_BLOCK = 2**22  # resampled indices held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap percentile interval; formatted, `mean [low, high]`.

    Attributes:
        resamples: (samples,) values of the resamples.
    """

    mean: float
    low: float
    high: float
    resamples: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    @property
    def standard_error(self) -> float:
        return float(self.resamples.std(ddof=1))

    def p(self) -> float:
        """Two-sided p of the value 0: the smallest level at which the percentile interval leaves 0 out.

        p = min(1, 2 (1 + b) / (1 + samples)), b resamples in the smaller of the tails ≤ 0 and ≥ 0: never 0. With 10,000
        resamples, a p near .017 has a Monte Carlo standard error of .002. It is as coarse as the interval: few seeds
        make both too small, see `two_way_bootstrap` (Davison & Hinkley 1997, chapter 4).
        """
        beyond = min((self.resamples <= 0).sum(), (self.resamples >= 0).sum())
        return min(1.0, 2 * (1 + float(beyond)) / (1 + len(self.resamples)))

    def decides(self, rows: int) -> bool:
        """Whether it excludes 0, and has the rows for a verdict."""
        return rows >= FEWEST and (self.low > 0 or self.high < 0)

    def __sub__(self, other: "Interval") -> "Interval":
        """Paired difference: both intervals come from the same items in the same order, and from the same seed."""
        return _interval(self.mean - other.mean, self.resamples - other.resamples)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def _interval(mean: float, resamples: np.ndarray) -> Interval:
    low, high = np.quantile(resamples, [0.025, 0.975]).tolist()
    return Interval(float(mean), low, high, resamples)


def one_way_bootstrap(statistic: Callable[..., ArrayLike], items: int, samples: int, seed: int = 0) -> Interval:
    """Percentile interval of a statistic of N items (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: takes row numbers (N,). A statistic with a parameter `axis` takes (samples, N) at once.
        items: N, at least 2. For one seed and one N, every statistic gets the same resamples.
    """
    from scipy.stats import bootstrap

    rows, options = np.arange(items), {"n_resamples": samples, "batch": max(1, _BLOCK // items)}
    result = bootstrap((rows,), statistic, method="percentile", rng=seed, **options)
    return _interval(float(np.asarray(statistic(rows))), result.bootstrap_distribution)


def paired_bootstrap(before: ArrayLike, after: ArrayLike, samples: int = 10_000) -> Interval:
    """Percentile interval of mean(after - before). An item is drawn with both its scores, so its difficulty cancels.

    Args:
        before: scores (N,) of the first system.
        after: scores (N,) of the second system, item by item.
        samples: number of resamples.
    """
    values = np.array([second - first for first, second in zip(before, after, strict=True)], dtype=np.float64)
    if len(values) == 1:  # nothing to draw
        return _interval(values[0], np.repeat(values, samples))
    return one_way_bootstrap(lambda rows, axis=-1: values[rows].mean(axis), len(values), samples)


def two_way_bootstrap(differences: ArrayLike, samples: int = 10_000) -> Interval:
    """Percentile interval of the mean of values (S, N) of S seeds and N prompts.

    Seeds and prompts are both resampled. A prompt keeps its values of all seeds, a seed its values of all prompts (Owen
    2007, "The pigeonhole bootstrap").

    The interval is too narrow if few seeds differ much: only (S - 1) / S of the variance between seeds is counted.
    Variance that belongs to neither seeds nor prompts is counted about three times over.

    Args:
        differences: scores, or differences of scores of two systems with the same seeds and prompts.
        samples: number of resamples.

    Raises:
        InputError: `differences` is no table, is empty, or has a value that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"need a table of finite values, seeds by prompts, not one of shape {values.shape}")
    rng, (seeds, prompts) = np.random.default_rng(0), values.shape
    means = []
    for drawn_seeds in np.array_split(rng.integers(seeds, size=(samples, seeds)), 1 + samples * values.size // _BLOCK):
        of_seeds = values[drawn_seeds].mean(1)  # (rows, N)
        means.append(np.take_along_axis(of_seeds, rng.integers(prompts, size=of_seeds.shape), 1).mean(1))
    return _interval(values.mean(), np.concatenate(means))
