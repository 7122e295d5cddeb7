"""Means over pairs, kept as sums and counts so that batches, devices and epochs of any size add up exactly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mixdpo.batches.batch import Batch
from mixdpo.model.fused_head import SequenceLogProbs


class NamedMeans(Metric):
    """Means by name, each over its own number of values; a name that got no value is left out of the result."""

    full_state_update = False

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, exclude_state: Any = "") -> "NamedMeans":
        # `.to(bfloat16)` moves the counts, but never rounds them
        return super()._apply(lambda t: fn(t).to(t.dtype), exclude_state)

    def update(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add values (B,) with weights (B,) under their names; a value of weight 0 is not read, NaN or not."""
        for name, (value, weight) in values.items():
            index, value, weight = self.names.index(name), value.detach().double(), weight.double()
            self.sums[index] += torch.where(weight > 0, value * weight, 0.0).sum()
            self.counts[index] += weight.sum()

    def compute(self) -> dict[str, Tensor]:
        counts = self.counts.tolist()
        return {name: self.sums[i] / self.counts[i] for i, name in enumerate(self.names) if counts[i] > 0}


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
PAIRWISE = (*REWARDS, "log_probs/chosen", "log_probs/rejected", "displacement/chosen")
LOSSES = ("train/loss", "train/preference_loss", "train/nll", "train/sft_loss", "train/hard_fraction")
TRAINING = (*LOSSES, "cleaning/kept_fraction", "cleaning/empty_fraction", *PAIRWISE)
MEASURED = ("preference_loss", "sft_loss", *PAIRWISE, "length_accuracy")
VALIDATION = tuple(f"val/{group}/{name}" for group in ("all", "easy", "hard") for name in MEASURED)


def pair_values(policy: SequenceLogProbs, reference: SequenceLogProbs | None, loss: Any) -> dict[str, Tensor]:
    """(E,) values of E pairs whose 2E responses stand chosen first, then rejected.

    rewards: β (s − r) in nats, or β s without a reference. s and r are a response's log-probabilities under policy and
    reference: sums over tokens, or means if the loss is `averaged`. β is the preference loss's own, or 1 for a loss
    without β. accuracy: `accuracy` of the rewards. log_probs: mean per token in nats, so that length has no effect.
    displacement, with a reference only: s − r of the chosen response, summed, in nats. A negative displacement means
    that the chosen response became less likely.
    """
    beta, averaged = float(getattr(loss, "beta", 1.0)), getattr(loss, "averaged", False)
    sums = policy.sums.detach()
    ratios = sums if reference is None else sums - reference.sums.detach()
    chosen, rejected = (beta * (ratios / policy.lengths if averaged else ratios)).chunk(2)
    values = chosen, rejected, chosen - rejected, accuracy(chosen, rejected), *(sums / policy.lengths).chunk(2)
    named = dict(zip(PAIRWISE[:-1], values, strict=True))  # the last one needs a reference
    return named if reference is None else named | {"displacement/chosen": ratios.chunk(2)[0]}


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,) from two (B,): 1 where the chosen response's value is the larger, ½ where both are equal. Of lengths, this
    is the accuracy of always picking the longer response: the baseline on length-biased pairs."""
    return (chosen > rejected).double() + 0.5 * (chosen == rejected).double()


def by_difficulty(values: Mapping[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """The same values three times, for all, easy and hard pairs: name → (values (B,), weights (B,))."""
    easy, weight = (~batch.is_hard).double(), batch.weight.double()
    groups = {"all": weight, "easy": weight * easy, "hard": weight * (1 - easy)}
    return {f"val/{group}/{name}": (value, w) for group, w in groups.items() for name, value in values.items()}
