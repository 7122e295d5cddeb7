"""Order -> optimizer steps -> micro-batches -> tensors.

A step is `batch_size` pairs over all devices. It is cut into exactly `accumulate × world` micro-batches of balanced
tokens, so that Lightning's windows never shift and no rank waits for another; the cut does not change the update,
because the loss is normalised over the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mixdpo.attention import Document, document_mask
from mixdpo.reference import completion_key

MicroBatch = tuple[tuple[int, ...], float, int]
"""Indices of the pairs in the encoded data, the weight they carry (0 = filler), the number of pairs in the step."""


class Movable:
    """A dataclass whose tensors go to another device together."""

    def to(self, device: torch.device) -> Self:
        there = {}  # by identity: rows that are the policy's and the reference's are moved, and held, once
        for part in vars(self).values():
            if isinstance(part, Tensor | Movable) and id(part) not in there:
                pinned = isinstance(part, Tensor) and (part.device.type, device.type) == ("cpu", "cuda")
                part_there = part.pin_memory() if pinned else part
                options = {"non_blocking": True} if isinstance(part, Tensor) else {}
                there[id(part)] = part_there.to(device, **options)
        return replace(self, **{name: there[id(part)] for name, part in vars(self).items() if id(part) in there})


@dataclass
class TokenRows(Movable):
    """Token sequences of one forward pass, and the list of what is to be predicted in them.

    A row is one document or several that are blind to each other: a pair that shares its prompt, `[prompt | chosen |
    rejected]`, with positions restarted after the prompt and the rejected response blind to the chosen one; one
    completion with its own prompt; or an SFT sample. The list of targets is the only mask: the last prompt token
    predicts the first token of both completions, which labels per position cannot say. What is not in the list (prompt,
    padding, a hard pair's rejected response) can have no loss.

    Attributes:
        input_ids, position_ids: (R, T) int64.
        source: [start, end) of the R·T flattened positions whose hidden states predict the targets, in their order.
        target: (M,) int64 token ids.
        completion: (M,) int64, b for the chosen and B + b for the rejected completion of pair b.
        lengths: (2B,) int64, tokens of each completion, 0 where it is left out.
        runs: (completion, tokens) of each completion that is there, in the order of the targets.
        documents: what attends to what, as `mixdpo.attention` reads it.
        tokens: positions that are not padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    source: tuple[tuple[int, int], ...]
    target: Tensor
    completion: Tensor
    lengths: Tensor
    runs: tuple[tuple[int, int], ...]
    documents: tuple[Document, ...]
    tokens: int

    @property
    def plain(self) -> bool:
        """Whether each row is one sequence from position 0 on: what the model's own forward computes."""
        return len(self.documents) == len(self.input_ids) and all(len(document) <= 4 for document in self.documents)

    def sequences(self) -> Iterator[Tensor]:
        """Token ids of each completion with its prompt, as it would stand alone; a pair's chosen one comes first."""
        for row, start, first, *ends in self.documents:
            ids = self.input_ids[row]
            for begin, end in zip((first, *ends), ends, strict=False):
                yield torch.cat([ids[start:first], ids[begin:end]])

    def attention_mask(self) -> Tensor:
        """(R, 1, T, T) bool, True = may attend; `mixdpo.attention.document_mask`."""
        return document_mask(self.documents, *self.input_ids.shape, device=self.input_ids.device)


@dataclass
class PairBatch(Movable):
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
    easy: Tensor
    hard: Tensor
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


def plan_steps(order: Sequence[int], batch_size: int) -> list[tuple[int, ...]]:
    """Consecutive pieces of the order, one per optimizer step; the last one may be shorter."""
    return [tuple(int(i) for i in order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def cut_step(step: Sequence[int], tokens: Sequence[int], *, accumulate: int, world: int, rank: int) -> list[MicroBatch]:
    """The `accumulate` micro-batches of one step that this rank computes.

    Pairs go, longest first, to the lightest of the step's `accumulate × world` micro-batches; those of like size
    run at the same time on different ranks. A micro-batch left empty gets the step's shortest pair with weight 0.
    Among pairs of equal length the place in the step decides: the order of the rows in the file must change nothing.

    Args:
        step: indices of the step's pairs.
        tokens: tokens of every pair in the data, by index.
    """
    bins: list[list[int]] = [[] for _ in range(accumulate * world)]
    loads = [0] * len(bins)
    for index in sorted(step, key=lambda i: -tokens[i]):
        # among bins of equal load the emptier first, so that the first pairs spread
        lightest = min(range(len(bins)), key=lambda b: (loads[b], len(bins[b]), b))
        bins[lightest].append(index)
        loads[lightest] += tokens[index]
    filler = (min(step, key=lambda i: tokens[i]),)
    heaviest_first = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    mine = [bins[b] for b in heaviest_first][rank::world]
    return [(tuple(pairs), 1.0, len(step)) if pairs else (filler, 0.0, len(step)) for pairs in mine]


def build_rows(
    pairs: Sequence[Mapping[str, Any]],
    with_chosen: Sequence[bool],
    with_rejected: Sequence[bool],
    share_prompt: bool = True,
    pack: int = 0,
) -> TokenRows:
    """Rows that hold the named completions of B pairs; a pair with neither is nowhere. `pack` as for `token_rows`."""
    documents: list[list[Piece]] = []
    for b, pair in enumerate(pairs):
        prompt = Piece(pair["prompt_ids"])
        sides = ((with_chosen, b, "chosen_ids"), (with_rejected, len(pairs) + b, "rejected_ids"))
        parts = [Piece(pair[ids], number, (0, len(pair[ids]))) for wanted, number, ids in sides if wanted[b]]
        documents += [
            [prompt, *pieces] for pieces in ([parts] if share_prompt else [[part] for part in parts]) if pieces
        ]
    return token_rows(documents, 2 * len(pairs), pack)


class Piece(NamedTuple):
    """Consecutive tokens of a document; `spans` [start, end, …) of the ids are targets, of the completion of this
    number. A document's first piece begins at position 0, every further one after the first, by whose last token a
    target that begins it is predicted."""

    ids: Sequence[int]
    completion: int = -1
    spans: Sequence[int] = ()


def token_rows(documents: Sequence[Sequence[Piece]], completions: int, pack: int = 0) -> TokenRows:
    """Documents as rows: one a row, or with `pack` as many as follow each other and fit into so many tokens."""
    sizes = [sum(len(piece.ids) for piece in document) for document in documents]
    starts: list[tuple[int, int]] = []  # row and first column of each document
    used: list[int] = []
    for size in sizes:
        if not used or used[-1] + size > pack:
            used.append(0)
        starts.append((len(used) - 1, used[-1]))
        used[-1] += size
    width = max(used)
    input_ids, positions = torch.zeros(2, len(used), width, dtype=torch.long)
    source: list[tuple[int, int]] = []
    target: list[int] = []
    completion: list[int] = []
    bounds: list[Document] = []
    for document, (row, begin) in zip(documents, starts, strict=True):
        ends = [begin]
        for number, piece in enumerate(document):
            start, end = ends[-1], ends[-1] + len(piece.ids)
            position = len(document[0].ids) if number else 0
            input_ids[row, start:end] = torch.as_tensor(piece.ids)
            positions[row, start:end] = torch.arange(position, position + len(piece.ids))
            for first, last in zip(piece.spans[::2], piece.spans[1::2], strict=True):
                before = start + first - 1 if first else begin + position - 1
                spans = ((before, before + 1), (start + first, start + last - 1))
                source += [(row * width + begins, row * width + stops) for begins, stops in spans if begins < stops]
                target += piece.ids[first:last]
                completion += [piece.completion] * (last - first)
            ends.append(end)
        bounds.append((row, *ends))
    lists = [torch.tensor(values, dtype=torch.long) for values in (target, completion)]
    lengths = torch.bincount(lists[1], minlength=completions)
    runs = tuple((number, len(list(run))) for number, run in groupby(completion))
    return TokenRows(input_ids, positions, tuple(source), *lists, lengths, runs, tuple(bounds), tokens=sum(sizes))


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
            easy=torch.tensor([b for b, sft in enumerate(to_sft) if not sft], dtype=torch.long),
            hard=torch.tensor([b for b, sft in enumerate(to_sft) if sft], dtype=torch.long),
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
