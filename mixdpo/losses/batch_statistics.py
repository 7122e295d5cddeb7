"""Losses that take means over the pairs of a micro-batch, on all devices. Letters and arguments: `preference_loss`."""

from typing import Any

import torch
from torch import Tensor, nn, sigmoid
from torch.distributed import all_gather_object, get_rank, get_world_size, is_available, is_initialized
from torch.nn.functional import logsigmoid, relu

from mixdpo.losses.preference_loss import Pairs, PreferenceLoss, Response, check_range


def over_ranks(values: Tensor) -> tuple[Tensor, slice]:
    """The values (B, …) of all ranks, in rank order and detached, (N, …), and the place of this rank's values. Every
    rank has to call this function; B may differ, and may be 0."""
    values = values.detach()
    if not (is_available() and is_initialized()):
        return values, slice(0, len(values))
    pieces: list[Any] = [None] * get_world_size()
    all_gather_object(pieces, values.cpu())
    start = sum(len(piece) for piece in pieces[: get_rank()])
    return torch.cat(pieces).to(values.device), slice(start, start + len(values))


class KTOPair(PreferenceLoss, beta=0.1):
    """½ [1 − σ(β(h_w − K_l)) + 1 − σ(β(K_w − h_l))]. Ethayarajh et al. 2024 (arXiv 2402.01306), paired.

    K = max(0, mean h) over the batch on all ranks, detached and crossed on purpose; of each batch in validation."""

    batch_statistics = True

    def loss(self, pairs: Pairs) -> Tensor:
        everywhere, _ = over_ranks(torch.stack([pairs.h_w, pairs.h_l], dim=-1))
        k_w, k_l = relu(everywhere.sum(0) / max(len(everywhere), 1))
        return (sigmoid(self.beta * (k_l - pairs.h_w)) + sigmoid(self.beta * (pairs.h_l - k_w))) / 2


class AMaPO(PreferenceLoss, beta=2.0):
    """−log σ(βx − γ), x = m_w − m_l; γ = β e^{μ(μ − x)/s} where x < μ, else 0: pairs below the mean have a margin to
    reach. AMaPO 2025 (arXiv 2511.09385), whose β is 2 to 3.

    μ and s are mean and sample deviation of x over the batch on all ranks; of each batch in validation. γ is detached.
    The exponent is clamped to at most 80. Where s is below 1e-8, as of a pair alone, γ is 0."""

    needs_reference, averaged, batch_statistics = False, True, True

    def loss(self, pairs: Pairs) -> Tensor:
        gap = pairs.m_w - pairs.m_l
        everywhere, _ = over_ranks(gap)
        mean = everywhere.sum() / max(len(everywhere), 1)
        variance = (everywhere - mean).square().sum() / max(len(everywhere) - 1, 1)
        deviation = variance.sqrt().clamp(min=1e-8)
        exponent = (mean * (mean - gap.detach()) / deviation).clamp(max=80)
        below = (gap < mean) & (deviation > 1e-8)  # of equal x rounding would decide
        return -logsigmoid(self.beta * (gap - torch.where(below, exponent.exp(), 0)))


class BetaDPO(nn.Module, PreferenceLoss):
    """−log σ(β_b Δ) of the pairs that are drawn, 0 of the others. Wu et al. 2024 (arXiv 2407.08639).

    β_b = max(1e-3, β₀ (1 + α (mean of the drawn Δ − M₀))). Of the batch's N pairs round(0.8 N), at least one, are drawn
    without replacement, with weight exp(−½((Δ − M₀)/s)²). M₀ and s are moving averages (0.9 old, 0.1 new; they start at
    0 and 1) of the batches' mean and deviation of Δ, and are kept in checkpoints. In validation β is β₀ and every pair
    counts.

    Args:
        beta: β₀, the strength at an average batch; 0.1 if null.
        sensitivity: α, how much β follows the batch's mean log-ratio difference; 0.6 if null.
    """

    batch_statistics = True

    def __init__(self, beta: float | None = None, sensitivity: float | None = None) -> None:
        super().__init__()
        self.beta = check_range("beta", 0.1 if beta is None else beta)
        self.sensitivity = check_range("sensitivity", 0.6 if sensitivity is None else sensitivity)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, sensitivity={self.sensitivity}"

    def forward(self, *responses: Response) -> Tensor:
        delta = Pairs(*responses).delta
        deltas, own = over_ranks(delta)
        if not (self.training and len(deltas)):
            return -logsigmoid(self.beta * delta)
        for average, new in ((self.mean, deltas.mean()), (self.deviation, deltas.std(correction=0))):
            new = new.to(average)
            average.copy_(torch.where(new.isfinite(), average.lerp(new, 0.1), average))  # NaN would stay in it
        self.batches += 1
        # of its own, so that all ranks draw alike and a resumed run draws on
        generator = torch.Generator().manual_seed((torch.initial_seed() + int(self.batches)) % 2**63)
        noise = torch.rand(len(deltas), generator=generator, dtype=torch.float64).to(deltas)
        best = self.draw(deltas, noise)
        beta = (self.beta * (1 + self.sensitivity * (deltas[best].mean() - self.mean))).clamp(min=1e-3)
        drawn = torch.zeros_like(deltas).index_fill(0, best, 1.0)
        return drawn[own] * -logsigmoid(beta * delta)

    def draw(self, deltas: Tensor, noise: Tensor) -> Tensor:
        """Positions of the drawn pairs, from Δ (N,) of all ranks and noise (N,), uniform in [0, 1): Gumbel top-k."""
        log_weight = -0.5 * ((deltas - self.mean) / self.deviation.clamp(min=1e-8)) ** 2
        return (log_weight - torch.log(-torch.log(noise))).topk(max(1, round(0.8 * len(deltas)))).indices
