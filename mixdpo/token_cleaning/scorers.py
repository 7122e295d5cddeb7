"""Losses of a token under one or two models -> its score, high = keep; frozen dataclasses that a YAML file names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from mixdpo.errors import InputError
from mixdpo.model.adapters import Role
from mixdpo.model.fused_head import Statistic, entropy

READABLE: tuple[Role, ...] = ("base", "cleaning_reference", "previous", "policy")
"""The roles that a scorer may read. The `reference` of a preference loss is none of them."""


@dataclass(frozen=True)
class TokenStatistics:
    """What a scorer reads of M response tokens, and where each token belongs. Only what the scorer names is computed.

    Attributes:
        losses: role -> (M,) negative log-likelihood in nats, detached, for each of the scorer's `roles`. For a scorer
            with the attribute `column` also "column" -> (M,) float32, the numbers in this column of the data.
        sample: (M,) int64, which sample a token belongs to.
        token: (M,) int64, the token's own number in the whole pool.
        measured: (M,) for each of the scorer's `needs`, detached: statistics of the policy's predictions in the step,
            which are functions such as `entropy` of mixdpo.model.fused_head, or of the policy's and the base's, such as
            `divergence`.
    """

    losses: Mapping[str, Tensor]
    sample: Tensor
    token: Tensor
    measured: Sequence[Tensor] = ()


@dataclass(frozen=True)
class ExcessLoss:
    """ℓ_worse − ℓ_better: how much better one model predicts the token than another.

    | method                                       | worse              | better             | normalise |
    |----------------------------------------------|--------------------|--------------------|-----------|
    | Token Cleaning (arXiv 2502.01968)            | base               | cleaning_reference | no        |
    | the same with a moving base                  | previous           | cleaning_reference | no        |
    | Rho-1 (Lin et al. 2024), online              | policy             | cleaning_reference | no        |
    | ssToken's loss term, with its own history    | cleaning_reference | policy             | yes       |

    Args:
        worse: Role whose loss counts for keeping a token: base, cleaning_reference, previous or policy.
        better: Role whose loss counts against keeping it.
        normalise: Map each sample's scores to [0, 1] by their smallest and largest; equal scores become 0.
    """

    worse: Role = "base"
    better: Role = "cleaning_reference"
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.worse == self.better:
            raise InputError(f"ExcessLoss: worse and better are both {self.worse}: every score is 0, so name two roles")

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.worse, self.better)

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        """(M,) in nats, or in [0, 1] where normalised."""
        excess = statistics.losses[self.worse] - statistics.losses[self.better]
        if not self.normalise:
            return excess
        start, index = torch.zeros_like(excess), torch.unique(statistics.sample, return_inverse=True)[1]
        low, high = (start.scatter_reduce(0, index, excess, how, include_self=False)[index] for how in ("amin", "amax"))
        return (excess - low) / (high - low).masked_fill(high == low, 1)


@dataclass(frozen=True)
class Loss:
    """ℓ: keeps the tokens that the model finds hard.

    Args:
        role: Whose loss: base, cleaning_reference, previous or policy.
    """

    role: Role = "policy"

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.role,)

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        """(M,) in nats."""
        return statistics.losses[self.role]


@dataclass(frozen=True)
class Probability(Loss):
    """exp(−ℓ): the token's probability.

    ProFit keeps p > τ: a selection with threshold τ and keep_ratio null. DFT weighs each token by p: no selection.

    Args:
        role: Whose probability: base, cleaning_reference, previous or policy.
    """

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        """(M,) in [0, 1]."""
        return torch.exp(-super().__call__(statistics))


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), by seed and number of the token: the same whatever the batch, the order or the device.

    Args:
        seed: Another seed keeps other tokens.
    """

    seed: int = 0
    roles: ClassVar[tuple[Role, ...]] = ()

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        """(M,) float32 in [0, 1)."""
        token = statistics.token
        drawn = np.random.default_rng(self.seed).random(int(token.max()) + 1 if len(token) else 0, dtype=np.float32)
        return torch.from_numpy(drawn).to(token.device)[token]


@dataclass(frozen=True)
class Entropy:
    """(H / scale)^power, where H is the entropy of the prediction by the policy of the step.

    | method                   | top  | scale | power | selection                    |
    |--------------------------|------|-------|-------|------------------------------|
    | EAFT (arXiv 2601.02151)  | 20   | 3     | 1     | none: the score is the weight |
    | high entropy             | null | 1     | 1     | keep_ratio, scope batch       |

    Args:
        top: H is that of so many likeliest tokens, their probabilities renormalised. Null takes the whole vocabulary.
        scale: By how many nats H is divided. ln 20 is about 3.
        power: EAFT's α.
    """

    top: PositiveInt | None = 20
    scale: float = 3.0
    power: float = 1.0
    roles: ClassVar[tuple[Role, ...]] = ("policy",)

    @property
    def needs(self) -> tuple[Statistic]:
        return (partial(entropy, top=self.top),)

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        """(M,) >= 0."""
        return (statistics.measured[0] / self.scale) ** self.power


@dataclass(frozen=True)
class Column:
    """Scores from the data: a row's list of numbers, one for each response token that is trained on, in order.

    A run's folder `cleaning` says which tokens these are: docs/token_scores.md shows how to make a column.

    Args:
        column: Name of the column.
    """

    column: str
    roles: ClassVar[tuple[Role, ...]] = ()

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        """(M,) float32."""
        return statistics.losses["column"]


def is_online(scorer: Any) -> bool:
    """Whether scores need the policy of the step, so that no score can be computed before the step."""
    return "policy" in scorer.roles or bool(getattr(scorer, "needs", ()))
