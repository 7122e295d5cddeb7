"""Micro-batches -> tensors: pairs of preference training and samples of SFT make the same `Batch`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mixdpo.batches.rows import OnDevice, TokenRows, build_rows, sample_rows, to_device
from mixdpo.batches.steps import MicroBatch
from mixdpo.batches.token_pool import TokenPool, data_weights


@dataclass
class Batch(OnDevice):
    """One micro-batch of B pairs or samples.

    Attributes:
        unit: "pairs" or "samples".
        rows: tokens that the policy computes. Responses without a loss are left out, except in evaluation.
        ids: (B,) int64, pair_id or sample_id of each row, by which the data module finds the rows.
        is_hard: (B,) bool, pairs that are reported as hard; of samples all False.
        preference, sft: (P,) and (S,) int64, positions in the batch of pairs trained by the preference loss, and by
            SFT; a blended pair is in both. Index tensors are faster than masks, which wait for the device.
        weight: (B,) float32, of pairs the data's weight; 0 for filler. Filler keeps the number of micro-batches right.
        step_total: summed weight of the pairs, or of the response tokens of samples, in the whole optimizer step, over
            all devices.
        count: pairs or samples of this batch that count, 0 for filler.
        token: (M,) int64, number in the token pool of each target in `rows`. In a batch of pairs, -1 for all but
            hard pairs' chosen responses, and None without token cleaning.
        data_weight: (M,) float32, of samples: the weight that the data gives to each target, 0 for filler.
        token_weight: (M,) float32, weight of each target in the loss: `data_weight`, or 1 for pairs, times the weight
            that token cleaning gives (0 where cut). None for pairs without token cleaning.
        chosen_weight: (B,) float32, of pairs: the weight that the data gives to the chosen response in SFT.
        margin: (B,) float64, of pairs.
        preference_share: (B,) float64, of pairs: g of `Route.preference_share`.
        reference_rows: tokens that the reference computes: pairs trained by the preference loss, in evaluation all
            pairs. None if empty.
        reference_keys: (completion_key, tokens) of each completion in `reference_rows`, in the order of their targets.
        sft_sides: which responses of a pair SFT learns: (0,) chosen, (1,) rejected, (0, 1) both.
        source: (B,) int64, index of each sample's source.
        losses: role -> (M,) losses known before the step, for a scorer that reads the policy as well.
        always_keep: (M,) bool array, tokens that the selection of such a scorer always keeps, or None.
        scores: (M,) scores that such a scorer gave in the step.
        host: the batch before it was moved to a device: its tensors can be read without waiting. None if not moved.
    """

    unit: str
    rows: TokenRows
    ids: Tensor
    is_hard: Tensor
    preference: Tensor
    sft: Tensor
    weight: Tensor
    step_total: float
    count: int
    token: Tensor | None = None
    data_weight: Tensor | None = None
    token_weight: Tensor | None = None
    chosen_weight: Tensor | None = None
    margin: Tensor | None = None
    preference_share: Tensor | None = None
    reference_rows: TokenRows | None = None
    reference_keys: tuple[tuple[bytes, int], ...] = ()
    sft_sides: tuple[int, ...] = (0,)
    source: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    always_keep: Any = None
    scores: Tensor | None = None
    host: "Batch | None" = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Self:
        return replace(super().to(device), host=self)

    def reweigh(self, weights: np.ndarray) -> None:
        """Multiply `token_weight` by weights (M,), on the host and on the device."""
        host = self.host or self
        host.token_weight = host.token_weight * torch.from_numpy(weights).float()
        self.token_weight = to_device(host.token_weight, self.ids.device)


@dataclass(frozen=True)
class PairCollator:
    """Makes the `Batch` of one `MicroBatch` of N encoded pairs; picklable, for loader workers.

    Args:
        data: pairs with `prompt_ids`, `chosen_ids`, `rejected_ids`, `margin`, `pair_id`; `chosen_weight` and
            `pair_weight` are 1 if absent.
        is_hard: (N,) bool, pairs reported as hard.
        evaluation: keep both responses of all pairs and show every pair to the reference.
        share_prompt: one document per pair instead of one per completion; the numbers are the same.
        pack: as for `token_rows`; the numbers are the same.
        preference_share: (N,) g of `Route.preference_share`; 0 for the hard pairs and 1 for others if not given.
        sft_sides: the responses that SFT learns.
        first_token: (N,) the number in the token pool of a pair's first chosen token, -1 for a pair not in the pool.
    """

    data: Any
    is_hard: Sequence[bool]
    evaluation: bool = False
    share_prompt: bool = True
    pack: int = 0
    preference_share: Sequence[float] | None = None
    sft_sides: tuple[int, ...] = (0,)
    first_token: np.ndarray | None = None

    def __call__(self, micro_batch: MicroBatch) -> Batch:
        indices, weight, step_total = micro_batch
        pairs = [self.data[i] for i in indices]
        shares = self.preference_share
        share = np.array([1.0 - self.is_hard[i] if shares is None else shares[i] for i in indices])
        both = [self.evaluation or g > 0 for g in share.tolist()]  # pairs whose two responses are computed
        chosen, rejected = ([keep or side in self.sft_sides for keep in both] for side in (0, 1))
        layout: dict[str, Any] = {"share_prompt": self.share_prompt, "pack": self.pack}
        rows = build_rows(pairs, chosen, rejected, **layout)
        reference_rows = rows if all(both) else build_rows(pairs, both, both, **layout) if any(both) else None
        batch = Batch(
            "pairs",
            rows,
            ids=torch.tensor([int(pair["pair_id"]) for pair in pairs]),
            is_hard=torch.tensor([bool(self.is_hard[i]) for i in indices]),
            preference=torch.from_numpy(np.flatnonzero(share > 0)),
            sft=torch.from_numpy(np.flatnonzero(share < 1)),
            preference_share=torch.from_numpy(share),
            weight=torch.tensor([weight * pair.get("pair_weight", 1.0) for pair in pairs]),
            step_total=step_total,
            count=len(pairs) if weight else 0,
            chosen_weight=torch.tensor([pair.get("chosen_weight", 1.0) for pair in pairs]),
            margin=torch.tensor([float(pair["margin"]) for pair in pairs], dtype=torch.float64),
            reference_rows=reference_rows,
            reference_keys=_keys(pairs, reference_rows) if reference_rows is not None else (),
            sft_sides=self.sft_sides,
        )
        if self.first_token is not None:
            batch.token = torch.full_like(rows.target, -1)
            batch.token_weight = torch.ones(len(batch.token))
            for b, first in enumerate(self.first_token[list(indices)].tolist()):
                if first >= 0:
                    chosen = rows.completion == b
                    batch.token[chosen] = first + torch.arange(int(chosen.sum()))
        return batch


def _keys(pairs: Sequence[Mapping[str, Any]], rows: TokenRows) -> tuple[tuple[bytes, int], ...]:
    texts = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    return tuple((completion_key(*texts[number]), length) for number, length in rows.runs)


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """A 16-byte hash of the ids that a completion's log-probabilities depend on."""
    parts = [np.asarray(ids, dtype=np.int32).tobytes() for ids in (prompt_ids, completion_ids)]
    return hashlib.blake2b(parts[1], key=hashlib.blake2b(parts[0]).digest(), digest_size=16).digest()


@dataclass(frozen=True)
class SampleCollator:
    """Makes the `Batch` of one `MicroBatch` of samples in a pool; picklable, for loader workers.

    Args:
        pool: the samples and the numbers of their tokens.
        sources: name -> index of the samples' sources.
        pack: as for `token_rows`; the numbers are the same.
    """

    pool: TokenPool
    sources: Mapping[str, int]
    pack: int = 0

    def __call__(self, micro_batch: MicroBatch) -> Batch:
        indices, weight, step_total = micro_batch
        samples = [self.pool.samples[i] for i in indices]
        rows, count = sample_rows(samples, self.pack), len(samples)
        data_weight = torch.from_numpy(data_weights(samples)) * weight
        return Batch(
            "samples",
            rows,
            ids=torch.tensor([sample["sample_id"] for sample in samples]),
            is_hard=torch.zeros(count, dtype=torch.bool),
            preference=torch.zeros(0, dtype=torch.long),
            sft=torch.arange(count),
            weight=torch.full((count,), weight),
            step_total=step_total,
            count=count if weight else 0,
            token=torch.from_numpy(self.pool.tokens(indices)),
            data_weight=data_weight,
            token_weight=data_weight,
            source=torch.tensor([self.sources[sample["source"]] for sample in samples]),
        )
