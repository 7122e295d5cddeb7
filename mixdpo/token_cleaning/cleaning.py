"""What a YAML file says about token cleaning: how tokens are scored, which are kept, against which reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jsonargparse import lazy_instance

from mixdpo.batches.token_pool import TokenPool
from mixdpo.errors import InputError, check_one_of
from mixdpo.model.adapters import Role
from mixdpo.model.loading import load_tokenizer
from mixdpo.storage.identity import described
from mixdpo.token_cleaning.scorers import READABLE, ExcessLoss, TokenStatistics, is_online
from mixdpo.token_cleaning.selection import Kept, Selection, select

Scorer = Callable[[TokenStatistics], Any]


@dataclass(frozen=True)
class Cleaning:
    """SFT on the response tokens that matter (Token Cleaning, arXiv 2502.01968).

    Args:
        scorer: Class path of what scores tokens, high = keep: ExcessLoss, Loss, Probability, Random of
            mixdpo.token_cleaning.scorers, or your own with the attribute `roles`.
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

    scorer: Scorer = lazy_instance(ExcessLoss)  # noqa: RUF009
    selection: Selection | None = Selection()  # noqa: RUF009
    reference: str | None = None
    reference_lr: float = 1e-4
    warm_up_stages: int = 0
    masks: str | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.scorer, "roles"):
            raise InputError(f"cleaning.scorer {self.scorer} needs an attribute `roles`: whose losses it reads")
        for role in self.scorer.roles:
            check_one_of("the role of a scorer", role, READABLE)
        if is_online(self.scorer) and self.masks is not None:
            raise InputError(f"cleaning.masks replaces scores, which {self.scorer} makes in each step: give one")
        ranks_all = self.selection is not None and self.selection.keep_ratio and self.selection.scope == "global"
        if is_online(self.scorer) and ranks_all:
            raise InputError(
                f"cleaning.selection: scope global needs all scores before training, and {self.scorer} reads the "
                "policy of each step: use scope batch (the tokens of a micro-batch) or sample"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """Whose losses are needed: the scorer's, none where masks are given."""
        scorer: Any = self.scorer
        return () if self.masks is not None else tuple(scorer.roles)

    def describe(self) -> dict[str, str | None]:
        """Scorer and selection as stages.json names them."""
        if self.masks is not None:
            return {"scorer": f"masks of {self.masks}", "selection": None}
        return {"scorer": described(self.scorer), "selection": described(self.selection) if self.selection else None}

    def identity(self) -> dict[str, Any]:
        """What must stay for a run to be continued."""
        values = {"warm_up_stages": self.warm_up_stages, "reference": self.reference, "reference_lr": self.reference_lr}
        return self.describe() | values


def always_kept(selection: Selection | None, pool: TokenPool, tokenizer: str) -> np.ndarray:
    """(M,) bool, the pool's tokens that are kept whatever their score."""
    names = list(selection.always_keep) if selection else []
    if not names:
        return np.zeros(len(pool), dtype=bool)
    known = load_tokenizer(tokenizer).get_vocab()
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"cleaning.selection.always_keep: the tokenizer has no token {', '.join(map(repr, unknown))}")
    return np.isin(pool.target_ids(), [known[name] for name in names])


def weigh(
    selection: Selection | None,
    scores: np.ndarray,
    offsets: np.ndarray,
    *,
    batch: np.ndarray | None = None,
    always_keep: np.ndarray | None = None,
) -> tuple[np.ndarray, Kept | None]:
    """Scores -> weights (M,) float32 in the loss: 1 kept and 0 cut, or without a selection the score itself."""
    if selection is not None:
        kept = select(scores, offsets, selection, batch=batch, always_keep=always_keep)
        return kept.mask.astype(np.float32), kept
    if not (scores >= 0).all():
        raise InputError("cleaning.selection is null, so scores are weights, but some are negative or no numbers")
    return np.asarray(scores, dtype=np.float32), None
