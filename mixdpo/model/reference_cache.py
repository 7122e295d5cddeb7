"""Log-probabilities of a frozen reference on disk: computed once, read again in later epochs and by later runs."""

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixdpo.batches.batch import PairBatch
from mixdpo.model.adapters import role
from mixdpo.model.forward import row_log_probs
from mixdpo.storage.files import cache_root, or_without


@torch.no_grad()
def reference_log_probs(model: nn.Module, batch: PairBatch) -> Tensor:
    """(M,) log-probabilities by the reference, of the targets in the batch's reference rows."""
    with role(model, "reference"):
        return row_log_probs(model, batch.reference_rows)


class ReferenceCache:
    """Per-token log-probabilities of completions, by `completion_key`; one SQLite file per reference.

    Several runs at once may read and write the file. A value that a killed run was adding is whole or absent. If the
    file cannot be used, the user gets one warning, and from then on values are kept in memory.

    Args:
        of: all that decides the values beside the tokens (weights, adapter, precision), in JSON's types.
        dtype: the values', "float32" or "float64".
    """

    def __init__(self, of: Mapping[str, Any], dtype: str = "float32") -> None:
        about = json.dumps({**of, "values": dtype}, sort_keys=True)
        name = hashlib.sha256(about.encode()).hexdigest()[:32]
        self.path, self.dtype = cache_root() / "reference" / f"{name}.sqlite", np.dtype(dtype)
        self._new: list[tuple[Sequence[tuple[bytes, int]], Tensor]] = []  # not written yet
        self._or_in_memory = partial(or_without, "the reference's log-probabilities", self.path, self._open)
        with self._or_in_memory():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(self.path)

    def _open(self, where: Any = ":memory:") -> None:
        # autocommit; a minute for another run to finish its transaction
        self._database = sqlite3.connect(where, timeout=60, isolation_level=None)
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("CREATE TABLE IF NOT EXISTS log_probs (key BLOB PRIMARY KEY, by_token BLOB)")

    def log_probs(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """As `reference_log_probs`; computed only if the file lacks one of the batch's completions.

        What was computed is written by `write`, because writing waits for the device.
        """
        if (known := self.get(batch.reference_keys)) is not None:
            values, device = torch.tensor(known), batch.reference_rows.target.device
            return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
        values = reference_log_probs(model, batch)
        self._new.append((batch.reference_keys, values))
        return values

    def write(self) -> None:
        """Write what was computed since the last time."""
        for keys, found in self._new:
            parts = found.split([tokens for _, tokens in keys])
            self.add((key, values.cpu().numpy()) for (key, _), values in zip(keys, parts, strict=True))
        self._new = []

    def get(self, lengths: Sequence[tuple[bytes, int]]) -> np.ndarray | None:
        """The values of these completions (key, tokens), one after the other; None if one of them is not known.

        A completion's values are removed from the file, with a warning, if their count is wrong or one is not finite.
        """
        marks, keys = ", ".join("?" * len(lengths)), [key for key, _ in lengths]
        with self._or_in_memory():
            found = dict(self._database.execute(f"SELECT key, by_token FROM log_probs WHERE key IN ({marks})", keys))
            bad = [(key,) for key, tokens in lengths if key in found and not self._is_whole(found[key], tokens)]
            if bad:
                said = "these are computed anew and replaced; nothing needs to be done"
                warnings.warn(f"{self.path} holds damaged log-probabilities: {said}", stacklevel=2)
                self._database.executemany("DELETE FROM log_probs WHERE key = ?", bad)
            elif all(key in found for key in keys):
                return np.frombuffer(b"".join(found[key] for key in keys), dtype=self.dtype)
        return None

    def _is_whole(self, value: bytes, tokens: int) -> bool:
        right = len(value) == tokens * self.dtype.itemsize
        return right and bool(np.isfinite(np.frombuffer(value, dtype=self.dtype)).all())

    def add(self, values: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Keep the values of completions that are finite; what is known already stays."""
        rows = [(key, np.asarray(v, dtype=self.dtype).tobytes()) for key, v in values if np.isfinite(v).all()]
        with self._or_in_memory():
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                self._database.executemany("INSERT OR IGNORE INTO log_probs VALUES (?, ?)", rows)
