"""The objectives: pure functions of per-completion log-probabilities, (B,) in and (B,) out.

Notation, as in the MixDPO paper (arXiv 2602.00954): s_w, s_l are the policy's summed log-probabilities of the chosen
and the rejected completion, r_w, r_l the reference's, h = s - r, Δ = h_w - h_l. The frozen dataclasses at the end
hold hyper-parameters and are what a YAML file names.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mixdpo.errors import InputError
from mixdpo.log_probs import SequenceLogProbs


def dpo(delta: Tensor, *, beta: float) -> Tensor:
    """−log σ(βΔ). Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    Args:
        delta: (B,) Δ, in nats.
    """
    return -logsigmoid(beta * delta)


def cdpo(delta: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): the label is wrong with probability ε. Mitchell 2023, "A note on DPO with noisy
    preferences"; the ε of the MixDPO LLaMA and Mistral set-ups. ε = 0 is `dpo`.

    Args:
        delta: (B,) Δ, in nats.
    """
    return (1 - label_smoothing) * dpo(delta, beta=beta) + label_smoothing * dpo(-delta, beta=beta)


def sft(chosen: SequenceLogProbs) -> Tensor:
    """−s_w / L_w: negative log-likelihood of the chosen response as a mean over its tokens, then one number per pair
    (not a mean over the tokens of the batch). MixDPO's loss of a hard pair. (B,)

    On cleaned tokens sum and length are weighted, −Σ w log p / Σ w, and a response that keeps nothing has loss 0.
    """
    return -chosen.sums / torch.where(chosen.lengths > 0, chosen.lengths, 1)


def log_ratio_difference(
    chosen: SequenceLogProbs,
    rejected: SequenceLogProbs,
    reference_chosen: SequenceLogProbs,
    reference_rejected: SequenceLogProbs,
) -> Tensor:
    """Δ = (s_w − r_w) − (s_l − r_l), in nats. (B,)"""
    return (chosen.sums - reference_chosen.sums) - (rejected.sums - reference_rejected.sums)


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation, with label smoothing (cDPO) when `label_smoothing` > 0.

    Args:
        beta: strength of the pull towards the reference, per nat of log-ratio. MixDPO's set-ups use 0.01 to 0.05.
        label_smoothing: ε, the assumed probability that a preference label is flipped; 0 to below 0.5.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise InputError(f"preference_loss.beta must be > 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"preference_loss.label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")

    def __call__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs,
        reference_chosen: SequenceLogProbs,
        reference_rejected: SequenceLogProbs,
    ) -> Tensor:
        delta = log_ratio_difference(chosen, rejected, reference_chosen, reference_rejected)
        return cdpo(delta, beta=self.beta, label_smoothing=self.label_smoothing)
