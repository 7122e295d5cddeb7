"""The options of token cleaning in YAML: how tokens are scored, which tokens are kept, against which reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jsonargparse import lazy_instance

from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError, check_one_of
from mixdpo.model.adapters import Role
from mixdpo.model.loading import load_tokenizer
from mixdpo.storage.identity import described
from mixdpo.token_cleaning.scorers import READABLE, ExcessLoss, TokenStatistics, is_online
from mixdpo.token_cleaning.selection import Selection, select


@dataclass(frozen=True)
class Cleaning:
    """SFT on the response tokens that matter (Token Cleaning, arXiv 2502.01968).

    Args:
        scorer: Class path of the scorer of tokens, high = keep: ExcessLoss, Loss, Probability, Entropy, Column or
            Random of mixdpo.token_cleaning.scorers, or your own with the attribute `roles` and, if it reads more than
            losses, `needs` or `column`: `TokenStatistics` says what each is.
        selection: Which scores are kept: the best keep_ratio, or those above threshold. scope says what is ranked
            together: global (all tokens scored at one time), sample, or batch (an optimizer step; for a scorer that
            reads the policy, a micro-batch). Each sample keeps at least min_keep tokens. Tokens in the list always_keep
            are kept whatever their score. Null makes the score itself the token's weight.
        reference: PEFT folder or hub id of the cleaning_reference, the adapter that scores tokens. Null starts with a
            copy of the policy: give warm_up_stages and the callback RefreshReference then.
        reference_lr: Preference training without a `reference` fits one to the easy pairs' chosen responses, in one
            pass of AdamW at this learning rate.
        warm_up_stages: Number of first stages (slices) that are trained on every response token.
        masks: Folder RUN/cleaning of an earlier run on the same data and model: its weights instead of new scores.
    """

    scorer: Callable[[TokenStatistics], Any] = lazy_instance(ExcessLoss)  # noqa: RUF009
    selection: Selection | None = Selection()  # noqa: RUF009
    reference: str | None = None
    reference_lr: float = 1e-4
    warm_up_stages: int = 0
    masks: str | None = None

    def __post_init__(self) -> None:
        for role in getattr(self.scorer, "roles", [None]):
            check_one_of(f"a role in `roles` of {self.scorer}", role, READABLE)
        ranks_all = self.selection is not None and self.selection.keep_ratio and self.selection.scope == "global"
        if is_online(self.scorer) and (ranks_all or self.masks is not None):
            raise InputError(f"{self.scorer} reads the policy: give selection.scope batch or sample, no cleaning.masks")

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles whose losses are needed: the scorer's, or none where masks are given."""
        scorer: Any = self.scorer
        return () if self.masks is not None else tuple(scorer.roles)

    def describe(self) -> dict[str, str | None]:
        """Scorer and selection as stages.json names them."""
        if self.masks is not None:
            return {"scorer": f"masks of {self.masks}", "selection": None}
        return {"scorer": described(self.scorer), "selection": described(self.selection) if self.selection else None}

    def identity(self) -> dict[str, Any]:
        """Options that a continued run must have kept."""
        values = {"warm_up_stages": self.warm_up_stages, "reference": self.reference, "reference_lr": self.reference_lr}
        return self.describe() | values


def always_kept(selection: Selection | None, pool: TokenPool, tokenizer: str) -> np.ndarray:
    """(M,) bool, the pool's tokens that are kept whatever their score.

    Raises:
        InputError: the tokenizer lacks a named token.
    """
    if selection is None or not selection.always_keep:
        return np.zeros(len(pool), dtype=bool)
    known = load_tokenizer(tokenizer).get_vocab()
    if unknown := [name for name in selection.always_keep if name not in known]:
        raise InputError(f"cleaning.selection.always_keep: the tokenizer has no token {', '.join(map(repr, unknown))}")
    return np.isin(pool.target_ids(), [known[name] for name in selection.always_keep])


def column_scores(column: str, source: Any, split: str, pool: TokenPool) -> np.ndarray:
    """(M,) float32, what the data's column says of the pool's tokens: a row has a list with one number for each of its
    response tokens that are trained on, end tokens included, in order.

    Raises:
        InputError: a row has anything else; names the file and the row.
    """
    opened, scores = open_source(source, split), np.full(len(pool), np.nan, dtype=np.float32)
    samples: dict[int, list[int]] = {}  # of each row
    for index, number in enumerate(pool.samples["row"]):
        samples.setdefault(number, []).append(index)
    for number, place, row in opened.rows:
        if tokens := len(numbers := pool.tokens(samples.get(number, []))):
            given = row.get(column)
            if not isinstance(given, list) or {*map(type, given)} - {int, float, bool} or len(given) != tokens:
                found = f"{len(given)} values" if isinstance(given, list) else repr(given)
                fault = f"{column!r} should list {tokens} numbers, one for each response token, not {found:.80}"
                raise InputError(f"{opened.name}, {place}: {fault}: make it anew; drop cut rows by data.overlong")
            scores[numbers] = given
    return scores


def weigh(
    selection: Selection | None, scores: np.ndarray, offsets: np.ndarray, *, batch: np.ndarray, always_keep: np.ndarray
) -> tuple[np.ndarray, float | None]:
    """Scores -> weights (M,) float32 in the loss, and the threshold of `select`, which has the same arguments. Weights
    are 1 for kept and 0 for cut tokens. Without a selection the scores are the weights.

    Raises:
        InputError: a score is not finite or, without a selection, negative.
    """
    if selection is not None:
        mask, threshold = select(scores, offsets, selection, batch=batch, always_keep=always_keep)
        return mask.astype(np.float32), threshold
    if (np.isfinite(scores) & (scores >= 0)).all():
        return np.asarray(scores, dtype=np.float32), None
    raise InputError("selection is null, so scores are weights, but some are negative or infinite: give a selection")
