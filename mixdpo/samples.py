"""SFT samples as one flat pool of response tokens, and the stages in which they are trained."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mixdpo.errors import InputError

Split = Literal["contiguous", "shuffled"]


@dataclass(frozen=True)
class TokenPool:
    """N samples and their M response tokens, numbered sample by sample: what scores, masks and weights refer to.

    Attributes:
        samples: N encoded samples: `input_ids`, `spans` [start, end, …) of the response tokens, `source`, …
        offsets: (N+1,) int64; the tokens of sample n have the numbers offsets[n] to offsets[n + 1].
        identity: what must be the same for numbers of tokens to mean the same tokens: data, tokenizer, template, …; its
            part `ids` is a hash of the token ids and spans themselves, whatever made them.
    """

    samples: Any
    offsets: np.ndarray
    identity: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Any, identity: Mapping[str, str]) -> "TokenPool":
        counts, digest = [], hashlib.sha256()
        for ids, spans in zip(samples["input_ids"], samples["spans"], strict=True):
            counts.append(sum(spans[1::2]) - sum(spans[::2]))
            digest.update(np.array([len(ids), *ids, *spans], dtype=np.int32).tobytes())
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(samples, offsets, {**identity, "ids": digest.hexdigest()[:16]})

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Numbers of all tokens of these samples, sample by sample."""
        ranges = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)

    def offsets_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n+1,) where the tokens of these samples begin in what `tokens` returns."""
        return np.concatenate([[0], np.cumsum(np.diff(self.offsets)[indices])])

    def target_ids(self) -> np.ndarray:
        """(M,) int32, the ids of the response tokens."""
        pieces = [
            np.concatenate([ids[start:end] for start, end in turns(spans)])
            for ids, spans in zip(self.samples["input_ids"], self.samples["spans"], strict=True)
        ]
        return np.concatenate(pieces).astype(np.int32)

    def planted(self) -> np.ndarray | None:
        """(M,) bool, which tokens are noise that was planted; None where none was."""
        if "planted" not in self.samples.column_names:
            return None
        return np.concatenate([np.asarray(marks, dtype=bool) for marks in self.samples["planted"]])


def turns(spans: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end, …] -> (start, end) of each response."""
    return list(zip(spans[::2], spans[1::2], strict=True))


def content_hash(texts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Slices:
    """How the samples are divided into stages: a slice is trained completely before the next one begins.

    Args:
        count: T + 1 equal slices; 1 is ordinary training.
        split: contiguous cuts the file as it lies, as published; shuffled draws the slices by the seed.
        only: Numbers of the slices to train, from 0; null trains all, in order.
        passes: Times that a slice is trained before the next one begins.
        seed: Of the order of the samples within a slice and, when shuffled, of the slices.
    """

    count: int = 1
    split: Split = "contiguous"
    only: list[int] | None = None
    passes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.passes < 1:
            raise InputError(f"slices.count ({self.count}) and slices.passes ({self.passes}) must be at least 1")
        if self.seed < 0:
            raise InputError(f"slices.seed must be at least 0, not {self.seed}")
        if self.only is not None and (not self.only or sorted(set(self.only)) != list(self.only)):
            raise InputError(f"slices.only must name slices once, in rising order, not {self.only}")
        if self.only is not None and not 0 <= self.only[0] <= self.only[-1] < self.count:
            raise InputError(f"slices.only {self.only}: there are slices 0 to {self.count - 1} (slices.count)")


@dataclass(frozen=True)
class Stage:
    """One slice of the data. `samples` (n,) int64; `steps`: the samples of each optimizer step, all passes."""

    slice: int
    samples: np.ndarray
    steps: list[tuple[int, ...]]


def plan_stages(samples: int, slices: Slices, *, batch_size: int) -> list[Stage]:
    """Which samples each stage trains, and in which steps.

    Raises:
        InputError: fewer samples than slices.
    """
    if samples < slices.count:
        raise InputError(f"{samples} samples cannot be divided into {slices.count} slices (data.slices.count)")
    order = np.arange(samples)
    if slices.split == "shuffled":
        order = np.random.default_rng([slices.seed, 0]).permutation(samples)
    stages = []
    for number, piece in enumerate(np.array_split(order, slices.count)):
        if slices.only is not None and number not in slices.only:
            continue
        steps: list[tuple[int, ...]] = []
        for turn in range(slices.passes):
            drawn = np.random.default_rng([slices.seed, 1 + number, turn]).permutation(piece).tolist()
            steps += [tuple(drawn[i : i + batch_size]) for i in range(0, len(drawn), batch_size)]
        stages.append(Stage(number, np.sort(piece), steps))
    return stages
