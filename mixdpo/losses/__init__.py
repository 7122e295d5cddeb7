"""The objectives that YAML names: classes that hold hyper-parameters and call a pure function of `functions`.

All are called on (chosen, rejected, reference_chosen, reference_rejected), of B pairs each, and return (B,) losses. A
loss of your own is any callable class with that call. Sums of log-probabilities are in fp64; a torch module of your own
is converted to fp64 with its weights and buffers. A loss may have the attributes that these have:

needs_reference: false for a loss that is called on (chosen, rejected) only; no reference is then ever computed.
averaged: what the loss compares is per token, and so is the logged reward.
batch_statistics: it takes means over the pairs that it is called on, and is refused where that is one pair.
sft_weight: of a hard pair's SFT loss where `model.sft_weight` is null. 1, as in the MixDPO paper, whose balance is that
    of DPO at β = 0.01: at the start (h = 0) an easy pair pulls s_w with β/2 = 0.005, a hard one with 1/L. Losses that
    are of another size by construction have the weight that keeps this balance, their own pull at the start (default
    hyper-parameters, L = 280) over 0.005: ipo 1/(βL) → 7, slic 1 + λ → 220, sppo and cal_dpo 1/β → 2e5.
"""

from collections.abc import Callable
from dataclasses import make_dataclass
from inspect import signature
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mixdpo.errors import InputError
from mixdpo.losses import functions
from mixdpo.losses.functions import Pairs
from mixdpo.model.fused_head import SequenceLogProbs

OPTIONS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "beta": ("> 0", lambda x: x > 0, "β; most losses: pull towards the reference, per nat. MixDPO's: 0.01 to 0.05."),
    "label_smoothing": ("in [0, 0.5)", lambda x: 0 <= x < 0.5, "ε, the assumed probability of a flipped label."),
    "gamma_ratio": (">= 0", lambda x: x >= 0, "γ/β, the margin aimed at, in nats per token."),
    "delta": (">= 0", lambda x: x >= 0, "δ, the margin aimed at, in nats."),
    "nll_weight": (">= 0", lambda x: x >= 0, "weight of the chosen response's log-likelihood (λ; irpo's α)."),
    "odds_weight": (">= 0", lambda x: x >= 0, "λ, weight of the odds ratio against the log-likelihood."),
    "length_penalty": (">= 0", lambda x: x >= 0, "α, what a token of difference in length counts."),
    "drop_penalty": (">= 0", lambda x: x >= 0, "λ, what a chosen response below its reference costs."),
    "tail_weight": ("in [0, 1]", lambda x: 0 <= x <= 1, "α, of the tokens past the shorter response's length."),
    "sensitivity": (">= 0", lambda x: x >= 0, "α, how much β follows the batch's mean log-ratio difference."),
}
"""Every hyper-parameter: its range in words and as a test, and its line of `--help`."""


def check_options(**options: float) -> None:
    for name, value in options.items():
        words, holds, _ = OPTIONS[name]
        if not (holds(value) and isfinite(value)):
            raise InputError(f"preference_loss.{name} must be {words}, not {value}")


def objective(
    name: str,
    function: Callable[..., Tensor],
    *,
    needs_reference: bool = True,
    averaged: bool = False,
    batch_statistics: bool = False,
    sft_weight: float = 1.0,
    **defaults: float,
) -> type:
    """The frozen dataclass that holds a function's hyper-parameters and calls it on (chosen, rejected,
    reference_chosen, reference_rejected), the last two only if it needs a reference.

    A hyper-parameter that is not given, or None, is the loss's own. (Were it a number in the signature, jsonargparse
    would hand that number on when a command line names another loss: SPPO would train with DPO's β.)"""
    parameters = [p for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    own = {p.name: defaults.get(p.name, p.default) for p in parameters}
    described = "\n".join(f"    {name}: {OPTIONS[name][2]} {value} if null." for name, value in own.items())

    def options(self: Any) -> dict[str, float]:
        return {name: getattr(self, name) for name in own}

    def fill_in(self: Any) -> None:
        for name, value in options(self).items():
            object.__setattr__(self, name, own[name] if value is None else value)  # the dataclass is frozen
        check_options(**options(self))

    members = {
        "__module__": __name__,
        "__doc__": f"{function.__doc__}\n\nArgs:\n{described}\n",
        "__post_init__": fill_in,
        # not repr: called on a default that jsonargparse builds lazily, that says what was given, not what it is
        "describe": lambda self: f"{name}({', '.join(f'{key}={value}' for key, value in options(self).items())})",
        "__call__": lambda self, *sequences: function(Pairs(*sequences), **options(self)),
        **{"needs_reference": needs_reference, "averaged": averaged, "sft_weight": sft_weight},
        "batch_statistics": batch_statistics,
    }
    fields: Any = [(name, float | None, None) for name in own]
    return make_dataclass(name, fields, frozen=True, namespace=members)


DPO = objective("DPO", functions.cdpo, label_smoothing=0.0)


CDPO = objective("CDPO", functions.cdpo)


Robust = objective("Robust", functions.robust)


IPO = objective("IPO", functions.ipo, averaged=True, sft_weight=7.0)


Hinge = objective("Hinge", functions.hinge)


SLiC = objective("SLiC", functions.slic, needs_reference=False, sft_weight=220.0)


SimPO = objective("SimPO", functions.simpo, needs_reference=False, averaged=True)


ORPO = objective("ORPO", functions.orpo, needs_reference=False, averaged=True)


CPO = objective("CPO", functions.cpo, needs_reference=False)


IRPO = objective("IRPO", functions.irpo)


RDPO = objective("RDPO", functions.rdpo)


DPOP = objective("DPOP", functions.dpop)


KTOPair = objective("KTOPair", functions.kto_pair, batch_statistics=True)


APOZero = objective("APOZero", functions.apo_zero)


APODown = objective("APODown", functions.apo_down)


SPPO = objective("SPPO", functions.sppo, sft_weight=2e5)


DPONorm = objective("DPONorm", functions.dpo_norm, averaged=True)


LDDPO = objective("LDDPO", functions.ld_dpo)


CalDPO = objective("CalDPO", functions.cal_dpo, sft_weight=2e5)


class BetaDPO(nn.Module):
    """`dpo` with the β_b of `beta_dpo`; a pair that is not drawn has loss 0. Its moving averages (0.9 old, 0.1 new; M₀
    starts at 0, s at 1) over the batches are in checkpoints. In validation β is β₀ and every pair counts.

    Args:
        beta: β₀, the strength at an average batch; 0.1 if null.
        sensitivity: α, how much β follows the batch's mean log-ratio difference; 0.6 if null.
    """

    needs_reference, averaged, batch_statistics, sft_weight = True, False, True, 1.0

    def __init__(self, beta: float | None = None, sensitivity: float | None = None) -> None:
        super().__init__()
        beta, sensitivity = 0.1 if beta is None else beta, 0.6 if sensitivity is None else sensitivity
        check_options(beta=beta, sensitivity=sensitivity)
        self.beta, self.sensitivity = beta, sensitivity
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, sensitivity={self.sensitivity}"

    def forward(self, *sequences: SequenceLogProbs) -> Tensor:
        pairs = Pairs(*sequences)
        deltas, mine = functions.over_ranks(pairs.delta)
        if not (self.training and len(deltas)):
            return functions.dpo(pairs, beta=self.beta)
        for average, new in ((self.mean, deltas.mean()), (self.deviation, deltas.std(correction=0))):
            new = new.to(average)
            average.copy_(torch.where(new.isfinite(), average.lerp(new, 0.1), average))  # NaN would stay in it
        self.batches += 1
        # of its own, so that all ranks draw alike and a resumed run draws on
        generator = torch.Generator().manual_seed((torch.initial_seed() + int(self.batches)) % 2**63)
        noise = torch.rand(len(deltas), generator=generator, dtype=torch.float64).to(deltas)
        options = {"beta": self.beta, "sensitivity": self.sensitivity}
        beta, drawn = functions.beta_dpo(deltas, self.mean, self.deviation, noise, **options)
        return drawn[mine] * functions.dpo(pairs, beta=beta)
