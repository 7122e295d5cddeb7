"""One keyed store for the results of a computation in progress: an SQLite file, headed by what the results depend on.

A product holds results that the user asked for, as verdicts: one process at a time has its file open. A cache holds
values that can be computed again. Its processes take turns. A cache's file that fails is replaced by memory, with a
warning.
"""

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from mixdpo.errors import InputError
from mixdpo.storage.files import cache_root
from mixdpo.storage.identity import differences
from mixdpo.storage.read import parse_json

PATIENCE = 8.0  # seconds to wait for another process that has a product's file open
ALL = "SELECT key, value, checksum FROM entries"

_told: dict[Path, str] = {}  # cache folder that cannot be used -> the warning given about it

Key = str | bytes | int


class Store(AbstractContextManager[Any]):
    def __init__(
        self, path: str | Path, head: Mapping[str, Any], *, noun: str, remedy: str = "", cache: bool = False
    ) -> None:
        """Open a file of entries, or make the file. After `add` its entries are on the disk, all or none.
        So the same command continues after a kill.

        Args:
            head: everything that the entries depend on, in JSON's types.
            noun: name of the entries in messages: "verdicts".
            remedy: end of an error about a damaged file or other entries: what to do.
            cache: whether the entries can be computed again.

        Raises:
            InputError: a product's file is damaged, depends on something else, cannot be written, or is open elsewhere.
        """
        self.path, self.noun, self.remedy, self._is_cache = Path(path), noun, remedy, cache
        self.head: dict[str, Any] = json.loads(json.dumps({"entries": noun, **head}))
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(self.path)

    def _open(self, where: str | Path = ":memory:") -> None:
        self._database = sqlite3.connect(where, timeout=60 if self._is_cache else PATIENCE, isolation_level=None)
        try:
            self._database.execute("PRAGMA synchronous = FULL")
            if not self._is_cache:  # the lock of the first transaction stays until the file is closed
                self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("BEGIN EXCLUSIVE")
            with self._database:
                if not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    self._database.execute("CREATE TABLE head (content TEXT)")
                    self._database.execute("CREATE TABLE entries (key PRIMARY KEY, value BLOB, checksum BLOB)")
                    self._database.execute("INSERT INTO head VALUES (?)", [json.dumps(self.head)])
                changed = differences(_head(self._database), self.head)
            if changed:
                raise InputError(f"{self.path} holds other {self.noun} ({'; '.join(changed)}): {self.remedy}")
        except BaseException:
            self.close()
            raise

    def get(self, keys: Sequence[Key] | None = None) -> dict[Any, bytes]:
        """All entries, or those of the keys. A cache's entry that was altered is removed, with a warning.

        Raises:
            InputError: a product's entry was altered.
        """
        entries: dict[Key, bytes] = {}
        where = "" if keys is None else f"WHERE key IN ({', '.join('?' * len(keys))})"
        with self._errors():
            entries, altered = _whole(self._database.execute(f"{ALL} {where} ORDER BY rowid", keys or ()))
            if altered and not self._is_cache:
                raise _altered(self.path, altered, self.remedy)
            if altered:
                warnings.warn(f"{self.path} holds damaged {self.noun}: these are computed anew", stacklevel=3)
                self._database.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in altered])
        return entries

    def add(self, entries: Mapping[Any, bytes]) -> None:
        """Keep these entries, all or none; an entry replaces that of the same key.

        Raises:
            InputError: a product's file cannot be written.
        """
        rows = [(key, value, _checksum(key, value)) for key, value in entries.items()]
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _errors(self) -> AbstractContextManager[None]:
        return self._or_memory() if self._is_cache else _named(self.path, self.noun, self.remedy)

    @contextmanager
    def _or_memory(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the system, JSON and SQLite
            self._open()
            told = f"the cache of {self.noun}, {self.path}, cannot be used ({error})"
            if _told.setdefault(self.path.parent, told) is told:  # one warning for all files of the folder
                warnings.warn(f"{told}: delete it or set MIXDPO_CACHE; the run goes on", stacklevel=4)


def open_cache(folder: str, head: Mapping[str, Any], noun: str) -> Store:
    """The cache of entries that depend on `head`: a file of their own in `$MIXDPO_CACHE/FOLDER`."""
    name = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:32]
    return Store(cache_root() / folder / f"{name}.sqlite", head, noun=noun, cache=True)


def read_store(path: str | Path, noun: str, remedy: str) -> tuple[dict[str, Any], dict[Key, bytes]]:
    """Head and entries of a product's file.

    Raises:
        InputError: the file holds something else, is damaged, or a process is writing to the file.
    """
    with _named(path, noun, remedy), closing(sqlite3.connect(path, timeout=PATIENCE)) as database:
        head = _head(database)
        if head.get("entries") != noun:
            raise InputError(f"{path} holds {head.get('entries')}, not {noun}: {remedy}")
        entries, altered = _whole(database.execute(f"{ALL} ORDER BY rowid"))
    if altered:
        raise _altered(path, altered, remedy)
    return head, entries


@contextmanager
def _named(path: str | Path, noun: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        kind = getattr(error, "sqlite_errorname", "")
        if kind.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            message = f"another process is writing to {path}: wait until it ends, or give another place"
        elif kind.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_ERROR")):
            message = f"{path} is no file of {noun}, or is damaged ({error}): {remedy}"
        else:
            message = f"cannot write {path} ({error}): make room or give another place; the same command continues"
        raise InputError(message) from None


def _head(database: sqlite3.Connection) -> dict[str, Any]:
    (content,) = database.execute("SELECT content FROM head").fetchone()
    return parse_json(content, "the head of an SQLite file by mixdpo")


def _whole(rows: Iterable[tuple[Key, bytes, bytes]]) -> tuple[dict[Key, bytes], list[Key]]:
    """The entries that are as they were added, and the keys of the other entries."""
    all_rows = list(rows)
    entries = {key: value for key, value, checksum in all_rows if checksum == _checksum(key, value)}
    return entries, [key for key, *_ in all_rows if key not in entries]


def _checksum(key: Key, value: bytes) -> bytes:
    return hashlib.sha256(repr((key, value)).encode()).digest()[:16]


def _altered(path: str | Path, keys: list[Key], remedy: str) -> InputError:
    return InputError(f"{path} was altered or is damaged in {len(keys)} entries (first: {keys[0]!r}): {remedy}")
