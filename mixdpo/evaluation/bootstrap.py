"""How sure is a difference? A bootstrap over the items that both systems were measured on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mixdpo.errors import InputError

_BLOCK = 2**22  # resampled indices held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of mean(after - before) (Efron & Tibshirani 1993, chapter 13).

    Items are resampled, each with both its scores, so that an item's difficulty cancels.

    Args:
        before: scores (N,) of the first system.
        after: scores (N,) of the second, item by item.
        samples: number of resamples.
        seed: of the resampling.
        level: share of the resampled means inside the interval.

    Raises:
        InputError: different lengths, no items, a score that is not finite, or an option out of range.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(f"before {first.shape} and after {second.shape}: need two lists of one score per item")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("before or after holds a score that is not finite; leave that item out of both")
    if samples < 1 or not 0 < level < 1:
        raise InputError(f"samples {samples}, level {level}: need samples >= 1 and 0 < level < 1")
    differences = second - first
    low, high = np.quantile(_resampled_means(differences, samples, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def _resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(samples,) means of N values drawn with replacement, in blocks of bounded memory."""
    rng, size = np.random.default_rng(seed), len(values)
    rows = max(1, _BLOCK // size)
    blocks = [min(rows, samples - start) for start in range(0, samples, rows)]
    return np.concatenate([values[rng.integers(size, size=(block, size))].mean(1) for block in blocks])
