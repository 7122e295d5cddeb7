"""Log-probabilities of a frozen reference on disk: computed once, read again in later epochs and by later runs."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.packaged_model import cache_root


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """Names the completion by all that its tokens' log-probabilities depend on beside the model."""
    parts = [np.asarray(ids, dtype=np.int32).tobytes() for ids in (prompt_ids, completion_ids)]
    return hashlib.blake2b(parts[1], key=hashlib.blake2b(parts[0]).digest(), digest_size=16).digest()


class ReferenceCache:
    """Per-token log-probabilities of completions, by `completion_key`; one SQLite file per reference.

    Several runs at once may read and write it, and what a killed run had added is whole or absent.

    Args:
        of: all that decides the values beside the tokens (weights, adapter, precision), in JSON's types.
        dtype: the values', "float32" or "float64".

    Raises:
        InputError: the file cannot be written, or is no such file.
    """

    def __init__(self, of: Mapping[str, Any], dtype: str = "float32") -> None:
        about = json.dumps({**of, "values": dtype}, sort_keys=True)
        name = hashlib.sha256(about.encode()).hexdigest()[:32]
        self.path, self.dtype = cache_root() / "reference" / f"{name}.sqlite", np.dtype(dtype)
        with self._readable():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # autocommit; a minute for another run to finish its transaction
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS log_probs (key BLOB PRIMARY KEY, by_token BLOB)")

    def get(self, lengths: Sequence[tuple[bytes, int]]) -> np.ndarray | None:
        """The values of these completions (key, tokens), one after the other; None if one of them is not known.

        Raises:
            InputError: a completion has another number of values, or the file cannot be read.
        """
        marks, keys = ", ".join("?" * len(lengths)), [key for key, _ in lengths]
        with self._readable():
            found = dict(self._database.execute(f"SELECT key, by_token FROM log_probs WHERE key IN ({marks})", keys))
            if not all(key in found for key in keys):
                return None
            if any(len(found[key]) != tokens * self.dtype.itemsize for key, tokens in lengths):
                raise sqlite3.DatabaseError("a completion in it has another number of tokens")
        return np.frombuffer(b"".join(found[key] for key in keys), dtype=self.dtype)

    def add(self, values: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Keep the values of completions; what is known already stays."""
        rows = [(key, np.ascontiguousarray(value, dtype=self.dtype).tobytes()) for key, value in values]
        with self._readable():
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                self._database.executemany("INSERT OR IGNORE INTO log_probs VALUES (?, ?)", rows)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"the reference's log-probabilities cannot be kept in {self.path}: {error}. Delete it if it is "
                "damaged, name another folder in MIXDPO_CACHE, or set model.reference_cache false"
            ) from error
