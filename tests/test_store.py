"""The keyed store: whole or not at all, one process at a time, and nothing of another file is touched."""

import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mixdpo.errors import InputError
from mixdpo.storage import store
from mixdpo.storage.store import Store, read_store


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.3)


def open_verdicts(path: Path, **head: Any) -> Store:
    return Store(path, {"base": "b", **head}, noun="verdicts", remedy="judge anew")


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


def test_entries_come_back_by_key_and_in_the_order_they_came(tmp_path: Path) -> None:
    with open_verdicts(tmp_path / "new/v") as verdicts:
        verdicts.add({"b": b"1", b"k": b"2"})
        verdicts.add({7: b"3", "b": b"4"})  # the last one of a key counts
        assert verdicts.get(["b", 7, "none"]) == {"b": b"4", 7: b"3"}
    head, entries = read_store(tmp_path / "new/v", "verdicts", "")
    assert head["base"] == "b" and entries == {b"k": b"2", 7: b"3", "b": b"4"}
    with open_verdicts(tmp_path / "new/v") as verdicts:
        assert verdicts.get() == entries
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open_verdicts(tmp_path / "v"):
        for use in (lambda: open_verdicts(tmp_path / "v"), lambda: read_store(tmp_path / "v", "verdicts", "")):
            with pytest.raises(InputError, match=r"another process is writing to .*v: wait"):
                use()
    open_verdicts(tmp_path / "v").close()


def test_a_second_process_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process' children hold its file a little longer."""
    monkeypatch.setattr(store, "PATIENCE", 20.0)
    first, opened = open_verdicts(tmp_path / "v"), []

    def second() -> None:
        with open_verdicts(tmp_path / "v") as verdicts:
            opened.append(verdicts.path)

    waiting = threading.Thread(target=second)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not opened
    first.close()
    waiting.join()
    assert opened == [tmp_path / "v"]


KILLED = """
import os, sys
from mixdpo.storage.store import Store
store = Store(sys.argv[1], {"base": "b"}, noun="verdicts")
store.add({"whole": b"1"})
store._database.execute("BEGIN IMMEDIATE")
store._database.execute("PRAGMA cache_spill = 1"), store._database.execute("PRAGMA cache_size = 1")
for number in range(400):
    store._database.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, b"x" * 4000, b""))
os.kill(os.getpid(), 9)
"""


def test_a_process_that_is_killed_in_a_batch_leaves_the_whole_ones(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "v")]
    assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == -9
    assert (tmp_path / "v").stat().st_size > 100_000  # pages of the cut batch are in the file
    with open_verdicts(tmp_path / "v") as verdicts:
        assert verdicts.get() == {"whole": b"1"}


TEXT, TABLE = "some text, long enough to be looked at " * 9, "CREATE TABLE people (name TEXT)"
ALTERED = "UPDATE entries SET value = x'35' WHERE key = 'a'"
SWAPPED = "UPDATE entries SET key = CASE key WHEN 'a' THEN 'c' ELSE 'a' END"


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: path.write_text(TEXT), "is no file of verdicts, or is damaged"),
    (lambda path: (path.unlink(), change(path, TABLE)), "is no file of verdicts, or is damaged .*no such table"),
    (lambda path: (path.unlink(), Store(path, {"base": "b"}, noun="responses").close()), "responses"),
    (lambda path: change(path, ALTERED), r"altered or is damaged in 1 entries \(first: 'a'\)"),
    (lambda path: change(path, SWAPPED), "altered or is damaged in 2 entries"),
])  # fmt: skip
def test_what_is_not_ours_or_not_whole_is_left_alone(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "v"
    with open_verdicts(path) as verdicts:
        verdicts.add({"a": b"1", "b": b"2"})
    damage(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=said + ".*: judge anew"), open_verdicts(path) as verdicts:
        verdicts.get()
    with pytest.raises(InputError, match=said + ".*: judge anew"):
        read_store(path, "verdicts", "judge anew")
    assert path.read_bytes() == before


def test_entries_that_depend_on_something_else(tmp_path: Path) -> None:
    open_verdicts(tmp_path / "v", judge={"seed": 0}).close()
    with pytest.raises(InputError, match=r"holds other verdicts \(judge.seed: 0 there, 1 here\): judge anew"):
        open_verdicts(tmp_path / "v", judge={"seed": 1})


def test_a_full_disk(tmp_path: Path) -> None:
    """Nothing of the batch is there, and the next one goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_verdicts(tmp_path / "v") as verdicts:
        verdicts.add({"a": b"1"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(InputError, match=r"cannot write .*v .*make room.*the same command continues"):
                verdicts.add({"b": b"2", "c": b"x" * 100_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        verdicts.add({"d": b"3"})
        assert verdicts.get() == {"a": b"1", "d": b"3"}


@pytest.mark.parametrize("place", ["file/v", "folder"])
def test_a_place_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*give another place"):
        open_verdicts(tmp_path / place)
