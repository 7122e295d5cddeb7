"""The objectives as pure functions of B pairs, (B,) out.

In the letters of the papers: s summed log-probabilities under the policy, r under the reference, h = s − r, L the
length in tokens, m = s / L, Δ = h_w − h_l; _w of the chosen response, _l of the rejected one. All in nats.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_gather_object, get_rank, get_world_size, is_available, is_initialized
from torch.nn.functional import logsigmoid, relu

from mixdpo.model.fused_head import SequenceLogProbs


class Pairs:
    """B pairs in the letters of the equations, each (B,): sums s, means m, lengths, log-ratios h and their difference.

    Args:
        chosen, rejected: the policy's.
        reference_chosen, reference_rejected: not given to losses without a reference, whose h is not there.
    """

    def __init__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs,
        reference_chosen: SequenceLogProbs | None = None,
        reference_rejected: SequenceLogProbs | None = None,
    ) -> None:
        self.s_w, self.s_l, self.m_w, self.m_l = chosen.sums, rejected.sums, chosen.means, rejected.means
        self.length_w, self.length_l = chosen.lengths.to(self.s_w), rejected.lengths.to(self.s_l)
        if reference_chosen is not None and reference_rejected is not None:
            self.h_w, self.h_l = self.s_w - reference_chosen.sums, self.s_l - reference_rejected.sums
            self.delta = self.h_w - self.h_l
            self.mean_delta = self.h_w / self.length_w - self.h_l / self.length_l
            self.shared_sums = [x.shared_sums for x in (chosen, rejected, reference_chosen, reference_rejected)]


def sft(chosen: SequenceLogProbs) -> Tensor:
    """−s_w / L_w: negative log-likelihood of the chosen response as a mean over its tokens, then one number per pair
    (not a mean over the tokens of the batch). MixDPO's loss of a hard pair. (B,)

    On cleaned tokens sum and length are weighted, −Σ w log p / Σ w, and a response that keeps nothing has loss 0.
    """
    return -chosen.means


def dpo(pairs: Pairs, *, beta: float | Tensor = 0.1) -> Tensor:
    """−log σ(βΔ). Rafailov et al. 2023 (arXiv 2305.18290), eq. 7."""
    return -logsigmoid(beta * pairs.delta)


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): DPO whose labels are flipped with probability ε. Mitchell 2023, "A note on DPO
    with noisy preferences"; MixDPO's LLaMA and Mistral set-ups. ε = 0 is `dpo`."""
    return (1 - label_smoothing) * dpo(pairs, beta=beta) + label_smoothing * dpo(pairs, beta=-beta)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε): unbiased under flipped labels, so it may be negative. Chowdhury et
    al. 2024 (arXiv 2403.00409)."""
    kept, flipped = dpo(pairs, beta=beta), dpo(pairs, beta=-beta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """(h_w/L_w − h_l/L_l − 1/(2β))². Azar et al. 2023 (arXiv 2310.12036), eq. 17, averaged as its authors advise."""
    return (pairs.mean_delta - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: float = 0.05) -> Tensor:
    """max(0, 1 − βΔ). RSO's hinge: Liu et al. 2023 (arXiv 2309.06657)."""
    return relu(1 - beta * pairs.delta)


def slic(pairs: Pairs, *, delta: float = 1.0, nll_weight: float = 0.1) -> Tensor:
    """max(0, δ − s_w + s_l) − λ s_w. SLiC-HF: Zhao et al. 2023 (arXiv 2305.10425)."""
    return relu(delta - pairs.s_w + pairs.s_l) - nll_weight * pairs.s_w


def simpo(pairs: Pairs, *, beta: float = 2.0, gamma_ratio: float = 0.5) -> Tensor:
    """−log σ(β (m_w − m_l) − γ), in terms of γ/β. Meng et al. 2024 (arXiv 2405.14734), eq. 6."""
    return -logsigmoid(beta * (pairs.m_w - pairs.m_l - gamma_ratio))


def orpo(pairs: Pairs, *, odds_weight: float = 0.1) -> Tensor:
    """−m_w − λ log σ(o_w − o_l), o = m − log(1 − e^m) the log-odds. Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7.

    In o, m is clamped to at most −1e-6, where the odds would leave fp32: beyond, their gradient is 0."""
    m_w, m_l = pairs.m_w.clamp(max=-1e-6), pairs.m_l.clamp(max=-1e-6)
    log_odds = m_w - m_l - torch.log(torch.expm1(m_w) / torch.expm1(m_l))
    return -pairs.m_w - odds_weight * logsigmoid(log_odds)


def cpo(pairs: Pairs, *, beta: float = 0.1, nll_weight: float = 1.0) -> Tensor:
    """−log σ(β (s_w − s_l)) − λ m_w. Xu et al. 2024 (arXiv 2401.08417), whose λ term is summed, not a mean."""
    return -logsigmoid(beta * (pairs.s_w - pairs.s_l)) - nll_weight * pairs.m_w


def irpo(pairs: Pairs, *, beta: float = 0.1, nll_weight: float = 1.0) -> Tensor:
    """−log σ(βΔ) − α m_w: DPO + NLL. Pang et al. 2024 (arXiv 2404.19733)."""
    return dpo(pairs, beta=beta) - nll_weight * pairs.m_w


def rdpo(pairs: Pairs, *, beta: float = 0.1, length_penalty: float = 0.05) -> Tensor:
    """−log σ(βΔ + α (L_w − L_l)): what length explains need not be learnt. Park et al. 2024 (arXiv 2403.19159)."""
    return -logsigmoid(beta * pairs.delta + length_penalty * (pairs.length_w - pairs.length_l))


def dpop(pairs: Pairs, *, beta: float = 0.3, drop_penalty: float = 50.0) -> Tensor:
    """−log σ(β (Δ − λ max(0, −h_w))): the chosen response may not become less likely. Pal et al. 2024 (arXiv
    2402.13228)."""
    return -logsigmoid(beta * (pairs.delta - drop_penalty * relu(-pairs.h_w)))


def kto_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """½ [1 − σ(β(h_w − K_l)) + 1 − σ(β(K_w − h_l))], K = max(0, mean h) over the batch on all ranks, detached and
    crossed on purpose. Ethayarajh et al. 2024 (arXiv 2402.01306), paired. In validation: over its batches."""
    everywhere, _ = over_ranks(torch.stack([pairs.h_w, pairs.h_l], dim=-1))
    k_w, k_l = relu(everywhere.sum(0) / max(len(everywhere), 1))
    return (torch.sigmoid(beta * (k_l - pairs.h_w)) + torch.sigmoid(beta * (pairs.h_l - k_w))) / 2


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """(1 − σ(βh_w)) + σ(βh_l). D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7."""
    return torch.sigmoid(-beta * pairs.h_w) + torch.sigmoid(beta * pairs.h_l)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """σ(βh_w) + (1 − σ(βΔ)): for chosen responses worse than the model's own. As `apo_zero`, eq. 8."""
    return torch.sigmoid(beta * pairs.h_w) + torch.sigmoid(-beta * pairs.delta)


def sppo(pairs: Pairs, *, beta: float = 0.001) -> Tensor:
    """(h_w − 1/(2β))² + (h_l + 1/(2β))². Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 and 0."""
    return (pairs.h_w - 1 / (2 * beta)) ** 2 + (pairs.h_l + 1 / (2 * beta)) ** 2


def dpo_norm(pairs: Pairs, *, beta: float = 5.0) -> Tensor:
    """−log σ(β (h_w/L_w − h_l/L_l)): length-normalised DPO. Lambert et al. 2024 (Tülu 3, arXiv 2411.15124)."""
    return -logsigmoid(beta * pairs.mean_delta)


def ld_dpo(pairs: Pairs, *, beta: float = 0.1, tail_weight: float = 0.5) -> Tensor:
    """DPO with tokens past min(L_w, L_l) weighted α, under policy and reference. Liu et al. 2024 (arXiv 2409.06411)."""
    s_w, s_l, r_w, r_l = pairs.shared_sums
    shared = (s_w - r_w) - (s_l - r_l)
    return -logsigmoid(beta * (shared + tail_weight * (pairs.delta - shared)))


def cal_dpo(pairs: Pairs, *, beta: float = 0.001) -> Tensor:
    """−log σ(Δ) + (h_w − 1/(2β))² + (h_l + 1/(2β))². Xiao et al. 2024 (arXiv 2412.14516)."""
    return dpo(pairs, beta=1.0) + sppo(pairs, beta=beta)


def over_ranks(values: Tensor) -> tuple[Tensor, slice]:
    """The values (B, …) of all ranks, in their order and detached, (N, …), and where this rank's are. Every rank has to
    call it, with whatever B, 0 included."""
    values = values.detach()
    if not (is_available() and is_initialized()):
        return values, slice(0, len(values))
    pieces: list[Any] = [None] * get_world_size()
    all_gather_object(pieces, values.cpu())
    start = sum(len(piece) for piece in pieces[: get_rank()])
    return torch.cat(pieces).to(values.device), slice(start, start + len(values))


def beta_dpo(
    deltas: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor, *, beta: float, sensitivity: float
) -> tuple[Tensor, Tensor]:
    """β_b = max(1e-3, β₀ (1 + α (mean of the drawn Δ − M₀))), and which pairs are drawn: round(0.8 N), at least one,
    without replacement, with weight exp(−½((Δ − M₀)/s)²). Wu et al. 2024 (arXiv 2407.08639).

    Args:
        deltas: (N,) Δ of the batch on all ranks, at least one.
        mean, deviation: M₀ and s, moving averages that know this batch already.
        noise: (N,) uniform in [0, 1).
    """
    log_weight = -0.5 * ((deltas - mean) / deviation.clamp(min=1e-8)) ** 2
    best = (log_weight - torch.log(-torch.log(noise))).topk(max(1, round(0.8 * len(deltas)))).indices  # Gumbel top-k
    drawn = torch.zeros_like(deltas).index_fill(0, best, 1.0)
    return (beta * (1 + sensitivity * (deltas[best].mean() - mean))).clamp(min=1e-3), drawn
