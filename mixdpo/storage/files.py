"""Files and folders that appear whole or not at all."""

import csv
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.storage.read import parse_json, parse_yaml

Row = dict[str, Any]


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to, which takes its place when the block ends.

    After an error `path` is what it was. Several processes may write to `path` at once: the last one to end counts.
    A killed process leaves a temporary file or folder beside `path`, called `.`, 16 random hex digits, `-` and the name
    of `path`. A later write to the same path removes it, once it is a day old: until then its process may be alive. The
    temporary name ends as `path` does, because numpy and others append a suffix where it is missing.

    Raises:
        InputError: the folder above cannot be made, or a file would replace a folder.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Give another place") from None
    for left in path.parent.glob(f".{'[0-9a-f]' * 16}-*"):
        with suppress(OSError):  # another process may remove it as well
            if left.name[18:].removesuffix("-old") == path.name and time.time() - left.stat().st_mtime > 24 * 3600:
                _remove(left)
    partial = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    try:
        yield partial
        if path.is_dir() and not partial.is_dir():
            raise InputError(f"cannot write the file {path}, which is a folder: give a file's name")
        replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(partial: Path, path: Path) -> None:
    """`partial` takes the place of `path`, once its content is on the disk: after a power cut one of both is whole."""
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    old = path.with_name(f"{partial.name}-old")
    while partial.exists():
        try:
            partial.rename(path)
        except OSError as error:  # a folder cannot be renamed onto one that holds something
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _remove(old)
            with suppress(FileNotFoundError):  # another process may have moved it away
                path.rename(old)
    _remove(old)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; so do `write_json`, `write_rows` (.jsonl) and `write_csv`."""
    with written_whole(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_text(path: str | Path) -> str:
    """
    Raises:
        InputError: there is no such file, or the file is no text in UTF-8.
    """
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Give a text file in UTF-8") from None


def read_json(path: str | Path, keys: set[str], remedy: str) -> dict[str, Any]:
    """The JSON object in a file that mixdpo wrote.

    Raises:
        InputError: the file is damaged or lacks one of the keys; ends with the remedy.
    """
    content = parse_json(read_text(path), f"{path} is damaged: the file", remedy)
    if not isinstance(content, dict) or not keys <= content.keys():
        raise InputError(f"{path} is damaged (it should hold {', '.join(sorted(keys))}): {remedy}")
    return content


def read_yaml(path: str | Path, noun: str = "config") -> Any:
    """What `parse_yaml` makes of a file; raises InputError as `parse_yaml` does."""
    return parse_yaml(read_text(path), f"{noun} {path}")


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_array(path: str | Path, shape: tuple[int, ...], remedy: str) -> np.ndarray:
    """A memory-mapped .npy file that mixdpo wrote.

    Raises:
        InputError: the file is damaged, or of another shape; ends with the remedy.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from None
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {array.dtype} of the shape {array.shape}, not numbers of {shape}: {remedy}")
    return array


def cache_root() -> Path:
    return Path(os.environ.get("MIXDPO_CACHE") or Path.home() / ".cache" / "mixdpo").expanduser()
