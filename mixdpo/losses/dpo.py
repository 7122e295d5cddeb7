"""DPO and its variants: −log σ of a difference of log-ratios.

Letters and arguments: `preference_loss`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mixdpo.losses.preference_loss import Pairs, PreferenceLoss


class DPO(PreferenceLoss, beta=0.1, label_smoothing=0.0):
    """−log σ(βΔ). Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With ε > 0, −(1−ε) log σ(βΔ) − ε log σ(−βΔ): MixDPO's set-ups for LLaMA and Mistral."""

    def loss(self, pairs: Pairs) -> Tensor:
        kept, flipped = -logsigmoid(self.beta * pairs.delta), -logsigmoid(-self.beta * pairs.delta)
        return (1 - self.label_smoothing) * kept + self.label_smoothing * flipped


class CDPO(DPO, label_smoothing=0.1):
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): DPO with labels that are flipped with probability ε. Mitchell 2023, "A note on
    DPO with noisy preferences". The same function as DPO, with another default."""


class Robust(PreferenceLoss, beta=0.1, label_smoothing=0.1):
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε). Chowdhury et al. 2024 (arXiv 2403.00409).

    The loss is unbiased under flipped labels, so it may be negative."""

    def loss(self, pairs: Pairs) -> Tensor:
        kept, flipped = -logsigmoid(self.beta * pairs.delta), -logsigmoid(-self.beta * pairs.delta)
        return ((1 - self.label_smoothing) * kept - self.label_smoothing * flipped) / (1 - 2 * self.label_smoothing)


class IRPO(PreferenceLoss, beta=0.1, nll_weight=1.0):
    """−log σ(βΔ) − α m_w: DPO + NLL. Pang et al. 2024 (arXiv 2404.19733)."""

    nll = "means"

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.delta) - self.nll_weight * pairs.m_w


class RDPO(PreferenceLoss, beta=0.1, length_penalty=0.05):
    """−log σ(βΔ + α (L_w − L_l)): what length explains need not be learnt. Park et al. 2024 (arXiv 2403.19159)."""

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.delta + self.length_penalty * (pairs.length_w - pairs.length_l))


class DPOP(PreferenceLoss, beta=0.3, drop_penalty=50.0):
    """−log σ(β (Δ − λ max(0, −h_w))). Pal et al. 2024 (arXiv 2402.13228).

    The chosen response may not become less likely than under the reference."""

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * (pairs.delta - self.drop_penalty * relu(-pairs.h_w)))


class DPONorm(PreferenceLoss, beta=5.0):
    """−log σ(β (h_w/L_w − h_l/L_l)): length-normalised DPO. Lambert et al. 2024 (Tülu 3, arXiv 2411.15124)."""

    averaged = True

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.mean_delta)


class LDDPO(PreferenceLoss, beta=0.1, tail_weight=0.5):
    """DPO with tokens past min(L_w, L_l) weighted α, under policy and reference. Liu et al. 2024 (arXiv 2409.06411)."""

    def loss(self, pairs: Pairs) -> Tensor:
        s_w, s_l, r_w, r_l = pairs.shared_sums
        shared = (s_w - r_w) - (s_l - r_l)
        return -logsigmoid(self.beta * (shared + self.tail_weight * (pairs.delta - shared)))


class HyPO(PreferenceLoss, beta=0.1):
    """−log σ(β (s_w − s_l − max(0, r_w − r_l))) = −log σ(β min(s_w − s_l, Δ)): the reference counts where it agrees
    with the label. HyPO 2026 (arXiv 2602.11902). β is ours: only the abstract was read, and no code found."""

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * torch.minimum(pairs.s_w - pairs.s_l, pairs.delta))


class ODPO(PreferenceLoss, beta=0.1, offset_weight=1.0):
    """−log σ(βΔ − α ln ρ): DPO with an offset. Amini et al. 2024 (arXiv 2402.10571).

    ρ is clamped to at least 1e-6: a pair without a positive margin has next to no loss, as in the equation's limit. A
    margin below 1 lowers the bar, so ρ has to be in a unit in which 1 is little."""

    needs_margin = "raw"

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.delta - self.offset_weight * pairs.margin.clamp(min=1e-6).log())


class MADPO(PreferenceLoss, beta=0.1, largest_factor=2.0, smallest_factor=0.5, steepness=1.0, neutral_margin=2.0):
    """−v log σ(βΔ): a small positive margin weighs more than a large one. MADPO 2025 (arXiv 2510.05342).

    v = σ(cρ)/σ(ρ) where ρ > −τ, else 1; c = c_min + (c_max − c_min) / (1 + (c_max − 1)/(1 − c_min) e^{λ(|ρ| − τ)}), so
    that c and v are 1 at |ρ| = τ. The defaults are for margins of a reward model."""

    needs_margin = "raw"

    def loss(self, pairs: Pairs) -> Tensor:
        most, least, margin = self.largest_factor, self.smallest_factor, pairs.margin
        fall = (most - 1) / (1 - least) * torch.exp(self.steepness * (margin.abs() - self.neutral_margin))
        factor = least + (most - least) / (1 + fall)
        weight = torch.exp(logsigmoid(factor * margin) - logsigmoid(margin))
        return torch.where(margin > -self.neutral_margin, weight, 1.0) * -logsigmoid(self.beta * pairs.delta)
