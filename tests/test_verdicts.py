"""Output files and verdicts files: what they hold, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Server
from judging import Judging, in_turn

from mixdpo.errors import InputError
from mixdpo.evaluation.formats import read_responses
from mixdpo.evaluation.judge import match
from mixdpo.evaluation.verdicts import VerdictsWriter, read_verdicts
from mixdpo.storage import store


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(in_turn) as server:
        yield server


def test_verdicts_of_another_judgement_are_left_alone(server, tmp_path):
    judging = Judging(tmp_path, server.url)
    judging(limit=1)
    before = judging.path.read_bytes()
    for name, old, new in (("seed", 0, 1), ("model", "m", "other"), ("order", "random", "both")):
        with pytest.raises(InputError, match=rf"{name}: {old} there, {new} here.*give another --out"):
            judging(**{name: new})
    text = Path(judging.options["responses"]).read_text()
    Path(judging.options["responses"]).write_text(text.replace("response 5", "response six"))
    with pytest.raises(InputError, match="outputs: "):
        judging()
    assert judging.path.read_bytes() == before


def test_another_file_is_left_alone(server, tmp_path):
    judging = Judging(tmp_path, server.url)
    judging.path.write_text("something\n")
    for use in (judging, lambda: read_verdicts(judging.path)):
        with pytest.raises(InputError, match="is no file of verdicts"):
            use()
    assert judging.path.read_text() == "something\n"
    with pytest.raises(InputError, match="no verdicts file"):
        read_verdicts("/nowhere/v.sqlite")


def test_one_judge_at_a_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    judging = Judging(tmp_path, server.url)
    judging(limit=1)
    with VerdictsWriter(judging.path, read_verdicts(judging.path)[0]):
        for use in (judging, lambda: read_verdicts(judging.path)):
            with pytest.raises(InputError, match="another process is writing"):
                use()
    assert judging() == 0 and len(judging.verdicts) == 6


def row(instruction: str, output: str = "", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, "generator": "g", **more}


@pytest.mark.parametrize(("rows", "said"), [
    ("{", "row 1: cannot be read: JSONDecodeError"),
    ({}, "row 1: 'instruction' should be text"),
    ([], "holds no responses"),
    ([row("a"), {"instruction": "b", "output": None, "generator": "g"}], "row 2: 'output' should be text"),
    ([row("a", output="\ud83d")], "row 1: 'output' holds half a surrogate pair"),
    ([row("a"), row("b", generator="h")], "row 2: the generator is 'h'"),
    ([row("a", tokens="3")], "row 1: 'tokens'"),
    ([row("a", ended=1)], "row 1: 'ended'"),
])  # fmt: skip
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
    with pytest.raises(InputError, match=r"b.json lacks the instruction of row 3, 'a'"):
        match(model, baseline[:3], "b.json")
