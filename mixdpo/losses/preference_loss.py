"""The arguments of preference losses, the code that the losses share, and their weighted sum.

The letters are those of the papers: s summed log-probability under the policy, r under the reference, h = s − r, L
length in tokens, m = s / L, Δ = h_w − h_l; _w of the chosen response, _l of the rejected one. All in nats. ρ is the
margin of the pair: of the data, or of `data.margins_file`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import cleandoc
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from mixdpo.errors import InputError
from mixdpo.model.fused_head import SequenceLogProbs
from mixdpo.storage.identity import described

Response: TypeAlias = SequenceLogProbs | Tensor

HYPER_PARAMETERS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "beta": ("> 0", lambda x: x > 0, "β; most losses: pull towards the reference, per nat. MixDPO's: 0.01 to 0.05."),
    "label_smoothing": ("in [0, 0.5)", lambda x: 0 <= x < 0.5, "ε, the assumed probability of a flipped label."),
    "gamma_ratio": (">= 0", lambda x: x >= 0, "γ/β, the margin aimed at, in nats per token."),
    "delta": (">= 0", lambda x: x >= 0, "δ, the margin aimed at, in nats."),
    "nll_weight": (">= 0", lambda x: x >= 0, "weight of the chosen response's log-likelihood (λ; IRPO's α)."),
    "odds_weight": (">= 0", lambda x: x >= 0, "λ, weight of the odds ratio against the log-likelihood."),
    "length_penalty": (">= 0", lambda x: x >= 0, "α, penalty per token of difference in length."),
    "drop_penalty": (">= 0", lambda x: x >= 0, "λ, penalty per nat that s_w falls below r_w."),
    "tail_weight": ("in [0, 1]", lambda x: 0 <= x <= 1, "α, weight of tokens past the shorter response."),
    "sensitivity": (">= 0", lambda x: x >= 0, "α, how much β follows the batch's mean log-ratio difference."),
    "offset_weight": (">= 0", lambda x: x >= 0, "α, what βΔ has to exceed per unit of ln ρ."),
    "largest_factor": ("> 1", lambda x: x > 1, "c_max, the factor on ρ that small margins come near to."),
    "smallest_factor": ("in [0, 1)", lambda x: 0 <= x < 1, "c_min, the factor on ρ that large margins come near to."),
    "steepness": (">= 0", lambda x: x >= 0, "λ, how fast the factor falls with the margin."),
    "neutral_margin": (">= 0", lambda x: x >= 0, "τ, the margin whose pair keeps weight 1."),
}
"""Every hyper-parameter: its range in words and as a test, and its line of `--help`."""


class PreferenceLoss:
    """The loss of pairs that are trained by preference.

    A loss is called on (chosen, rejected, reference_chosen, reference_rejected), each of B responses, and returns the
    losses (B,) of B pairs; B may be 0. Each argument is a `SequenceLogProbs`: sums (B,) in nats, fp64, lengths (B,) in
    tokens, means (B,). Gradients go through chosen and rejected; the reference has none. A plain tensor (B,) counts as
    the log-probabilities of one-token responses: sum and mean are the same.

    A loss of your own is any callable with these arguments, such as a torch module, which is converted to fp64. An
    attribute that the loss lacks has the value of this class. YAML names such a class by its class path:

        @dataclass(frozen=True)
        class Mine(PreferenceLoss):
            slope: float = 0.1

            def loss(self, pairs: Pairs) -> Tensor:
                return -logsigmoid(self.slope * pairs.delta)

    Attributes:
        needs_reference: False for a loss that is called on (chosen, rejected) only. No reference is then computed.
        averaged: The loss compares log-probabilities per token, and so does the logged reward.
        needs_margin: "raw" for a loss that is called with the keyword `margin` too: (B,) margins ρ of the pairs, fp64.
            "standardised": (ρ − mean) / standard deviation, both of all training pairs.
        nll: "means" or "sums" for a loss with a term −m_w or −s_w, which is logged as `train/nll` without its weight.
        batch_statistics: The loss takes means over the pairs of a call. Micro-batches of one pair are refused.
        sft_weight: Weight of a hard pair's SFT loss where `model.sft_weight` is null. 1 keeps the balance of the MixDPO
            paper, DPO at β = 0.01: at the start (h = 0) an easy pair pulls s_w with β/2 = 0.005, a hard one with 1/L.
            A loss of another size has the weight that keeps this balance, its pull at the start (default
            hyper-parameters, L = 280) over 0.005: IPO 1/(βL) → 7, SLiC 1 + λ → 220, SPPO and CalDPO 1/β → 2e5.
    """

    needs_reference, averaged, batch_statistics, sft_weight = True, False, False, 1.0
    needs_margin: Literal[False, "raw", "standardised"] = False
    nll: Literal[False, "means", "sums"] = False
    own: dict[str, float] = {}  # noqa: RUF012  # every subclass has its own
    """Hyper-parameters and their defaults, which apply where YAML gives none or null."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the hyper-parameters, fields that __init_subclass__ makes

    def __init_subclass__(cls, **own: float) -> None:
        """`class X(PreferenceLoss, beta=0.1)` is a frozen dataclass with a field `beta` that is None in the signature.
        (jsonargparse would hand a number on to another loss that a command line names: SPPO would train with DPO's β.)
        """
        if own:
            cls.own, cls.__annotations__ = cls.own | own, dict.fromkeys(own, float | None)
            lines = [f"    {name}: {HYPER_PARAMETERS[name][2]} {value} if null." for name, value in cls.own.items()]
            cls.__doc__ = "\n".join([cleandoc(cls.__doc__ or ""), "\nArgs:", *lines])
            for name in own:
                setattr(cls, name, None)
            dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for name, value in self.own.items():
            given = getattr(self, name)
            object.__setattr__(self, name, check_range(name, value if given is None else given))  # it is frozen

    def __call__(self, *responses: Response, margin: Tensor | None = None) -> Tensor:
        return self.loss(Pairs(*responses, margin=margin))

    def describe(self) -> str:
        """Name and hyper-parameters as text, the same in every process. A default that YAML may override has them only
        from the first call of a method on."""
        return described(self)


def check_range(name: str, value: float) -> float:
    """
    Raises:
        InputError: the value is not finite or is outside the range of this hyper-parameter.
    """
    words, holds, _ = HYPER_PARAMETERS[name]
    if not (holds(value) and isfinite(value)):
        raise InputError(f"preference_loss.{name} must be {words}, not {value}")
    return value


class Pairs:
    """B pairs in the letters of the equations, each (B,): sums s, means m, lengths, log-ratios h and their difference.

    Args:
        responses: the arguments of a loss. Without a reference there are no log-ratios.
        margin: (B,) ρ of the pairs, for a loss with `needs_margin`.
    """

    def __init__(self, *responses: Response, margin: Tensor | None = None) -> None:
        sides = [SequenceLogProbs(x, torch.ones_like(x), x) if isinstance(x, Tensor) else x for x in responses]
        chosen, rejected, *reference = sides
        self.s_w, self.s_l, self.m_w, self.m_l = chosen.sums, rejected.sums, chosen.means, rejected.means
        self.length_w, self.length_l = chosen.lengths.to(self.s_w), rejected.lengths.to(self.s_l)
        self.margin: Any = margin if margin is None else margin.to(self.s_w)
        if reference:
            self.h_w, self.h_l = self.s_w - reference[0].sums, self.s_l - reference[1].sums
            self.delta = self.h_w - self.h_l
            self.mean_delta = self.h_w / self.length_w - self.h_l / self.length_l
            self.shared_sums: Any = [side.shared_sums for side in sides]


class Sum(nn.Module, PreferenceLoss):
    """Σ weight · loss, of losses of the same pairs.

    A sum needs what any of its losses needs, and logs the NLL of the first loss that has one. Its `sft_weight` is
    Σ weight · `sft_weight`, because the pulls add up. Rewards are log-ratios without β, and per token if any of the
    losses is `averaged`.

    Args:
        losses: class path and hyper-parameters of each.
        weights: one number >= 0 for each loss, not all 0.

    Raises:
        InputError: the weights are not such numbers, or one loss needs raw margins and another standardised ones.
    """

    def __init__(self, losses: list[Callable[..., Any]], weights: list[float]) -> None:
        super().__init__()

        def each(name: str) -> list[Any]:
            return [getattr(loss, name, getattr(PreferenceLoss, name)) for loss in losses]

        if len(weights) != len(losses) or not all(isfinite(x) and x >= 0 for x in weights) or not any(weights):
            raise InputError(f"preference_loss.weights must be {len(losses)} numbers >= 0, not all 0, not {weights}")
        if {"raw", "standardised"} <= set(each("needs_margin")):
            raise InputError("preference_loss.losses need raw and standardised margins: sum losses of one kind")
        for name in ("needs_reference", "averaged", "batch_statistics", "needs_margin", "nll"):
            setattr(self, name, next(filter(None, each(name)), False))
        self.sft_weight = sum(weight * own for weight, own in zip(weights, each("sft_weight"), strict=True))
        self.parts = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))  # BetaDPO has buffers
        counts = (4 if reference else 2 for reference in each("needs_reference"))
        self.terms = list(zip(losses, weights, counts, each("needs_margin"), strict=True))

    def describe(self) -> str:
        return " + ".join(f"{x} {getattr(type(loss), 'describe', described)(loss)}" for loss, x, *_ in self.terms)

    def forward(self, *responses: Response, margin: Tensor | None = None) -> Tensor:
        values = [x * loss(*responses[:n], **({"margin": margin} if reads else {})) for loss, x, n, reads in self.terms]
        return torch.stack(values).sum(0)
