"""Scores -> the tokens to keep (Token Cleaning, arXiv 2502.01968): the best share, or all above a threshold."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixdpo.errors import InputError, choose_one


@dataclass(frozen=True)
class Selection:
    """Which response tokens stay in the loss; high scores are kept.

    Args:
        keep_ratio: Share of the ranked tokens that is kept, in (0, 1]. Null without a threshold means the paper's 0.6;
            the paper's results change little from 0.3 to 0.8.
        threshold: Keep tokens with a score above this instead, so 0 keeps by sign. Give this or keep_ratio, not both.
            An option on the command line replaces the other one of a config.
        scope: What keep_ratio ranks over: all tokens scored together (the paper's method), each sample by itself (its
            RHO baseline), or the samples of a batch.
        min_keep: Every sample keeps at least this many of its best tokens, or all if the sample is shorter, even where
            keep_ratio would keep fewer.
        always_keep: Tokens that are kept whatever their score, such as <|im_end|>; they are part of keep_ratio.
    """

    keep_ratio: float | None = None
    threshold: float | None = None
    scope: Literal["global", "sample", "batch"] = "global"
    min_keep: int = 0
    always_keep: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        choose_one(self, "model.cleaning.selection", "keep_ratio", 0.6, "threshold")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise InputError(f"selection.keep_ratio must lie in (0, 1], not {self.keep_ratio}; 1 keeps every token")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise InputError(f"selection.threshold must be finite, not {self.threshold}: keep_ratio 1 keeps all tokens")


def select(
    scores: np.ndarray,
    offsets: np.ndarray,
    selection: Selection,
    *,
    batch: np.ndarray | None = None,
    always_keep: np.ndarray | None = None,
) -> tuple[np.ndarray, float | None]:
    """Decide for each of M tokens whether it is kept.

    keep_ratio k keeps exactly round(k·m) of a group's m tokens; of equal scores the earlier token goes first, as in a
    stable descending sort. Tokens to be kept always come before all others and use up the budget, but are all kept
    where it is too small. min_keep then adds tokens.

    Args:
        scores: (M,) finite, any float type, may be memory-mapped; high = keep.
        offsets: (N+1,) int64; the tokens of sample n are scores[offsets[n]:offsets[n+1]].
        batch: (N,) int, which batch each sample is in; needed for scope batch only.
        always_keep: (M,) bool, tokens that are kept whatever their score.

    Returns:
        (M,) bool, True = kept; and the threshold: the selection's own or, under scope global, the lowest score that
        the ranking keeps. None for other scopes, and where tokens that are kept always use up the budget.

    Raises:
        InputError: a score is not finite.
    """
    scores = np.asarray(scores)
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        raise InputError(f"the score of token {bad[0]} is {scores[bad[0]]}, not a finite number: check the scorer")
    if always_keep is not None:
        scores = np.where(always_keep, np.inf, scores)  # finite scores rank behind, so nothing below needs to know
    threshold = selection.threshold
    if threshold is not None:
        mask = scores > threshold
    else:
        mask = np.zeros(len(scores), dtype=bool)
        for tokens in _groups(offsets, selection.scope, batch):
            group = scores[tokens]
            if count := max(round(selection.keep_ratio * len(group)), np.count_nonzero(group == np.inf)):
                mask[tokens], cut = _best(group, count)
                threshold = float(cut) if selection.scope == "global" and cut < np.inf else None
    wanted = np.minimum(selection.min_keep, np.diff(offsets))
    kept = np.diff(np.searchsorted(np.flatnonzero(mask), offsets))
    for sample in np.flatnonzero(kept < wanted):  # its best tokens, which contain the ones kept so far
        tokens = slice(offsets[sample], offsets[sample + 1])
        mask[tokens], _ = _best(scores[tokens], wanted[sample])
    return mask, threshold


def _groups(offsets: np.ndarray, scope: str, batch: np.ndarray | None) -> Iterator[slice | np.ndarray]:
    """The tokens that are ranked together: as a slice, or as indices in file order."""
    if scope == "global":
        yield slice(0, int(offsets[-1]))
    elif scope == "sample":
        yield from map(slice, offsets[:-1].tolist(), offsets[1:].tolist())
    else:
        of_token = np.repeat(batch, np.diff(offsets))
        tokens = np.argsort(of_token, kind="stable")
        yield from np.split(tokens, np.flatnonzero(np.diff(of_token[tokens])) + 1)


def _best(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.floating]:
    """Mask of the `count` >= 1 best of m scores, the earlier ones of equal scores, and the lowest score kept."""
    cut = np.partition(scores, len(scores) - count)[len(scores) - count]
    mask = scores > cut
    mask[np.flatnonzero(scores == cut)[: count - np.count_nonzero(mask)]] = True
    return mask, cut
