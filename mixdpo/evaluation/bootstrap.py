"""How sure is a difference? A bootstrap over the items that both systems were measured on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mixdpo.errors import InputError

LEVEL = 0.95  # share of the resampled means inside an interval


_BLOCK = 2**22  # resampled indices held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap percentile interval; formatted, `mean [low, high]`."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(value, spec) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def paired_bootstrap(before: ArrayLike, after: ArrayLike, samples: int = 10_000) -> Interval:
    """Percentile interval of mean(after - before) (Efron & Tibshirani 1993, chapter 13).

    Items are resampled, each with both its scores, so that an item's difficulty cancels.

    Args:
        before: scores (N,) of the first system.
        after: scores (N,) of the second, item by item.
        samples: number of resamples.

    Raises:
        InputError: different lengths, no items, or a score that is not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(f"before {first.shape} and after {second.shape}: need two lists of one score per item")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("before or after holds a score that is not finite; leave that item out of both")
    values, rng, size = second - first, np.random.default_rng(0), len(first)
    rows = max(1, _BLOCK // size)
    blocks = [min(rows, samples - start) for start in range(0, samples, rows)]
    means = np.concatenate([values[rng.integers(size, size=(block, size))].mean(1) for block in blocks])
    return _interval(values, means)


def _interval(values: np.ndarray, means: np.ndarray) -> Interval:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def two_way_bootstrap(differences: ArrayLike, samples: int = 10_000) -> Interval:
    """Percentile interval of the mean of values (S, N) of S seeds and N prompts: both are resampled, and a prompt keeps
    its values of all seeds, a seed those of all prompts (Owen 2007, "The pigeonhole bootstrap").

    With few seeds it is too narrow where seeds differ much: their part of the variance is (S - 1) / S of what it should
    be. What varies with neither alone is counted about three times over, which errs on the other side.

    Args:
        differences: scores, or differences of scores of two systems with the same seeds and prompts.
        samples: number of resamples.

    Raises:
        InputError: no table, an empty one, or a value that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"need a table of finite values, seeds by prompts, not one of shape {values.shape}")
    rng, (seeds, prompts) = np.random.default_rng(0), values.shape
    drawn_seeds = rng.integers(seeds, size=(samples, seeds))
    means = np.empty(samples)
    rows = max(1, _BLOCK // (prompts * seeds))
    for start in range(0, samples, rows):
        block = drawn_seeds[start : start + rows]
        of_seeds = values[block].mean(1)  # (block, N)
        drawn = rng.integers(prompts, size=of_seeds.shape)
        means[start : start + rows] = np.take_along_axis(of_seeds, drawn, 1).mean(1)
    return _interval(values, means)
