"""Losses of log-ratios that have another shape than DPO.

Letters and arguments: `preference_loss`.
"""

from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from mixdpo.losses.preference_loss import Pairs, PreferenceLoss, Response


class IPO(PreferenceLoss, beta=0.1):
    """(h_w/L_w − h_l/L_l − 1/(2β))². Azar et al. 2023 (arXiv 2310.12036), eq. 17, averaged as its authors advise."""

    averaged, sft_weight = True, 7.0

    def __call__(self, *responses: Response) -> Tensor:
        return (Pairs(*responses).mean_delta - 1 / (2 * self.beta)) ** 2


class Hinge(PreferenceLoss, beta=0.05):
    """max(0, 1 − βΔ): RSO's hinge. Liu et al. 2023 (arXiv 2309.06657)."""

    def __call__(self, *responses: Response) -> Tensor:
        return relu(1 - self.beta * Pairs(*responses).delta)


class APOZero(PreferenceLoss, beta=0.1):
    """(1 − σ(βh_w)) + σ(βh_l). D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7."""

    def __call__(self, *responses: Response) -> Tensor:
        pairs = Pairs(*responses)
        return sigmoid(-self.beta * pairs.h_w) + sigmoid(self.beta * pairs.h_l)


class APODown(PreferenceLoss, beta=0.1):
    """σ(βh_w) + (1 − σ(βΔ)), for chosen responses worse than the model's own. D'Oosterlinck et al. 2024 (arXiv
    2408.06266), eq. 8."""

    def __call__(self, *responses: Response) -> Tensor:
        pairs = Pairs(*responses)
        return sigmoid(self.beta * pairs.h_w) + sigmoid(-self.beta * pairs.delta)


class SPPO(PreferenceLoss, beta=0.001):
    """(h_w − 1/(2β))² + (h_l + 1/(2β))². Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 and 0."""

    sft_weight = 2e5

    def __call__(self, *responses: Response) -> Tensor:
        pairs, target = Pairs(*responses), 1 / (2 * self.beta)
        return (pairs.h_w - target) ** 2 + (pairs.h_l + target) ** 2


class CalDPO(PreferenceLoss, beta=0.001):
    """−log σ(Δ) + (h_w − 1/(2β))² + (h_l + 1/(2β))². Xiao et al. 2024 (arXiv 2412.14516)."""

    sft_weight = 2e5

    def __call__(self, *responses: Response) -> Tensor:
        pairs, target = Pairs(*responses), 1 / (2 * self.beta)
        return -logsigmoid(pairs.delta) + ((pairs.h_w - target) ** 2 + (pairs.h_l + target) ** 2)
