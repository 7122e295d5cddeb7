"""Documents -> packed token rows: the tokens of each row, what attends to what, and the tokens to predict."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

Encoded = Sequence[Mapping[str, Any]]
"""Encoded pairs or samples, by their columns."""

Document = tuple[int, ...]
"""Row of a document, and the columns where it begins, where its first piece ends, and where each further piece
ends. A further piece attends to the first piece and itself. Its positions follow those of the first piece."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; neither the host nor the GPU waits for the copy."""
    pinned = tensor.pin_memory() if (tensor.device.type, device.type) == ("cpu", "cuda") else tensor
    return pinned.to(device, non_blocking=True)


class OnDevice:
    """A dataclass whose tensors go to another device together."""

    def to(self, device: torch.device) -> Self:
        # by identity: rows that policy and reference share are moved and held once
        parts = {id(part): part for part in vars(self).values() if isinstance(part, OnDevice | Tensor)}
        moved = {k: p.to(device) if isinstance(p, OnDevice) else to_device(p, device) for k, p in parts.items()}
        changes = {name: moved[id(part)] for name, part in vars(self).items() if id(part) in moved}
        return replace(self, **changes)  # type: ignore[type-var]  # only dataclasses inherit from it


@dataclass
class Segments(OnDevice):
    """The index of attention over the documents of R rows, made once a batch. Spans count the R·T flattened positions.

    A segment is a document's first piece with the second, or a further piece. Its queries stand side by side. The keys
    of a further piece are the first piece and the piece itself. Within a segment the last query sees all of the keys.

    Attributes:
        queries: [start, end) of each row without its padding: the queries of all segments, in their order.
        keys: [start, end) of the keys of all segments, in their order.
        sizes: queries and keys of each segment.
        cu_seqlens: (2, segments + 1) int32, where each segment's queries (first) and keys (second) begin, and the end.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor


@dataclass
class TokenRows(OnDevice):
    """Token sequences of one forward pass, and the list of the tokens to predict.

    A row is one document or several that are blind to each other: a pair that shares its prompt, `[prompt | chosen |
    rejected]`, with positions restarted after the prompt and the rejected response blind to the chosen one; one
    completion with its own prompt; or an SFT sample. The list of targets is the only mask: the last prompt token
    predicts the first token of both completions, which one label per position cannot express. Tokens outside the list
    (prompt, padding, a hard pair's rejected response) have no loss.

    Attributes:
        input_ids, position_ids: (R, T) int64.
        source: [start, end) of the R·T flattened positions whose hidden states predict the targets, in their order.
        target: (M,) int64 token ids.
        completion: (M,) int64, b for the chosen and B + b for the rejected completion of pair b.
        lengths: (2B,) int64, tokens of each completion, 0 for a completion that is left out.
        runs: (completion, tokens) of each completion in the rows, in the order of the targets.
        documents: what attends to what.
        segments: the same, as `mixdpo.model.attention` reads it.
        tokens: number of positions that are not padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    source: tuple[tuple[int, int], ...]
    target: Tensor
    completion: Tensor
    lengths: Tensor
    runs: tuple[tuple[int, int], ...]
    documents: tuple[Document, ...]
    segments: Segments
    tokens: int

    @property
    def plain(self) -> bool:
        """Whether each row is one sequence from position 0 on, as the model's own forward computes a row."""
        return len(self.documents) == len(self.input_ids) and all(len(document) <= 4 for document in self.documents)

    def sequences(self) -> Iterator[Tensor]:
        """Token ids of each completion behind its prompt, without padding. A pair's chosen completion comes first."""
        for row, start, first, *ends in self.documents:
            ids = self.input_ids[row]
            for begin, end in pairwise((first, *ends)):
                yield torch.cat([ids[start:first], ids[begin:end]])

    def attention_mask(self) -> Tensor:
        """(R, 1, T, T) bool, True = may attend: what our attention computes, for transformers' own.

        Padding attends to itself, because a softmax over nothing is NaN.
        """
        rows, length = self.input_ids.shape
        mask = torch.eye(length, dtype=torch.bool, device=self.input_ids.device).repeat(rows, 1, 1, 1)
        for row, start, first, *ends in self.documents:
            for begin, end in pairwise((start, *(ends or (first,)))):
                if begin > start:
                    mask[row, 0, begin:end, start:first] = True
                mask[row, 0, begin:end, begin:end] = mask.new_ones(end - begin, end - begin).tril()
        return mask


def build_rows(
    pairs: Encoded, with_chosen: Sequence[bool], with_rejected: Sequence[bool], share_prompt: bool = True, pack: int = 0
) -> TokenRows:
    """Rows of the wanted completions of B pairs. A pair with neither has no tokens. `pack` as for `token_rows`."""
    documents: list[list[Piece]] = []
    for b, pair in enumerate(pairs):
        prompt = Piece(pair["prompt_ids"])
        sides = ((with_chosen, b, "chosen_ids"), (with_rejected, len(pairs) + b, "rejected_ids"))
        parts = [Piece(pair[ids], number, (0, len(pair[ids]))) for wanted, number, ids in sides if wanted[b]]
        groups = [parts] if share_prompt and parts else [[part] for part in parts]
        documents += [[prompt, *pieces] for pieces in groups]
    return token_rows(documents, 2 * len(pairs), pack)


class Piece(NamedTuple):
    """Consecutive tokens of a document. The ids in `spans` [start, end, …) are targets of completion `completion`.

    A document's first piece begins at position 0. Every further piece begins at the position after the first piece, and
    the first piece's last token predicts the further piece's first token."""

    ids: Sequence[int]
    completion: int = -1
    spans: Sequence[int] = ()


def token_rows(documents: Sequence[Sequence[Piece]], completions: int, pack: int = 0) -> TokenRows:
    """Documents as rows: one a row or, with `pack` > 0, consecutive documents in rows of up to `pack` tokens."""
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
    targets, numbers = (torch.tensor(values, dtype=torch.long) for values in (target, completion))
    lengths = torch.bincount(numbers, minlength=completions)
    runs = tuple((number, len(list(run))) for number, run in groupby(completion))
    kept, index = (tuple(source), targets, numbers, lengths, runs), _segments(bounds, used)
    return TokenRows(input_ids, positions, *kept, tuple(bounds), index, sum(sizes))


def _segments(documents: Sequence[Document], used: Sequence[int]) -> Segments:
    """Of documents in rows of so many tokens."""
    blocks: list[tuple[tuple[int, int], ...]] = []  # the keys of each segment; its queries are the last span
    for row, *bounds in documents:
        start, first, *ends = (row * max(used) + column for column in bounds)
        blocks += [((start, first), own)[own[0] == start :] for own in pairwise((start, *(ends or (first,))))]
    sizes = tuple((keys[-1][1] - keys[-1][0], sum(end - begin for begin, end in keys)) for keys in blocks)
    queries = tuple((row * max(used), row * max(used) + tokens) for row, tokens in enumerate(used))
    starts = torch.tensor([(0, 0), *sizes]).cumsum(0, dtype=torch.int32)
    return Segments(queries, tuple(chain.from_iterable(blocks)), sizes, starts.T.contiguous())


def sample_rows(samples: Encoded, pack: int = 0) -> TokenRows:
    """Samples as token rows. `pack` as for `token_rows`; samples in one row are blind to each other."""
    documents = [[Piece(sample["input_ids"], b, sample["spans"])] for b, sample in enumerate(samples)]
    return token_rows(documents, len(samples), pack)
