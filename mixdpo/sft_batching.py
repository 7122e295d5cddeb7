"""SFT samples -> tensors of one micro-batch, with a weight for every response token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixdpo.batching import PADDING, PROMPT, MicroBatch, TokenRows, moved_tensors
from mixdpo.samples import TokenPool


@dataclass
class SFTBatch:
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

    def to(self, device: torch.device) -> "SFTBatch":
        return replace(self, **moved_tensors(self, device), rows=self.rows.to(device))


def sample_rows(samples: Sequence[Mapping[str, Any]], pack: int = 0) -> TokenRows:
    """Samples as token rows: one a row, or with `pack` as many as fit into so many tokens, blind to each other."""
    rows: list[list[int]] = []
    for b, sample in enumerate(samples):
        used = sum(len(samples[i]["input_ids"]) for i in rows[-1]) if rows else 0
        if rows and used + len(sample["input_ids"]) <= pack:
            rows[-1].append(b)
        else:
            rows.append([b])
    width = max(sum(len(samples[b]["input_ids"]) for b in row) for row in rows)
    input_ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), PADDING)
    source: list[int] = []
    target: list[int] = []
    completion: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for b in row:
            ids, spans = samples[b]["input_ids"], samples[b]["spans"]
            input_ids[r, at : at + len(ids)] = torch.as_tensor(ids)
            positions[r, at : at + len(ids)] = torch.arange(len(ids))
            # a row of one needs no walls inside; PROMPT is what all later positions of the row may see
            segments[r, at : at + len(ids)] = PROMPT if len(row) == 1 else 1 + b
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                first = r * width + at + start
                source += range(first - 1, first - 1 + end - start)
                target += ids[start:end]
                completion += [b] * (end - start)
            at += len(ids)
    numbers = (torch.tensor(values, dtype=torch.long) for values in (source, target, completion))
    source_, target_, completion_ = numbers
    lengths = torch.bincount(completion_, minlength=len(samples))
    return TokenRows(
        input_ids, positions, segments, source_, target_, completion_, lengths, tokens=int((segments != PADDING).sum())
    )


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
