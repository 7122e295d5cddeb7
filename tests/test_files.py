"""Files and folders are written whole or not at all."""

import os
import time
import traceback
from pathlib import Path

import pytest

from mixdpo.errors import InputError
from mixdpo.storage.files import written_whole
from mixdpo.storage.identity import named_files


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
