"""Scores -> the tokens to keep (Token Cleaning, arXiv 2502.01968): the best share, or all above a threshold."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from mixdpo.errors import InputError, choose_one

PIECE = 2**18
"""Scores that are read at one time."""


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
    where it is too small. min_keep then adds tokens. Beside the mask, scope global and a threshold need the memory of
    `PIECE` scores, however many there are: the scores are read piece by piece.

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
    scores, mask = np.asarray(scores), np.zeros(len(scores), dtype=bool)
    pieces = [slice(start, start + PIECE) for start in range(0, len(scores), PIECE)]
    threshold = selection.threshold

    def ranked(tokens: slice | np.ndarray) -> np.ndarray:
        """The scores; finite ones rank behind tokens that are kept always, so nothing below needs to know of these."""
        return scores[tokens] if always_keep is None else np.where(always_keep[tokens], np.inf, scores[tokens])

    for piece in pieces:
        if len(bad := piece.start + np.flatnonzero(~np.isfinite(scores[piece]))):
            raise InputError(f"the score of token {bad[0]} is {scores[bad[0]]}, not a finite number: check the scorer")
        if threshold is not None:
            mask[piece] = ranked(piece) > threshold
    if threshold is None and selection.scope == "global":
        always = 0 if always_keep is None else np.count_nonzero(always_keep)
        if count := max(round(selection.keep_ratio * len(scores)), always):
            cut = _mark_best(mask, ranked, pieces, count)
            threshold = cut if cut < np.inf else None
    elif threshold is None:
        for tokens in _groups(offsets, np.asarray(batch) if selection.scope == "batch" else None):
            group = ranked(tokens)
            if count := max(round(selection.keep_ratio * len(group)), np.count_nonzero(group == np.inf)):
                mask[tokens] = _best(group, count)
    wanted = np.minimum(selection.min_keep, np.diff(offsets))
    kept = np.array([np.count_nonzero(mask[start:end]) for start, end in pairwise(offsets)])
    for sample in np.flatnonzero(kept < wanted):  # its best tokens, which contain the ones kept so far
        tokens = slice(offsets[sample], offsets[sample + 1])
        mask[tokens] = _best(ranked(tokens), wanted[sample])
    return mask, threshold


def _groups(offsets: np.ndarray, batch: np.ndarray | None) -> Iterator[slice | np.ndarray]:
    """The tokens that are ranked together, of a sample or of a batch: as a slice, or as indices in file order."""
    if batch is None:
        yield from map(slice, offsets[:-1].tolist(), offsets[1:].tolist())
    else:
        of_token = np.repeat(batch, np.diff(offsets))
        tokens = np.argsort(of_token, kind="stable")
        yield from np.split(tokens, np.flatnonzero(np.diff(of_token[tokens])) + 1)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` >= 1 best of m scores, the earlier ones of equal scores."""
    cut = np.partition(scores, len(scores) - count)[len(scores) - count]
    mask = scores > cut
    mask[np.flatnonzero(scores == cut)[: count - np.count_nonzero(mask)]] = True
    return mask


def _mark_best(mask: np.ndarray, ranked: Callable[[slice], np.ndarray], pieces: list[slice], count: int) -> float:
    """Write `_best` of the pieces' scores together into `mask`; the lowest score kept. Only a piece is in memory.

    A histogram of the scores' 16 leading bits says in which bin the cut lies, a further one of that bin's scores where
    in this bin, and so on until all bits are known: two of them for float32.
    """
    cut = np.nan
    known = 0  # the leading bits of the cut's key
    for shift in range(8 * _keys(ranked(pieces[0])).itemsize - 16, -1, -16):
        sizes = np.zeros(2**16, dtype=np.int64)
        for piece in pieces:
            keys = _keys(ranked(piece)) >> shift
            sizes += np.bincount((keys[keys >> 16 == known] & 0xFFFF).astype(np.int64), minlength=2**16)
        at_least = np.cumsum(sizes[::-1])[::-1]
        place = np.flatnonzero(at_least >= count)[-1]
        count -= at_least[place] - sizes[place]  # those of the higher bins are all kept
        known = known << 16 | int(place)
    for piece in pieces:
        scores = ranked(piece)
        keys = _keys(scores)
        ties = np.flatnonzero(keys == known)[:count]
        mask[piece] = keys > known
        mask[piece][ties] = True
        cut, count = float(scores[ties[0]]) if len(ties) else cut, count - len(ties)
    return cut


def _keys(scores: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the scores, from the floats' bits; −0 has the key of 0."""
    scores = scores + 0.0  # integers become floats
    bits = scores.view(f"u{scores.itemsize}")
    sign = bits.dtype.type(1 << 8 * bits.itemsize - 1)
    return np.where(bits & sign, ~bits, bits | sign)
