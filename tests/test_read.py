"""The strict reader: what JSON and YAML from outside may not do."""

from pathlib import Path

import pytest

from mixdpo.errors import InputError
from mixdpo.storage.files import read_yaml
from mixdpo.storage.read import parse_json, parse_yaml

NINES = (f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(NINES)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


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
    ("[" * 100_000, "nested too deeply"),
    ("&a [*a]", "aliases expand too far"),
    (BOMB, "aliases expand too far"),
    (CHAIN, "aliases expand too far"),
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
