"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to, which takes its place when the block ends.

    After an error `path` is what it was. What a killed process leaves has a name that starts with a dot. A name ends as
    `path` does, because numpy and others append a suffix where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def replace(partial: Path, path: Path) -> None:
    """`partial` takes the place of `path`, once its content is on the disk: after a power cut one of both is whole."""
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    if path.is_dir():
        old = path.with_name(f"{partial.name}-old")  # a folder cannot be renamed onto one that holds something
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
