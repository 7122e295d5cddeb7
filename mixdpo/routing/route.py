"""Margins -> route: in which order pairs are trained, and which of them are hard (MixDPO, arXiv 2602.00954)."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from jsonargparse.typing import PositiveInt

from mixdpo.errors import InputError, check_one_of, choose_one

Order = Literal[
    "easy_to_hard", "hard_to_easy", "shuffled", "bucketed", "paced", "interleaved", "preference_first", "sft_first"
]


Assignment = Literal["margin", "random", "inverted"]


HardAction = Literal["sft", "sft_rejected", "sft_both", "blend", "preference", "drop"]


EasyAction = Literal["preference", "drop"]


CHOICES = {"order": Order, "assignment": Assignment, "hard_action": HardAction, "easy_action": EasyAction}


QUANTILES = (0, 5, 25, 50, 75, 95, 100)


RANDOM_ORDERS = ("shuffled", "bucketed", "paced")


SFT_SIDES = {"sft": (0,), "sft_rejected": (1,), "sft_both": (0, 1), "blend": (0,)}
"""Hard action -> the responses of a pair that SFT learns: 0 chosen, 1 rejected."""


@dataclass(frozen=True)
class Routing:
    """How margins become routes.

    Args:
        threshold: τ; pairs with a margin below τ are hard. The unit is that of the data's margins: choose τ from the
            margin quantiles.
        hard_fraction: share of the pairs that are hard, smallest margins first; 0 is plain preference training, 1 plain
            SFT. Give `hard_fraction` or `threshold`, not both; without either, hard_fraction is 0.12. Either one on
            the command line replaces the other one in a config.
        order: easy_to_hard sorts by margin, largest first (no shuffling), so that SFT comes last; hard_to_easy is
            the reverse; shuffled is seeded; bucketed goes from easy to hard in `buckets` quantiles, shuffled inside;
            paced draws from each quantile with replacement, at first from its easiest pairs, later from ever more of
            them, so an epoch does not train every pair (`coverage` in route.json says what share); interleaved spreads
            the hard pairs evenly among the sorted easy ones; preference_first and sft_first train the easy pairs first
            or the hard ones, each sorted from easy to hard.
        buckets: number of quantiles of the orders bucketed and paced.
        reshuffle: shuffle or draw each epoch anew; false repeats the same order. Only for the orders shuffled, bucketed
            and paced.
        assignment: which pairs are hard: those with the smallest margins (margin) or, as controls, the same number at
            random by a hash of pair id and seed (random), or with the largest margins (inverted).
        hard_action: what hard pairs are trained by: SFT on the chosen response, on the rejected one or on both, the
            preference loss (they are still reported as hard), or nothing (drop). blend trains every pair, also easy
            ones, by both losses: g times the preference loss plus 1 − g times the SFT loss, g = σ((m − τ)/T).
        easy_action: what easy pairs are trained by: the preference loss, or nothing (drop).
        blend_width: T of the hard action blend, in the unit of the margin. 0 is the hard action sft.
        blend_floor: share below which a blend leaves a loss out: pairs with g below it are trained by SFT
            alone, pairs with g above 1 − blend_floor by the preference loss alone.
    """

    threshold: float | None = None
    hard_fraction: float | None = None
    order: Order = "easy_to_hard"
    buckets: PositiveInt = 4
    reshuffle: bool = False
    assignment: Assignment = "margin"
    hard_action: HardAction = "sft"
    easy_action: EasyAction = "preference"
    blend_width: float | None = None
    blend_floor: float = 0.01

    def __post_init__(self) -> None:
        choose_one(self, "data.routing", "hard_fraction", 0.12, "threshold")
        if not 0 <= (self.hard_fraction or 0) <= 1:
            raise InputError(f"routing.hard_fraction must lie in [0, 1], not be {self.hard_fraction}")
        if not np.isfinite(self.threshold or 0):
            raise InputError(f"routing.threshold must be finite, not {self.threshold}")
        for name, kind in CHOICES.items():
            check_one_of(f"routing.{name}", getattr(self, name), get_args(kind))
        if self.reshuffle and self.order not in RANDOM_ORDERS:
            raise InputError(f"routing.reshuffle needs the order {' or '.join(RANDOM_ORDERS)}, not {self.order}")
        if not (0 <= (self.blend_width or 0) < np.inf and 0 <= self.blend_floor < 0.5):
            found = f"{self.blend_width} and {self.blend_floor}"
            raise InputError(f"routing.blend_width must be >= 0 and blend_floor in [0, 0.5), not {found}")
        blends, others = self.hard_action == "blend", (self.assignment, self.easy_action) != ("margin", "preference")
        if blends != (self.blend_width is not None) or (blends and others):
            needs = "needs a blend_width (in units of the margin), assignment margin and easy_action preference"
            raise InputError(f"routing.hard_action blend {needs}: give these, or hard_action sft and no blend_width")

    @property
    def by_margin(self) -> bool:
        """Whether margins decide anything. They do not in a shuffled order, if all pairs, no pairs or random pairs are
        hard and none is blended."""
        one_route = self.hard_fraction in (0, 1) and self.hard_action != "blend"
        return self.order != "shuffled" or not (one_route or (self.threshold is None and self.assignment == "random"))

    def plan(self, margins: np.ndarray, pair_ids: np.ndarray, *, seed: int = 0) -> "Route":
        """Decide order and route of every pair from its margin and id alone: the order of the rows decides nothing.

        `threshold` makes a pair hard when margin < τ, strictly. `hard_fraction` = f takes exactly round(f·N) pairs from
        the small-margin end. Where the cut falls inside a block of equal margins, a hash of (pair id, seed) decides
        which pairs are hard. Ties are ordered by the same hash, hard pairs last. The reported threshold is then the
        margin at the cut.

        Args:
            margins: (N,) finite, N > 0; large = easy. All NaN where the data has no margins and `by_margin` is False.
            pair_ids: (N,) int64.

        Raises:
            InputError: no pair would be trained, fewer pairs than buckets would be, or a margin is not finite.
        """
        margins, pair_ids = np.asarray(margins, dtype=np.float64), np.asarray(pair_ids)
        if not np.isfinite(margins).all() and (self.by_margin or not np.isnan(margins).all()):
            raise InputError(f"margin {np.flatnonzero(~np.isfinite(margins))[0]} (from 0) is not finite: correct it")
        easy_to_hard = np.lexsort((_hashes(pair_ids, seed), -margins))
        if self.threshold is not None:
            threshold, count = self.threshold, int((margins < self.threshold).sum())
        else:
            count = round(self.hard_fraction * len(margins))
            # the smallest easy margin, so that `< τ` repeats the cut on new pairs; those of a split block count as easy
            easiest, cut = margins[easy_to_hard], len(margins) - count
            threshold = easiest[cut - 1] if cut else np.nextafter(easiest[0], np.inf)
        hard_last = easy_to_hard[::-1] if self.assignment == "inverted" else easy_to_hard
        if self.assignment == "random":
            hard_last = np.lexsort((pair_ids, _hashes(pair_ids, seed, "assignment")))
        is_hard = np.zeros(len(margins), dtype=bool)
        is_hard[hard_last[len(margins) - count :]] = True
        dropped = (self.hard_action == "drop") & is_hard | (self.easy_action == "drop") & ~is_hard
        trained = easy_to_hard[~dropped[easy_to_hard]]
        least = self.buckets if self.order in ("bucketed", "paced") else 1
        if len(trained) < least:
            trains = f"routing would train {len(trained)} of {len(margins)} pairs, of which {count} are hard"
            raise InputError(f"{trains}, and needs at least {least}: change hard_action, easy_action or buckets")
        return Route(*_arrange(self, trained, is_hard), is_hard, float(threshold), margins, pair_ids, self, seed)


@dataclass(frozen=True)
class Route:
    """The plan of one run over N pairs, decided before training.

    Attributes:
        arranged: (n,) int64, indices of the n ≤ N pairs that can be trained, before anything is shuffled or drawn.
        stages: (n,) int64, rising from 0: the stage (bucket, or part of one route) of each place in the order.
        is_hard: (N,) bool in *data* order, pairs reported as hard. `routing.hard_action` says how they are trained.
        threshold: τ, in units of the margin, NaN where there are none. A pair outside the training data is hard when
            its margin is < τ, whatever `routing.assignment` is.
        margins: (N,) float64 in data order, all NaN where the data has none.
        pair_ids: (N,) int64 in data order.
        routing: the options that made the plan.
        seed: of everything random in the plan.
    """

    arranged: np.ndarray
    stages: np.ndarray
    is_hard: np.ndarray
    threshold: float
    margins: np.ndarray
    pair_ids: np.ndarray
    routing: Routing
    seed: int

    @property
    def preference_share(self) -> np.ndarray:
        """(N,) float64 in data order, g: a pair's loss is g times its preference loss plus 1 − g times its SFT loss.

        0 for hard pairs that SFT trains and 1 for all others. In a blend of width T > 0, g = σ((m − τ)/T); a g nearer
        to 0 or 1 than `blend_floor` is 0 or 1. For T → 0 this is the hard route, except at m = τ. The blend is ours.
        """
        if self.routing.hard_action != "blend" or not self.routing.blend_width:
            return 1.0 - (self.is_hard & (self.routing.hard_action in SFT_SIDES))
        share = np.exp(-np.logaddexp(0, (self.threshold - self.margins) / self.routing.blend_width))
        share[share < self.routing.blend_floor] = 0
        share[share > 1 - self.routing.blend_floor] = 1
        return share

    @property
    def is_sft(self) -> np.ndarray:
        """(N,) bool in data order, the pairs trained by SFT alone."""
        return self.preference_share == 0

    @property
    def sft_sides(self) -> tuple[int, ...]:
        """The responses of a pair that SFT learns: 0 chosen, 1 rejected."""
        return SFT_SIDES.get(self.routing.hard_action, (0,))

    @cached_property
    def order(self) -> np.ndarray:
        """(n,) int64, indices of the pairs as the first epoch trains them; of a paced order some come again."""
        return self.epoch_order(0)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(n,) int64, the order of epoch 0, 1, …. All are `order`, unless `routing.reshuffle`."""
        if self.routing.order not in RANDOM_ORDERS:
            return self.arranged
        draw = _paced if self.routing.order == "paced" else _shuffled
        return draw(self.arranged, self.stages, self.pair_ids, self.seed, epoch * self.routing.reshuffle)

    def summary(self) -> dict[str, Any]:
        """What `route.json` holds: threshold, counts, ties at the threshold, margin quantiles (of all; of easy and hard
        pairs), the order and actions; of a blend also how many pairs have both losses, and the mean of g. `trained`
        counts the pairs of the first epoch, and `coverage` is their share of those that it could train: below 1 where a
        paced order draws some again."""
        known, at_threshold = not np.isnan(self.margins).any(), self.margins == self.threshold
        groups = {"easy": self.margins[~self.is_hard], "hard": self.margins[self.is_hard]}
        groups = {name: group for name, group in groups.items() if len(group) and known}
        share, blend = self.preference_share, {}
        if self.routing.hard_action == "blend":
            blend = {name: getattr(self.routing, name) for name in ("blend_width", "blend_floor")}
            blend |= {"blended": int(((share > 0) & (share < 1)).sum()), "mean_preference_share": float(share.mean())}
        return {
            "pairs": len(self.margins),
            "hard": int(self.is_hard.sum()),
            "hard_fraction": float(self.is_hard.mean()),
            "trained": len(np.unique(self.order)),
            "coverage": len(np.unique(self.order)) / len(self.order),
            "sft": int(self.is_sft.sum()),
            "threshold": self.threshold if known else None,
            "ties_at_threshold": int(at_threshold.sum()),
            "hard_at_threshold": int((self.is_hard & at_threshold).sum()),
            "margin_quantiles": {f"{at}%": float(np.percentile(self.margins, at)) for at in QUANTILES if known},
            "margins_every_5%": {k: np.percentile(g, range(0, 101, 5)).tolist() for k, g in groups.items()},
            **{name: getattr(self.routing, name) for name in CHOICES},
            **blend,
        }

    def fingerprint(self) -> str:
        """16 hex digits of orders, routes and margins. A run is continued only where they are the same."""
        # the second epoch's order stands for the seed of all later ones
        arrays = (self.order, self.epoch_order(1), self.stages, self.is_hard, self.preference_share, self.margins)
        content = b"".join(array.tobytes() for array in arrays) + repr(self.sft_sides).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def _arrange(routing: Routing, trained: np.ndarray, is_hard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the trained pairs (n,) before any shuffling, and their stages (n,). `trained` goes from easy to hard."""
    hard, easy = trained[is_hard[trained]], trained[~is_hard[trained]]
    orders = {"hard_to_easy": trained[::-1], "interleaved": _interleaved(easy, hard)}
    orders |= {"preference_first": np.concatenate([easy, hard]), "sft_first": np.concatenate([hard, easy])}
    order = orders.get(routing.order, trained)
    stages = np.zeros(len(order), dtype=np.int64)
    if routing.order in ("bucketed", "paced"):
        stages = np.arange(len(order)) * routing.buckets // len(order)
    elif routing.order not in ("shuffled", "interleaved") and routing.hard_action != "preference":
        turns = np.flatnonzero(np.diff(is_hard[order]))
        if len(turns) == 1:  # random hard pairs in a sorted order alternate often: no stages
            stages[turns[0] + 1 :] = 1
    return order, stages


def _interleaved(easy: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Hard pair k of H among all N stands at ⌊(k + ½) N / H⌋: of any w neighbours ⌊w H / N⌋ or ⌈w H / N⌉ are hard."""
    k = np.arange(len(hard))
    places = (2 * k + 1) * (len(easy) + len(hard)) // (2 * max(len(hard), 1))
    return np.insert(easy, places - k, hard)  # `insert` counts the easy ones only


def _shuffled(order: np.ndarray, stages: np.ndarray, pair_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order with the pairs of each stage at random."""
    # other hashes than those that split ties: hard ones among ties would come last
    ids = pair_ids[order]
    return order[np.lexsort((ids, _hashes(ids, seed, "epoch", epoch), stages))]


def _paced(order: np.ndarray, stages: np.ndarray, pair_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Pairs drawn with replacement, easy ones from the start and hard ones later (Staged-Competence, arXiv 2605.26315).

    Place k of the n in a stage holds a pair drawn uniformly among the pairs of that stage with rank ≤ c(k), where
    c(k) = √((1 − c₀²) k/n + c₀²) and c₀ = 0.01. A pair's rank is the share of its stage that is easier: the easiest
    pair is open at once, and the hardest one at the end. The paper counts t and T in optimizer steps; k and n count
    pairs, so the batch size does not change what is drawn.
    """
    places, starts, sizes = np.arange(len(stages)), np.searchsorted(stages, stages), np.bincount(stages)[stages]
    done = (places - starts) / sizes
    is_open = np.floor(np.sqrt(done + 0.01**2 * (1 - done)) * sizes).astype(np.uint64) + np.uint64(1)
    return order[starts + (_hashes(places, seed, "draw", epoch) % is_open).astype(np.int64)]


def _hashes(pair_ids: np.ndarray, *of: Any) -> np.ndarray:
    """(N,) uint64, one hash of each pair id together with the values of `of`."""
    suffix = "".join(f":{value}" for value in of)
    digests = (hashlib.sha256(f"{int(pair_id)}{suffix}".encode()).digest() for pair_id in pair_ids)
    return np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)
