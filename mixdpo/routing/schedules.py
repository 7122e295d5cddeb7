"""Learning-rate schedules that know about stages.

Sorting pairs easy → hard and routing the hard ones to SFT puts all SFT steps last, where cosine decay has almost
nothing left: 12 % of the steps get 0.36 % of the learning rate. So a schedule knows the stages of the run. Each
dataclass maps a `StepPlan` to one multiplier of the peak learning rate per optimizer step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jsonargparse.typing import ClosedUnitInterval


@dataclass(frozen=True)
class StepPlan:
    """What a schedule may know of a run of S optimizer steps.

    Attributes:
        sft_share: (S,) float64, share of the step's pairs that are trained by SFT.
        stage_starts: first step of each stage, starting with 0. A stage begins where the order turns to the other route
            or to the next bucket, and where an epoch of several stages begins.
    """

    sft_share: np.ndarray
    stage_starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.sft_share)

    @classmethod
    def of_epochs(cls, epochs: Sequence["StepPlan"], total: int) -> "StepPlan":
        """The epochs one after the other, cut after `total` steps. Epochs of one stage each make one stage together."""
        sft_share = np.concatenate([epoch.sft_share for epoch in epochs])[:total]
        if all(epoch.stage_starts == (0,) for epoch in epochs):
            return cls(sft_share)
        begins = np.cumsum([0, *map(len, epochs)]).tolist()
        starts = (begin + start for begin, epoch in zip(begins, epochs, strict=False) for start in epoch.stage_starts)
        return cls(sft_share, tuple(start for start in starts if start < total))


@dataclass(frozen=True)
class Constant:
    """Warm up, then stay at the peak.

    Args:
        warmup: share of the run's steps over which the rate rises linearly.
    """

    warmup: ClosedUnitInterval = 0.1

    def __call__(self, plan: StepPlan) -> np.ndarray:
        rise = _rise(len(plan), self.warmup)
        return np.concatenate([rise, np.ones(len(plan) - len(rise))])


@dataclass(frozen=True)
class Cosine:
    """Warm up, then decay along half a cosine over the whole run: MixDPO's schedule, which starves the SFT stage.

    Args:
        warmup: share of the run's steps over which the rate rises linearly.
        floor: multiplier that the decay ends at, 0 to 1.
    """

    warmup: ClosedUnitInterval = 0.1
    floor: ClosedUnitInterval = 0.0

    def __call__(self, plan: StepPlan) -> np.ndarray:
        return self.decayed(len(plan))

    def decayed(self, steps: int) -> np.ndarray:
        """(steps,) multipliers of one warm-up and decay."""
        rise = _rise(steps, self.warmup)
        progress = np.arange(steps - len(rise)) / max(steps - len(rise), 1)
        return np.concatenate([rise, self.floor + (1 - self.floor) * self.shape(progress)])

    def shape(self, progress: np.ndarray) -> np.ndarray:
        """Progress through the decay, 0 to 1 -> share of the rate that is left, 1 to 0."""
        return 0.5 * (1 + np.cos(np.pi * progress))


class Linear(Cosine):
    """Warm up, then decay along a straight line over the whole run: Token Cleaning's schedule.

    Args:
        warmup: share of the run's steps over which the rate rises linearly.
        floor: multiplier that the decay ends at, 0 to 1.
    """

    def shape(self, progress: np.ndarray) -> np.ndarray:
        return 1 - progress


class StagedCosine(Cosine):
    """A warm-up and a cosine of its own for each stage, so that the SFT stage trains at the full rate as well.

    Args:
        warmup: share of each stage's steps over which the rate rises linearly.
        floor: multiplier that each decay ends at, 0 to 1.
    """

    def __call__(self, plan: StepPlan) -> np.ndarray:
        return np.concatenate([self.decayed(steps) for steps in np.diff([*plan.stage_starts, len(plan)])])


class StagedLinear(StagedCosine, Linear):
    """A warm-up and a straight line down for each stage, as if the trainer was restarted with every slice.

    Args:
        warmup: share of each stage's steps over which the rate rises linearly.
        floor: multiplier that each decay ends at, 0 to 1.
    """


def learning_rate_mass(multipliers: np.ndarray, sft_share: np.ndarray) -> dict[str, float]:
    """Share of the summed learning rate that each route receives; the two add up to 1.

    Args:
        multipliers: (S,) multipliers of the peak learning rate, from a schedule.
        sft_share: (S,) share of each step's pairs routed to SFT.
    """
    total = multipliers.sum()
    sft = float((multipliers * sft_share).sum() / total) if total else 0.0
    return {"lr_mass/preference": 1.0 - sft if total else 0.0, "lr_mass/sft": sft}


def _rise(steps: int, warmup: float) -> np.ndarray:
    """(n,) multipliers of the warm-up, for a stage of `steps` steps."""
    risen = min(int(np.ceil(warmup * steps)), max(steps - 1, 0))
    # from 1/(n+1), not 0: a first step at rate 0 is wasted, and a stage can be a handful of steps
    return np.arange(1, risen + 1) / (risen + 1)
