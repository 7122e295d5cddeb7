"""A conversation in the terminal: who has read what, and how a response ends."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from test_export import write_run

import mixdpo.evaluation.chat as room


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str, terminal: bool = False) -> None:
    typed = io.StringIO("".join(f"{line}\n" for line in lines))
    typed.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", typed)


@pytest.fixture
def asked(monkeypatch):
    asked = []  # (role, contents of its messages) of each response

    def respond(model, tokenizer, prompts, **options):
        asked.append((model.name, " ".join(message["content"] for message in prompts[0])))
        if (last := prompts[0][-1]["content"]) in ("stop", "long"):
            raise KeyboardInterrupt if last == "stop" else room.InputError("exceed the model's 256 positions")
        return [[SimpleNamespace(text=f"r{len(asked)}", ended=last != "cut")]]

    monkeypatch.setattr(room, "load_policy", lambda name: (SimpleNamespace(), None))
    monkeypatch.setattr(room, "generate", respond)
    monkeypatch.setattr(room, "role", lambda model, name: nullcontext(setattr(model, "name", name)))
    return asked


def test_each_reads_its_own_responses(asked, monkeypatch, capsys):
    type_in(monkeypatch, "a", "", "/base", "b", "cut", "/base", "c", "/new", "d", "/quit", "e")
    room.chat("run", system="s", max_new_tokens=9)
    both = [("base", "s a r1 b"), ("policy", "s a r1 b"), ("base", "s a r1 b r2 cut"), ("policy", "s a r1 b r3 cut")]
    assert asked == [("policy", "s a"), *both, ("policy", "s a r1 b r3 cut r5 c"), ("policy", "s d")]
    assert capsys.readouterr().err == 2 * "(cut at max_new_tokens 9)\n"


@pytest.mark.parametrize("fault", ["stop", "long"])
def test_a_turn_that_fails_is_forgotten_on_a_terminal_only(fault, asked, monkeypatch, capsys):
    type_in(monkeypatch, "a", fault, "b", terminal=True)
    room.chat("run")  # ends with the input
    assert [text for _, text in asked] == ["a", f"a r1 {fault}", "a r1 b"]
    assert ("not kept. exceed" in capsys.readouterr().err) == (fault == "long")
    type_in(monkeypatch, fault)
    with pytest.raises(KeyboardInterrupt if fault == "stop" else room.InputError):
        room.chat("run")


def test_a_run_in_a_script(tiny_model, tmp_path, monkeypatch, capsys):
    run, options = str(write_run(tmp_path / "run", tiny_model, 0.5)), {"max_new_tokens": 20, "temperature": 0.0}
    (model, tokenizer), wanted, taken = room.load_policy(run), [], []
    monkeypatch.setattr("mixdpo.evaluation.generation.LOOK", {"cpu": 16})  # as on a GPU
    stream = SimpleNamespace(put=lambda token: taken.append(token.shape))
    for name in ("base", "policy"):
        with room.role(model, name):
            wanted += room.generate(model, tokenizer, ["red tea"], batch_size=1, stream=stream, **options)[0]
    assert taken == [(1,)] * sum(each.tokens for each in wanted) and wanted[0].text != wanted[1].text
    type_in(monkeypatch, "red tea")
    room.chat(run, base=True, **options)
    assert capsys.readouterr().out == "base: {.text}\npolicy: {.text}\n".format(*wanted)
    room.Shown(tokenizer).on_finalized_text("\x1b[2J\r\x9b1A\u202eok\t\u00e9\n", stream_end=True)
    assert capsys.readouterr().out == "[2J1Aok\té\n\n"
