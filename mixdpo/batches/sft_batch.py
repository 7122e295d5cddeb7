"""SFT samples -> tensors of one micro-batch, with a weight for every response token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixdpo.batches.rows import OnDevice, TokenRows, sample_rows
from mixdpo.batches.steps import MicroBatch
from mixdpo.batches.token_pool import TokenPool


@dataclass
class SFTBatch(OnDevice):
    """One micro-batch of B samples with M response tokens.

    Attributes:
        rows: the samples, one or several in a row; `rows.completion` says to which of the B samples a target belongs.
        token_weight: (M,) float32, the weight of each target in the loss: 1, 0 where cut (or filler), or between.
        token: (M,) int64, the number of each target in the token pool.
        sample: (B,) int64, indices of the samples in the data.
        source: (B,) int64, index of each sample's source.
        step_tokens: response tokens in the whole optimizer step, over all micro-batches and devices.
        count: samples of this batch that count, 0 for filler.
        losses: role -> (M,) losses known before the step, for a scorer that reads the policy as well.
        always_keep: (M,) bool array, tokens that such a scorer's selection keeps always; None where there are none.
        scores: (M,) what such a scorer said in the step.
    """

    unit: ClassVar[str] = "samples"
    rows: TokenRows
    token_weight: Tensor
    token: Tensor
    sample: Tensor
    source: Tensor
    step_tokens: int
    count: int
    losses: dict[str, Tensor] | None = None
    always_keep: Any = None
    scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def ids(self) -> Tensor:
        """(B,) what a data module finds the rows by."""
        return self.sample


class SFTCollator:
    """Looks up one `MicroBatch` (its last number: response tokens of the step) in the pool; picklable, for workers."""

    def __init__(self, pool: TokenPool, sources: Sequence[str], *, pack: int = 0) -> None:
        self.pool, self.pack = pool, pack
        self.source_index = {name: i for i, name in enumerate(sources)}

    def __call__(self, micro_batch: MicroBatch) -> SFTBatch:
        indices, weight, step_tokens = micro_batch
        samples = [self.pool.samples[i] for i in indices]
        rows = sample_rows(samples, self.pack)
        return SFTBatch(
            rows,
            token_weight=torch.full((len(rows.target),), weight),
            token=torch.from_numpy(self.pool.tokens(indices)),
            sample=torch.tensor(indices, dtype=torch.long),
            source=torch.tensor([self.source_index[sample["source"]] for sample in samples]),
            step_tokens=step_tokens,
            count=len(indices) if weight else 0,
        )
