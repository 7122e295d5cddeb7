"""SFT samples as one flat pool of numbered response tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenPool:
    """N samples and their M response tokens, numbered sample by sample: what scores, masks and weights refer to.

    Attributes:
        samples: N encoded samples: `input_ids`, `spans` [start, end, …) of the response tokens, `response_weights` (the
            weight that the data gives to each span's tokens), `source`, …
        offsets: (N+1,) int64; the tokens of sample n have the numbers offsets[n] to offsets[n + 1].
        identity: data, tokenizer, template, …: if they are the same, the same numbers mean the same tokens. The part
            `ids` is a hash of all token ids and spans, and of the weights of a sample where some are not 1.
    """

    samples: Any
    offsets: np.ndarray
    identity: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Any, identity: Mapping[str, str]) -> "TokenPool":
        counts, digest = [], hashlib.sha256()
        columns = (samples[name] for name in ("input_ids", "spans", "response_weights"))
        for ids, spans, weights in zip(*columns, strict=True):
            counts.append(sum(spans[1::2]) - sum(spans[::2]))
            digest.update(np.array([len(ids), *ids, *spans], dtype=np.int32).tobytes())
            digest.update(b"" if set(weights) == {1} else np.float32(weights).tobytes())
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return cls(samples, offsets, {**identity, "ids": digest.hexdigest()[:16]})

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def of_sample(self, index: int) -> slice:
        """The numbers of a sample's tokens."""
        return slice(self.offsets[index], self.offsets[index + 1])

    def tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(m,) int64, numbers of all tokens of these samples, sample by sample."""
        ranges = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)

    def offsets_of(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n+1,) where the tokens of these samples begin in what `tokens` returns."""
        return np.concatenate([[0], np.cumsum(np.diff(self.offsets)[indices])])

    def totals(self) -> np.ndarray:
        """(N,) float64, the sum of the data's weights of each sample's tokens."""
        columns = zip(self.samples["spans"], self.samples["response_weights"], strict=True)
        return np.array([np.dot(np.subtract(spans[1::2], spans[::2]), weights) for spans, weights in columns])

    def target_ids(self) -> np.ndarray:
        """(M,) int32, the ids of the response tokens."""
        columns = zip(self.samples["input_ids"], self.samples["spans"], strict=True)
        pieces = [ids[start:end] for ids, spans in columns for start, end in turns(spans)]
        return np.concatenate(pieces).astype(np.int32)


def turns(spans: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end, …] -> (start, end) of each response."""
    return list(zip(spans[::2], spans[1::2], strict=True))


def data_weights(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(m,) float32, the weights that the data gives to all response tokens of these samples, sample by sample."""
    spans = [np.array(sample["spans"]) for sample in samples]
    weights = [weight for sample in samples for weight in sample["response_weights"]]
    return np.repeat(np.float32(weights), np.concatenate([bounds[1::2] - bounds[::2] for bounds in spans]))
