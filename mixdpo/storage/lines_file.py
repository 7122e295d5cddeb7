"""Files that grow line by line: JSON lines, the first a header that says what the others are and depend on.

The process that writes one holds a lock on it, and what it has appended is on the disk, so that after a kill the same
command goes on. A line that was cut off is left out and, by the next writer, cut away: in place, as the lock is on this
file and one that took its place would have none.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixdpo.errors import InputError
from mixdpo.storage.identity import differences

PATIENCE = 8.0  # seconds: loader workers outlive a killed process by about five


Content = tuple[dict[str, Any], dict[Any, Any]]
"""Header, and what each key's last line says."""


@dataclass(frozen=True)
class LineFormat:
    """What a kind of such files holds.

    Attributes:
        name: the header's `format`.
        noun: what the file is, for errors.
        rows: what its lines are, for errors.
        header: what every header says beside its format, and its type.
        parse: (a line's object, the header) -> key and value; raises ValueError, KeyError or TypeError on damage.
        remedy: what to do about a damaged file.
        other: what to do about a file of other content.
    """

    name: str
    noun: str
    rows: str
    header: Mapping[str, type]
    parse: Callable[[dict[str, Any], dict[str, Any]], tuple[Any, Any]]
    remedy: str
    other: str

    def read(self, path: str | Path) -> Content:
        """All complete lines.

        Raises:
            InputError: the file cannot be read, is of another kind, or a line of it is damaged.
        """
        try:
            return self.content(path, Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None

    def content(self, path: str | Path, content: bytes) -> Content:
        first, *lines = content.split(b"\n")[:-1] or [b""]
        try:
            header = self._header(first)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no {self.noun}, or is damaged ({type(error).__name__}: {error}): {self.remedy}"
            ) from None
        found = {}
        for number, line in enumerate(lines, 2):
            try:
                key, value = self.parse(json.loads(line), header)
            except (ValueError, KeyError, TypeError) as error:
                said = f"{type(error).__name__}: {error}"
                raise InputError(f"{path}, line {number} is damaged ({said}): {self.remedy}") from None
            found[key] = value
        return header, found

    def _header(self, line: bytes) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(line)
        if header["format"] != self.name:
            raise ValueError(f"its format is {header['format']!r}")
        if lacking := self.header.keys() - header.keys():
            raise ValueError(f"its first line lacks {', '.join(sorted(lacking))}")
        if wrong := [name for name, kind in self.header.items() if not isinstance(header[name], kind)]:
            raise ValueError(f"`{wrong[0]}` is {header[wrong[0]]!r}")
        return header

    def refuse_other(self, path: str | Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """
        Raises:
            InputError: two headers say different things, `date` aside; names each.
        """
        if changed := differences({**there, "date": None}, {**here, "date": None}):
            raise InputError(f"{path} holds other {self.rows} ({'; '.join(changed)}): {self.other}")


class LinesWriter:
    def __init__(self, path: str | Path, kind: LineFormat, header: Mapping[str, Any]) -> None:
        """Goes on with a file, or makes it.

        Args:
            header: what `kind.header` lists and more, in JSON's types; that of the file must say the same.

        Raises:
            InputError: the file holds other lines or something else, or another process is writing to it.
        """
        self.path, self.kind = Path(path), kind
        header = json.loads(json.dumps({"format": kind.name, **header}))
        self._file = self._open()
        try:
            self._begin((json.dumps(header) + "\n").encode())
            self._file.seek(0)
            content = self._file.read()
            self.header, self.rows = kind.content(path, content)
            kind.refuse_other(path, self.header, header)
            self._file.truncate(content.rfind(b"\n") + 1)
        except BaseException:
            self.close()
            raise

    def append(self, *lines: Mapping[str, Any]) -> None:
        """On the disk when this returns."""
        self._write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.rows |= (self.kind.parse(json.loads(json.dumps(line)), self.header) for line in lines)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "LinesWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        """The file, locked as long as it is open. What a killed process had started may hold it a while longer."""
        until = time.monotonic() + PATIENCE
        while (file := self._locked()) is None:
            if time.monotonic() > until:
                raise InputError(
                    f"another process is writing to {self.path}: wait until it is done, or give another place"
                )
            time.sleep(0.2)
        return file

    def _locked(self) -> Any:
        """None while another process holds the lock, or has put another file there since this one was opened."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}. Give another place") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
        except BlockingIOError:
            pass
        except OSError as error:
            file.close()
            raise InputError(
                f"{self.path} cannot be locked: its file system has no locks ({error.strerror}). Give another place"
            ) from None
        file.close()
        return None

    def _begin(self, header: bytes) -> None:
        """Write the header to a file that is new, or whose header was being written when its process was killed."""
        self._file.seek(0)
        there, known = self._file.read(), header.partition(b",")[0]
        if b"\n" not in there and there[: len(known)] == known[: len(there)]:
            self._file.truncate(0)
            self._write(header)

    def _write(self, lines: bytes) -> None:
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self.close()  # nothing may follow a line that was cut off
            raise InputError(
                f"cannot write {self.path}: {error.strerror}. Make room there; the same command continues"
            ) from None
