"""Output files and verdicts files: what they hold, and what is refused."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Server
from judging import Judging, in_turn

from mixdpo.errors import InputError
from mixdpo.evaluation.formats import read_responses
from mixdpo.evaluation.judge import match
from mixdpo.evaluation.verdicts import VERDICTS, read_verdicts
from mixdpo.storage.lines_file import LinesWriter


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(in_turn) as server:
        yield server


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"model": "other"}, "model: m there, other here"),
        ({"order": "both"}, "order: random there, both here"),
        ({"max_tokens": 2}, "max_tokens: 1 there, 2 here"),
    ],
)
def test_verdicts_of_another_judgement_are_left_alone(server, tmp_path, change, said):
    judging = Judging(tmp_path, server.url)
    judging(limit=1)
    before = judging.path.read_bytes()
    with pytest.raises(InputError, match=said):
        judging(**change)
    text = Path(judging.options["responses"]).read_text()
    Path(judging.options["responses"]).write_text(text.replace("model response 5", "model response six"))
    with pytest.raises(InputError, match="outputs: "):
        judging()
    assert judging.path.read_bytes() == before


@pytest.mark.parametrize("content", ["something\n", "something", '{"format": "mixdpo margins 1"}\n', "[]\n"])
def test_another_file_is_left_alone(server, tmp_path, content):
    judging = Judging(tmp_path, server.url)
    judging.path.write_text(content)
    with pytest.raises(InputError, match="no verdicts file"):
        judging()
    with pytest.raises(InputError, match="no verdicts file"):
        read_verdicts(judging.path)
    assert judging.path.read_text() == content


def test_a_line_that_was_cut_off_is_asked_again(server, tmp_path):
    judging = Judging(tmp_path, server.url)
    judging(concurrency=1)
    whole = judging.path.read_bytes()
    header, *_, last = whole.splitlines(keepends=True)
    for cut in (1, len(last) // 2, len(last) - 1):  # the line break alone may be missing
        judging.path.write_bytes(whole[: len(whole) - cut])
        assert len(judging.verdicts) == 5
        server.requests.clear()
        assert judging() == 0 and server.asked == [5]
        assert judging.path.read_bytes() == whole
    for start in (b"", header[:20], header[:-1]):
        judging.path.write_bytes(start)
        assert judging(limit=1) == 0 and judging.path.read_bytes().startswith(header)


@pytest.mark.parametrize(
    "change", [{"preference": 1.5}, {"index": 6}, {"order": "x"}, {"preference": None}, {"failed": "x"}, {"index": "0"}]
)
def test_a_damaged_line(server, tmp_path, change):
    judging = Judging(tmp_path, server.url)
    judging()
    lines = judging.path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    judging.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="line 3 is damaged"):
        judging()
    assert judging.path.read_text() == "\n".join(lines) + "\n"


def test_one_judge_at_a_time(server, tmp_path):
    judging = Judging(tmp_path, server.url)
    judging(limit=1)
    with (
        LinesWriter(judging.path, VERDICTS, read_verdicts(judging.path).header),
        pytest.raises(InputError, match="another"),
    ):
        judging()
    assert judging() == 0


def test_a_full_disk(server, tmp_path):
    """Half a line fits: the next call finds the whole ones and goes on."""
    judging = Judging(tmp_path, server.url)
    assert judging(limit=2) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (_, verdict) = read_verdicts(judging.path).verdicts
    with LinesWriter(judging.path, VERDICTS, read_verdicts(judging.path).header) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (judging.path.stat().st_size + 50, before[1]))
        try:
            with pytest.raises(InputError, match=r"cannot write .*the same command continues"):
                writer.append(verdict.line())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert judging.lines() == 2 and not judging.path.read_bytes().endswith(b"\n")
    assert judging() == 0 and judging.lines() == len(judging.verdicts) == 6


def test_no_file():
    with pytest.raises(InputError, match="no verdicts file"):
        read_verdicts("/nowhere/v.jsonl")


def row(instruction: str, output: str = "", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, "generator": "g", **more}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("{", "row 1: cannot be read: JSONDecodeError"),
        ({}, "row 1: 'instruction' should be text"),
        ([], "holds no responses"),
        ([row("a"), 3], "row 2: cannot be read: ValueError: a row should be an object"),
        ([row("a"), {"instruction": "b", "output": None, "generator": "g"}], "row 2: 'output' should be text"),
        ([row("a", output="\ud83d")], "row 1: 'output' holds half a surrogate pair"),
        ([row("a"), row("b", generator="h")], "row 2: the generator is 'h'"),
        ([row("a", tokens="3")], "row 1: 'tokens'"),
        ([row("a", ended=1)], "row 1: 'ended'"),
    ],
)
def test_malformed_responses(tmp_path, rows, said):
    path = tmp_path / "outputs.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(InputError, match=said):
        read_responses(path)
    with pytest.raises(InputError, match="No such file"):
        read_responses(tmp_path / "none.json")


def test_matching_by_instruction(tmp_path):
    """In another order, with further instructions, and one asked twice: the k-th belongs to the k-th."""
    paths = [tmp_path / "m.json", tmp_path / "b.json"]
    paths[0].write_text(json.dumps([row("b", "m0"), row("a", "m1"), row("a", "m2")]))
    paths[1].write_text(json.dumps([row("a", "b0"), row("c", "b1"), row("b", "b2"), row("a", "b3")]))
    model, baseline = map(read_responses, paths)
    pairs = [(c.index, c.model, c.baseline) for c in match(model, baseline, "b.json")]
    assert pairs == [(0, "m0", "b2"), (1, "m1", "b0"), (2, "m2", "b3")]
    with pytest.raises(InputError, match=r"b.json lacks 1 of the 3 instructions \(first: row 3, 'a'\)"):
        match(model, baseline[:3], "b.json")
