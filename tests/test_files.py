"""Files and folders are written whole or not at all."""

import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mixdpo.errors import InputError
from mixdpo.storage import store
from mixdpo.storage.files import read_yaml, written_whole
from mixdpo.storage.identity import named_files
from mixdpo.storage.read import parse_json, parse_yaml
from mixdpo.storage.store import Store, read_store


def put(path, folder, name, content=None):
    """A file, or a folder with one file."""
    if folder:
        path.mkdir()
    (path / name if folder else path).write_text(content or name)


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_there_stays_at_an_error_and_is_replaced_without_one(tmp_path, folder):
    path = tmp_path / "a"
    put(path, folder, "old")
    with pytest.raises(RuntimeError), written_whole(path) as partial:
        put(partial, folder, "half")
        raise RuntimeError
    assert (path / "old" if folder else path).read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with written_whole(path) as partial:
        put(partial, folder, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [p.name for p in path.iterdir()] == ["new"] if folder else path.read_text() == "new"


@pytest.mark.parametrize("left", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path, left, folder):
    path = tmp_path / "a"

    def leave(name, age):
        put(tmp_path / name, left, "half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)

    day = 24 * 3600.0
    leave(".0123456789abcdef-a", day + 60)
    leave(".0123456789abcdef-a-old", day + 60)
    leave(".fedcba9876543210-a", day - 60)  # its process may be alive
    leave(".fedcba9876543210-ba", day + 60)  # of another path
    for content in ("first", "second"):
        with written_whole(path) as partial:
            put(partial, folder, "new", content)
    assert (path / "new" if folder else path).read_text() == "second"
    assert {p.name for p in tmp_path.iterdir()} == {"a", ".fedcba9876543210-a", ".fedcba9876543210-ba"}


def write_folders(path, mark, rounds):
    for number in range(rounds):
        with written_whole(path) as partial:
            partial.mkdir()
            for name in "xyz":
                (partial / name).write_text(f"{mark} {number}")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_of_one_number_write_one_folder_at_once(tmp_path, monkeypatch):
    """As in two containers; what is there whenever one of them ends is whole."""
    path, children = tmp_path / "new" / "a", []
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for mark in ("one", "other"):
        child = os.fork()
        if child == 0:
            try:
                write_folders(path, mark, 40)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    contents = {name: (path / name).read_text() for name in "xyz"}
    assert len(set(contents.values())) == 1 and [p.name for p in path.parent.iterdir()] == ["a"]


def test_a_folder_that_another_process_puts_there_first_is_replaced(tmp_path, monkeypatch):
    """At the worst moment: after the old one was moved away, and before ours takes its place."""
    path, rename = tmp_path / "a", Path.rename
    write_folders(path, "old", 1)

    def racing(self, target):
        if self.name == "a" and not (tmp_path / "raced").exists():
            (tmp_path / "raced").touch()
            rename(self, target)
            write_folders(path, "other", 1)
        else:
            rename(self, target)

    monkeypatch.setattr(Path, "rename", racing)
    write_folders(path, "ours", 1)
    assert (path / "x").read_text() == "ours 0" and {p.name for p in tmp_path.iterdir()} == {"a", "raced"}


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "a").write_text("file")
    with pytest.raises(NotADirectoryError):
        write_folders(tmp_path / "a", "folder", 1)
    assert (tmp_path / "a").read_text() == "file" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_files_that_options_and_their_configs_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of.yaml").write_text("# comment.txt\ndata: {source: my pairs.jsonl}\nmade: 2026-11-25\n")
    for name in ("my pairs.jsonl", "comment.txt", "a.txt", "b c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_model.safetensors").write_text("weights")
    options = ["of.yaml", '["a.txt", "no.txt"]', "{adapter: peft}", '{"x": "b c.txt"}', "0.5"]
    before = named_files(options)
    assert sorted(before) == ["a.txt", "b c.txt", "my pairs.jsonl", "of.yaml", "peft"]
    (tmp_path / "my pairs.jsonl").write_text("others")
    assert {name for name, _ in before.items() ^ named_files(options).items()} == {"my pairs.jsonl"}
    (tmp_path / "of.yaml").write_text("[")
    with pytest.raises(InputError, match=r"of\.yaml is no valid YAML"):
        named_files(options)


@pytest.mark.parametrize(("text", "said"), [
    ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
    ("[NaN]", "NaN is no finite number"),
    ("[1e999]", "1e999 is no finite number"),
    ("[" * 100_000, "nested too deeply"),
    ("9" * 5000, "digits"),
    (b'["\xff"]', "utf-8"),
    ("", "Expecting value"),
])  # fmt: skip
def test_json_that_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match=f"^the body .*{said}.*: ask again"):
        parse_json(text, "the body", "ask again")


@pytest.mark.parametrize(("text", "said"), [
    ("data: {a: 1}\ntrainer: {}\ndata: {b: 2}\n", "the key 'data' stands twice, in line 1 and again, line 3"),
    ("{[1]: 2}", "a key is a list or a mapping, line 1"),
    ("a: 1:30", "1:30 is a number or a text"),
    ("a: 1_0", "1_0 is a number or a text"),
    ("a: 010", "010 is a number or a text"),
    ("a:\n  - .nan", ".nan is no finite number, line 2"),
    ("a: !!python/name:os.system", "constructor"),
    ("--- 1\n--- 2", "single document"),
])  # fmt: skip
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^config c is no valid YAML .*{said}.*: correct it"):
        parse_yaml(text, "config c")


def test_what_is_read(tmp_path: Path) -> None:
    text = "{a: '1:30', b: 1e-4, c: .5, d: -3, e: 2026-11-25, f: 0x1F, g: yes, h: &h [1.], i: *h, j: ~, k: 1e3x}"
    expected = {"a": "1:30", "b": 1e-4, "c": 0.5, "d": -3, "e": "2026-11-25", "f": 31, "g": True}
    (tmp_path / "c.yaml").write_text(text)
    assert read_yaml(tmp_path / "c.yaml") == {**expected, "h": [1.0], "i": [1.0], "j": None, "k": "1e3x"}
    assert parse_yaml("base: {a: 1}", "x") == {"base": {"a": 1}} and parse_yaml("# nothing", "x") is None
    assert parse_yaml("- &b {a: 1, c: 2}\n- {<<: *b, a: 3}", "x")[1] == {"a": 3, "c": 2}
    assert parse_json('{"a": [1, 2.5, "b", null]}', "x") == {"a": [1, 2.5, "b", None]}
    assert parse_yaml(".inf", "x", finite=False) == float("inf")


# The keyed store: whole or not at all, one process at a time, and nothing of another file is touched.
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
