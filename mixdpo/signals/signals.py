"""Difficulty signals: a model and a batch of pairs -> margins (B,), oriented so that small = hard.

A signal is a frozen dataclass that a YAML file names. `needs` names what computes the signal: the "policy" (a base,
with an adapter or without), an "adapter" and its base, a "reward model", or only the "rating" in the data.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jsonargparse.typing import PositiveFloat
from torch import Tensor

from mixdpo.batches.batch import Batch
from mixdpo.model.adapters import role
from mixdpo.model.forward import predicting_states, row_log_probs, summed
from mixdpo.model.fused_head import run_sums

Needs = Literal["policy", "adapter", "reward model", "rating"]


@dataclass(frozen=True)
class PolicyLogProb:
    """0.1 (s_w − s_l), in nats, without a reference. The loss −log σ of this margin puts pairs in the same order.

    Args:
        normalised: Means per token, 0.1 (m_w − m_l), instead of sums.
    """

    normalised: bool = False
    needs: ClassVar[Needs] = "policy"

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        policy = summed(row_log_probs(model, batch.rows, exact=True), batch.rows)
        chosen, rejected = (policy.means if self.normalised else policy.sums).chunk(2)
        return 0.1 * (chosen - rejected)


@dataclass(frozen=True)
class ImplicitReward:
    """β Δ, the implicit-reward margin (Rafailov et al. 2023, arXiv 2305.18290) of a given adapter against its base.

    Args:
        beta: Scale of the margin, per nat of log-ratio.
    """

    beta: PositiveFloat = 0.1
    needs: ClassVar[Needs] = "adapter"

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        policy = summed(row_log_probs(model, batch.rows, exact=True), batch.rows).sums
        with role(model, "base"):
            chosen, rejected = (policy - summed(row_log_probs(model, batch.rows, exact=True), batch.rows).sums).chunk(2)
        return self.beta * (chosen - rejected)


@dataclass(frozen=True)
class CHES:
    """−CHES: ‖Σh_w‖² − ⟨Σh_w, Σh_l⟩ of hidden states (Razin et al. 2024, arXiv 2410.08847). Similar responses have a
    large CHES and are hard; a small margin means hard, so the sign is turned.

    Args:
        normalised: Means of hidden states instead of sums: the terms are divided by L_w·L_l and L_w².
    """

    normalised: bool = False
    needs: ClassVar[Needs] = "policy"

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        states, rows = predicting_states(model, batch.rows), batch.rows
        sums = run_sums(states, rows.runs, len(rows.lengths))
        chosen, rejected = (sums / rows.lengths[:, None] if self.normalised else sums).chunk(2)
        return ((chosen - rejected) * chosen).sum(-1)  # the difference first: of two like numbers of order 1e8


@dataclass(frozen=True)
class RewardModel:
    """Score of the chosen minus that of the rejected response by `model.base`, a sequence classifier with one label.

    Each response goes behind its prompt, alone and unpadded, through the model's own forward, so attention and pooling
    are the model's.
    """

    needs: ClassVar[Needs] = "reward model"

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        scores = [model(input_ids=ids[None]).logits.double().reshape(()) for ids in batch.rows.sequences()]
        return torch.stack(scores[::2]) - torch.stack(scores[1::2])


@dataclass(frozen=True)
class Rating:
    """The margin in the data, to compare other signals with. No model is loaded."""

    needs: ClassVar[Needs] = "rating"

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        return batch.margin
