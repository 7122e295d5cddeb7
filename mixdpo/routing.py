"""Margins -> route: in which order pairs are trained, and which of them are hard (MixDPO, arXiv 2602.00954)."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixdpo.errors import InputError

Order = Literal["easy_to_hard", "shuffled"]


@dataclass(frozen=True)
class Route:
    """The plan of one run over N pairs, decided before training.

    Attributes:
        order: (N,) int64, indices of the pairs in training order.
        is_hard: (N,) bool in *data* order; True = SFT on the chosen response, False = preference loss.
        threshold: τ, in units of the margin. A pair outside the training data is hard when its margin is < τ.
        margins: (N,) float64 in data order.
        ordering: how `order` was made.
    """

    order: np.ndarray
    is_hard: np.ndarray
    threshold: float
    margins: np.ndarray
    ordering: Order

    def summary(self) -> dict[str, Any]:
        """What `route.json` says: threshold, counts, ties at the threshold, margin quantiles."""
        levels = [0, 5, 25, 50, 75, 95, 100]
        quantiles = np.percentile(self.margins, levels)
        return {
            "pairs": len(self.margins),
            "hard": int(self.is_hard.sum()),
            "hard_fraction": float(self.is_hard.mean()),
            "threshold": self.threshold,
            "ties_at_threshold": int((self.margins == self.threshold).sum()),
            "hard_at_threshold": int((self.is_hard & (self.margins == self.threshold)).sum()),
            "margin_quantiles": {f"{level}%": float(q) for level, q in zip(levels, quantiles, strict=True)},
            "order": self.ordering,
        }

    def fingerprint(self) -> str:
        """Of order and routes: what must be the same for a run to be continued."""
        return hashlib.sha256(self.order.tobytes() + self.is_hard.tobytes() + self.margins.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Routing:
    """How margins become routes.

    Args:
        threshold: τ; pairs with a margin below it are hard. Its unit is the data's: choose it from the quantiles.
        hard_fraction: share of the pairs that are hard, taken from the small margins. Give this or `threshold`; the
            other is null. 0 is plain preference training, 1 plain SFT.
        order: easy_to_hard sorts by margin, largest first (no shuffling), so that SFT comes last; shuffled is seeded.
    """

    threshold: float | None = None
    hard_fraction: float | None = 0.12
    order: Order = "easy_to_hard"

    def __post_init__(self) -> None:
        _check_options(self.threshold, self.hard_fraction)

    def plan(self, margins: np.ndarray, pair_ids: np.ndarray, *, seed: int) -> Route:
        return plan_route(margins, pair_ids, **vars(self), seed=seed)


def plan_route(
    margins: np.ndarray,
    pair_ids: np.ndarray,
    *,
    threshold: float | None = None,
    hard_fraction: float | None = None,
    order: Order = "easy_to_hard",
    seed: int = 0,
) -> Route:
    """Decide order and route of every pair from its margin alone.

    Exactly one of `threshold` and `hard_fraction` is given. `threshold` makes a pair hard when margin < τ, strictly.
    `hard_fraction` = f takes exactly round(f·N) pairs from the small-margin end; where the cut falls inside a block of
    equal margins, a hash of (pair id, seed) decides who is hard, so the choice never depends on the order of the rows.
    Ties are ordered by the same hash, hard ones last. The threshold then reported is the margin at the cut.

    Args:
        margins: (N,) finite; large = easy.
        pair_ids: (N,) int64.

    Raises:
        InputError: no pairs, margins that are not finite, both or none of the two options, an option out of range.
    """
    margins = np.asarray(margins, dtype=np.float64)
    _check(margins, threshold, hard_fraction)
    ties = np.array([_hash(pair_id, seed) for pair_id in pair_ids], dtype=np.uint64)
    easy_to_hard = np.lexsort((ties, -margins))
    if hard_fraction is not None:
        is_hard, threshold = _hardest(margins, easy_to_hard, round(hard_fraction * len(margins)))
    else:
        is_hard = margins < threshold
    by_hash = np.lexsort((np.asarray(pair_ids), ties))
    return Route(easy_to_hard if order == "easy_to_hard" else by_hash, is_hard, float(threshold), margins, order)


def _hardest(margins: np.ndarray, easy_to_hard: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The last `count` pairs of the order are hard. τ is the smallest easy margin, so that `< τ` repeats the cut on new
    pairs; if the cut splits a block of ties, the block's margin is τ and new pairs in it count as easy."""
    cut = len(margins) - count
    is_hard = np.zeros(len(margins), dtype=bool)
    is_hard[easy_to_hard[cut:]] = True
    threshold = margins[easy_to_hard[cut - 1]] if cut else np.nextafter(margins.max(), np.inf)
    return is_hard, float(threshold)


def _hash(pair_id: int, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{int(pair_id)}:{seed}".encode()).digest()[:8], "big")


def _check(margins: np.ndarray, threshold: float | None, hard_fraction: float | None) -> None:
    if not len(margins):
        raise InputError("there is no pair to route: the training data is empty")
    if not np.isfinite(margins).all():
        raise InputError(f"margin {int(np.flatnonzero(~np.isfinite(margins))[0])} is not finite; routing needs numbers")
    _check_options(threshold, hard_fraction)


def _check_options(threshold: float | None, hard_fraction: float | None) -> None:
    if (threshold is None) == (hard_fraction is None):
        raise InputError(
            f"routing: give exactly one of threshold ({threshold}) and hard_fraction ({hard_fraction}); on the command "
            "line --data.routing '{hard_fraction: 0.3, threshold: null}'"
        )
    if hard_fraction is not None and not 0 <= hard_fraction <= 1:
        raise InputError(f"routing.hard_fraction must lie in [0, 1], not {hard_fraction}")
    if threshold is not None and not np.isfinite(threshold):
        raise InputError(f"routing.threshold must be finite, not {threshold}; hard_fraction 0 or 1 means none or all")
