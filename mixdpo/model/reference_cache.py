"""Log-probabilities of a frozen reference on disk: computed once, read again in later epochs and by later runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixdpo.batches.batch import Batch
from mixdpo.batches.rows import to_device
from mixdpo.model.adapters import role
from mixdpo.model.forward import row_log_probs
from mixdpo.storage.store import open_cache


@torch.no_grad()
def reference_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """(M,) log-probabilities by the reference, of the targets in the batch's reference rows."""
    with role(model, "reference"):
        return row_log_probs(model, batch.reference_rows)


class ReferenceCache:
    """Per-token log-probabilities of completions, by `completion_key`; one file per reference.

    Several runs at once may read and write the file. If the file cannot be used, the user gets one warning, and from
    then on values are kept in memory.

    Args:
        of: everything but the tokens that decides the values (weights, adapter, precision), in JSON's types.
        dtype: dtype of the values, "float32" or "float64".
    """

    def __init__(self, of: Mapping[str, Any], dtype: str = "float32") -> None:
        head = {**of, "dtype": dtype}
        self.store, self.dtype = open_cache("reference", head, "the reference's log-probabilities"), np.dtype(dtype)
        self._new: list[tuple[Sequence[tuple[bytes, int]], Tensor]] = []  # not written yet

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `reference_log_probs`; computed only if the file lacks one of the batch's completions.

        `write` writes the computed values to the file later, because writing waits for the device.
        """
        if (known := self.get(batch.reference_keys)) is not None:
            return to_device(torch.tensor(known), batch.reference_rows.target.device)
        values = reference_log_probs(model, batch)
        self._new.append((batch.reference_keys, values))
        return values

    def write(self) -> None:
        """Write the values that `log_probs` has computed since the last `write`."""
        new, self._new = self._new, []
        for keys, values in new:
            by_completion = values.cpu().split([tokens for _, tokens in keys])
            self.add((key, each.numpy()) for (key, _), each in zip(keys, by_completion, strict=True))

    def get(self, lengths: Sequence[tuple[bytes, int]]) -> np.ndarray | None:
        """The values of these completions (key, tokens), one after the other; None if one is not known."""
        kept = self.store.get([key for key, _ in lengths])
        if not all(len(kept.get(key, b"")) == tokens * self.dtype.itemsize for key, tokens in lengths):
            return None
        return np.frombuffer(b"".join(kept[key] for key, _ in lengths), dtype=self.dtype)

    def add(self, values: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Keep the values of these completions. A completion with a NaN or infinite value is left out."""
        self.store.add({key: np.asarray(v, dtype=self.dtype).tobytes() for key, v in values if np.isfinite(v).all()})
