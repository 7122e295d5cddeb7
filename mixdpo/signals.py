"""Difficulty signals: a model and a batch of pairs -> margins (B,), all oriented so that small = hard.

Pure functions of sums over completions come first; the frozen dataclasses are what a YAML file names. Each says in
`needs` what it is computed with: the "policy" (a base, with an adapter or without), an "adapter" and its base, a
"reward model", or only the "rating" that comes with the data. Table of signals: METHOD.md §1, after the MixDPO paper
(arXiv 2602.00954) and its configurations.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from mixdpo.adapters import role
from mixdpo.batching import CHOSEN, PROMPT, REJECTED, PairBatch, TokenRows
from mixdpo.errors import InputError
from mixdpo.models import predicting_states, sequence_log_probs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Needs = Literal["policy", "adapter", "reward model", "rating"]


def ches(chosen: Tensor, rejected: Tensor) -> Tensor:
    """⟨Σh_w, Σh_l⟩ − ‖Σh_w‖², large = hard: the centred hidden embedding similarity of Razin et al. 2024 (arXiv
    2410.08847, definition 2), how far training on the pair is expected to displace the chosen response's likelihood.

    Args:
        chosen, rejected: (B, H) sums of a completion's hidden states; means instead give the length-normalised form.
    """
    chosen, rejected = chosen.double(), rejected.double()  # a difference of like numbers of order 1e8
    return ((rejected - chosen) * chosen).sum(-1)


def state_sums(model: "PeftModel", rows: TokenRows) -> Tensor:
    """Σh of each of the 2B completions in `rows` (2B, H), summed in fp32 (fp64 for an fp64 model): the last-layer states
    from the last prompt token to the completion's last token but one, which predict the completion's tokens."""
    states = predicting_states(model, rows)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return states.new_zeros(len(rows.lengths), states.shape[-1]).index_add(0, rows.completion, states)


def rewards(model: "PreTrainedModel", rows: TokenRows) -> tuple[Tensor, Tensor]:
    """A reward model's scores of prompt + completion, chosen (B,) and rejected (B,).

    Every sequence goes alone and without padding through the model's own forward, so attention, pooling and pad token are
    the model's own. A causal classifier scores the last token that is not its pad token: the completion's last one,
    unless the model was made with its end token as pad token.
    """
    found: list[list[Tensor]] = [[], []]
    for ids, segments in zip(rows.input_ids, rows.segments, strict=True):
        for side, scores in zip((CHOSEN, REJECTED), found, strict=True):
            if (segments == side).any():  # a row that does not share its prompt holds one completion
                sequence = ids[(segments == PROMPT) | (segments == side)]
                scores.append(model(input_ids=sequence[None]).logits.double().reshape(()))
    return torch.stack(found[0]), torch.stack(found[1])


@dataclass(frozen=True)
class PolicyLogProb:
    """β (s_w − s_l), reference-free: how much likelier the policy finds the chosen response than the rejected one.

    METHOD's loss −log σ(0.1 (s_w − s_l)) falls as it grows, so both put pairs in one order.

    Args:
        beta: Scale of the margin, per nat.
    """

    beta: float = 0.1
    needs: ClassVar[Needs] = "policy"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, model: Any, batch: PairBatch) -> Tensor:
        chosen, rejected = sequence_log_probs(model, batch.rows, exact=True).sums.double().chunk(2)
        return self.beta * (chosen - rejected)


@dataclass(frozen=True)
class ImplicitReward:
    """β Δ, the implicit reward (Rafailov et al. 2023) of a given adapter, with its base as the reference.

    Args:
        beta: Scale of the margin, per nat of log-ratio.
    """

    beta: float = 0.1
    needs: ClassVar[Needs] = "adapter"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, model: Any, batch: PairBatch) -> Tensor:
        policy = sequence_log_probs(model, batch.rows, exact=True).sums.double()
        with role(model, "base"):
            chosen, rejected = (policy - sequence_log_probs(model, batch.rows, exact=True).sums.double()).chunk(2)
        return self.beta * (chosen - rejected)


@dataclass(frozen=True)
class CHES:
    """−CHES: the similarity of chosen and rejected response in the policy's hidden states, with its sign turned, because
    large is hard there and small is hard here (`ches`).

    Args:
        normalised: Use means of the hidden states instead of sums: the terms divided by L_w·L_l and L_w².
    """

    normalised: bool = False
    needs: ClassVar[Needs] = "policy"

    def __call__(self, model: Any, batch: PairBatch) -> Tensor:
        sums = state_sums(model, batch.rows)
        if self.normalised:
            sums = sums / batch.rows.lengths[:, None]
        return -ches(*sums.chunk(2))


@dataclass(frozen=True)
class RewardModel:
    """Score of the chosen response minus that of the rejected one under a sequence classifier with one label, which
    `model.base` names; its own tokenizer and chat template are used."""

    needs: ClassVar[Needs] = "reward model"

    def __call__(self, model: Any, batch: PairBatch) -> Tensor:
        chosen, rejected = rewards(model, batch.rows)
        return chosen - rejected


@dataclass(frozen=True)
class Rating:
    """The margin that the data brings along (`data.margin`), as a file to compare others with. No model is loaded."""

    needs: ClassVar[Needs] = "rating"

    def __call__(self, model: Any, batch: PairBatch) -> Tensor:
        return batch.margin


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise InputError(f"signal.beta must be > 0, not {beta}")
