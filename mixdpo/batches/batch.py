"""Order -> optimizer steps -> micro-batches -> tensors.

A step is `batch_size` pairs over all devices. It is cut into exactly `accumulate × world` micro-batches of balanced
tokens, so that Lightning's windows never shift and no rank waits for another; the cut does not change the update,
because the loss is normalised over the step.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mixdpo.batches.rows import OnDevice, TokenRows, build_rows
from mixdpo.batches.steps import MicroBatch


@dataclass
class PairBatch(OnDevice):
    """One micro-batch of B pairs.

    Attributes:
        rows: what the policy sees: nothing that no loss is taken of, unless made for evaluation.
        reference_rows: what the reference sees: `easy` only (all pairs in evaluation); None if there is none.
        reference_keys: (completion_key, tokens) of each completion in `reference_rows`, in the order of their targets.
        is_hard: (B,) bool, what is reported as hard.
        easy, hard: (E,) and (H,) int64, the positions in the batch of the pairs trained by the preference loss and by
            SFT (indexing by them needs no sync).
        margin: (B,) float64.
        weight: (B,) float32, 0 for a filler pair that only keeps the count of micro-batches right.
        pair_id: (B,) int64.
        step_pairs: pairs in the whole optimizer step, over all micro-batches and devices.
        count: pairs of this batch that count, 0 for filler.
        sft_sides: which responses of the pairs in `hard` SFT learns: 0 the chosen, 1 the rejected, (0, 1) both. `rows`
            has no others of them, unless made for evaluation.
        token: (M,) int64, the number in the cleaning pool of each target in `rows`, -1 where it is none of a hard
            pair's chosen response; None without token cleaning.
        token_weight: (M,) float32, weight of each target in the sum over its completion; None without token cleaning.
    """

    unit: ClassVar[str] = "pairs"
    rows: TokenRows
    reference_rows: TokenRows | None
    is_hard: Tensor
    preference: Tensor
    sft: Tensor
    margin: Tensor
    weight: Tensor
    pair_id: Tensor
    step_pairs: int
    count: int
    sft_sides: tuple[int, ...] = (0,)
    token: Tensor | None = None
    token_weight: Tensor | None = None
    reference_keys: tuple[tuple[bytes, int], ...] = ()

    def __len__(self) -> int:
        return len(self.is_hard)

    @property
    def ids(self) -> Tensor:
        """(B,) what a data module finds the rows by."""
        return self.pair_id


@dataclass(frozen=True)
class PairCollator:
    """Makes the tensors of one `MicroBatch` of N encoded pairs; picklable, for loader workers.

    Args:
        data: pairs with `prompt_ids`, `chosen_ids`, `rejected_ids`, `margin`, `pair_id`.
        is_hard: (N,) what each is reported as.
        evaluation: keep both responses of all pairs and show every pair to the reference.
        share_prompt: one document per pair instead of one per completion; the numbers are the same.
        pack: as for `token_rows`; the numbers are the same.
        to_sft: (N,) which pairs are trained by SFT; the hard ones if not given.
        sft_sides: the completions that those learn.
        first_token: (N,) the number in the cleaning pool of a pair's first chosen token, -1 for a pair not in it.
    """

    data: Any
    is_hard: Sequence[bool]
    evaluation: bool = False
    share_prompt: bool = True
    pack: int = 0
    to_sft: Sequence[bool] | None = None
    sft_sides: tuple[int, ...] = (0,)
    first_token: np.ndarray | None = None

    def __call__(self, micro_batch: MicroBatch) -> PairBatch:
        indices, weight, step_pairs = micro_batch
        pairs = [self.data[i] for i in indices]
        to_sft = [(self.is_hard if self.to_sft is None else self.to_sft)[i] for i in indices]
        whole = [self.evaluation or not sft for sft in to_sft]
        sides = ([keep or side in self.sft_sides for keep in whole] for side in (0, 1))
        layout = {"share_prompt": self.share_prompt, "pack": self.pack}
        rows = build_rows(pairs, *sides, **layout)
        if all(whole):
            reference_rows: TokenRows | None = rows
        else:
            reference_rows = build_rows(pairs, whole, whole, **layout) if any(whole) else None
        batch = PairBatch(
            rows,
            reference_rows,
            is_hard=torch.tensor([bool(self.is_hard[i]) for i in indices]),
            preference=torch.tensor([b for b, sft in enumerate(to_sft) if not sft], dtype=torch.long),
            sft=torch.tensor([b for b, sft in enumerate(to_sft) if sft], dtype=torch.long),
            margin=torch.tensor([float(pair["margin"]) for pair in pairs], dtype=torch.float64),
            weight=torch.full((len(pairs),), weight),
            pair_id=torch.tensor([int(pair["pair_id"]) for pair in pairs]),
            step_pairs=step_pairs,
            count=len(pairs) if weight else 0,
            sft_sides=self.sft_sides,
            reference_keys=_keys(pairs, reference_rows) if reference_rows is not None else (),
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
    found = []
    for number, length in rows.runs:
        pair, side = pairs[number % len(pairs)], ("chosen_ids", "rejected_ids")[number // len(pairs)]
        found.append((completion_key(pair["prompt_ids"], pair[side]), length))
    return tuple(found)


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """Names the completion by all that its tokens' log-probabilities depend on beside the model."""
    parts = [np.asarray(ids, dtype=np.int32).tobytes() for ids in (prompt_ids, completion_ids)]
    return hashlib.blake2b(parts[1], key=hashlib.blake2b(parts[0]).digest(), digest_size=16).digest()
