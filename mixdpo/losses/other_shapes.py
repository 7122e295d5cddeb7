"""Losses of another shape than DPO: first of log-ratios, then without a reference.

Letters and arguments: `preference_loss`.
"""

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from mixdpo.losses.preference_loss import Pairs, PreferenceLoss


class IPO(PreferenceLoss, beta=0.1):
    """(h_w/L_w − h_l/L_l − 1/(2β))². Azar et al. 2023 (arXiv 2310.12036), eq. 17, averaged as its authors advise."""

    averaged, sft_weight = True, 7.0

    def loss(self, pairs: Pairs) -> Tensor:
        return (pairs.mean_delta - 1 / (2 * self.beta)) ** 2


class Hinge(PreferenceLoss, beta=0.05):
    """max(0, 1 − βΔ): RSO's hinge. Liu et al. 2023 (arXiv 2309.06657)."""

    def loss(self, pairs: Pairs) -> Tensor:
        return relu(1 - self.beta * pairs.delta)


class APOZero(PreferenceLoss, beta=0.1):
    """(1 − σ(βh_w)) + σ(βh_l). D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7."""

    def loss(self, pairs: Pairs) -> Tensor:
        return sigmoid(-self.beta * pairs.h_w) + sigmoid(self.beta * pairs.h_l)


class APODown(PreferenceLoss, beta=0.1):
    """σ(βh_w) + (1 − σ(βΔ)), for chosen responses worse than the model's own. D'Oosterlinck et al. 2024 (arXiv
    2408.06266), eq. 8."""

    def loss(self, pairs: Pairs) -> Tensor:
        return sigmoid(self.beta * pairs.h_w) + sigmoid(-self.beta * pairs.delta)


class SPPO(PreferenceLoss, beta=0.001):
    """(h_w − 1/(2β))² + (h_l + 1/(2β))². Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 and 0."""

    sft_weight = 2e5

    def loss(self, pairs: Pairs) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pairs.h_w - target) ** 2 + (pairs.h_l + target) ** 2


class CalDPO(SPPO, beta=0.001):
    """−log σ(Δ) + (h_w − 1/(2β))² + (h_l + 1/(2β))². Xiao et al. 2024 (arXiv 2412.14516)."""

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(pairs.delta) + super().loss(pairs)


class SLiC(PreferenceLoss, delta=1.0, nll_weight=0.1):
    """max(0, δ − s_w + s_l) − λ s_w: SLiC-HF. Zhao et al. 2023 (arXiv 2305.10425)."""

    needs_reference, sft_weight, nll = False, 220.0, "sums"

    def loss(self, pairs: Pairs) -> Tensor:
        return relu(self.delta - pairs.s_w + pairs.s_l) - self.nll_weight * pairs.s_w


class SimPO(PreferenceLoss, beta=2.0, gamma_ratio=0.5):
    """−log σ(β (m_w − m_l) − γ), in terms of γ/β. Meng et al. 2024 (arXiv 2405.14734), eq. 6."""

    needs_reference, averaged = False, True

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * (pairs.m_w - pairs.m_l - self.gamma_ratio))


class ORPO(PreferenceLoss, odds_weight=0.1):
    """−m_w − λ log σ(o_w − o_l), o = m − log(1 − e^m) the log-odds. Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7.

    In o, m is clamped to at most −1e-6, where the odds would leave fp32. Beyond, their gradient is 0."""

    needs_reference, averaged, nll = False, True, "means"

    def loss(self, pairs: Pairs) -> Tensor:
        m_w, m_l = pairs.m_w.clamp(max=-1e-6), pairs.m_l.clamp(max=-1e-6)
        log_odds = m_w - m_l - torch.log(torch.expm1(m_w) / torch.expm1(m_l))
        return -pairs.m_w - self.odds_weight * logsigmoid(log_odds)


class CPO(PreferenceLoss, beta=0.1, nll_weight=1.0):
    """−log σ(β (s_w − s_l)) − λ m_w. Xu et al. 2024 (arXiv 2401.08417), where the λ term is a sum, not a mean."""

    needs_reference, nll = False, "means"

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * (pairs.s_w - pairs.s_l)) - self.nll_weight * pairs.m_w
