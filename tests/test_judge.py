"""Judging through a real HTTP server: every prompt ends judged or listed with its reason, whatever the server does."""

import json
import math
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import Server, completion
from judging import Judging, ServerProcess, ends_with, in_turn, wait_for

import mixdpo
from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import _printable, secrets, without_secrets
from mixdpo.evaluation.formats import read_responses
from mixdpo.evaluation.judge import drawn_order, match
from mixdpo.evaluation.score import score
from mixdpo.evaluation.verdicts import Verdict, VerdictsWriter, first_by_log_probs, messages, read_choice, read_verdicts

KEY = "sk-secret-0123456789"
PAIRS = Path(mixdpo.__file__).parent / "constraints" / "constraints_pairs.jsonl"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(in_turn) as server:
        yield server


def test_judges_all_and_says_what_scoring_needs(server, tmp_path, capsys):
    judging = Judging(tmp_path, server.url)
    assert judging(limit=2) == 0 and len(judging.verdicts) == 2
    assert judging() == 0
    head, verdicts = read_verdicts(judging.path)
    assert head["model"] == "the model" and head["baseline"] == "the baseline"
    assert head["prompts"] == 6 and head["judge"]["base_url"] == server.url
    assert [verdict.index for verdict in verdicts] == list(range(6))
    for i, verdict in enumerate(verdicts):
        assert verdict.preference == pytest.approx(0.1 if i % 2 else 0.9)
        assert (verdict.source, verdict.failed, verdict.tokens, verdict.ended) == ("log_probs", None, i, i % 2 == 0)
        assert (verdict.len_model, verdict.len_baseline) == (len(f"model response {i}"), len(f"baseline response {i}"))
        assert verdict.order == drawn_order(f"prompt-{i}: say it", 0)
    printed = capsys.readouterr().out
    assert "judged 6 of 6, failed 0" in printed
    assert f"python -m mixdpo score {judging.path}" in printed
    body = server.requests[0].body
    assert (body["temperature"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (0, 1, True, 20)
    assert judging() == 0 and len(server.requests) == 6  # nothing is asked again


def test_what_passes_is_tried_again(tmp_path):
    """What the openai client repeats, Retry-After included."""
    passing = ["wait 1", "until 2", "status 500", "status 408", "cut", "drop"]
    with Server(in_turn, {i: [fault, fault] for i, fault in enumerate(passing)}) as server:
        judging = Judging(tmp_path, server.url, len(passing), attempts=3, concurrency=len(passing))
        assert judging() == 0
        assert Counter(server.asked) == dict.fromkeys(range(len(passing)), 3)
        for i in (0, 1):
            first, second, _ = (request.time for request in server.requests if request.number == i)
            assert 0.995 <= second - first < 60
    assert all(v.preference == pytest.approx(0.1 if v.index % 2 else 0.9) for v in judging.verdicts.values())


def test_a_request_that_hangs(tmp_path):
    """Or drips, so that no two pieces are far apart."""
    with Server(in_turn, {0: ["hang 60!"], 1: ["hang 60"], 2: ["drip 60!"]}) as server:
        judging = Judging(tmp_path, server.url, 4, attempts=2, timeout=2)
        assert judging() == 1
        assert Counter(server.asked) == {0: 2, 1: 2, 2: 2, 3: 1}
    expected = ["time-out: no response in 2 s", None, "time-out: no response in 2 s", None]
    assert [verdict.failed for verdict in judging.verdicts.values()] == expected


LASTING = {
    "status 500!": "HTTP 500: ", "status 429!": "HTTP 429: ", "status 400!": "HTTP 400: ",
    "truncated!": "the response is no valid JSON ", "cut!": "connection lost: ", "drop!": "connection lost: ",
    "refusal!": "refused: 'I cannot help with that.'", "null!": "no text: ",
    "prose!": "no label: 'X is better, I think'", "vague!": "no label among the likeliest tokens: 'The', 'Both'",
    "empty!": "no chat completion: ", "list!": "no chat completion: ", "deep!": "the response is nested too deeply",
    "huge!": "too long: the body has more than 16 MB", "bomb!": "too long: the body has more than 16 MB",
}  # fmt: skip


def test_what_lasts_is_listed_and_asked_again_by_the_next_call(tmp_path, capsys):
    faults = {i: [fault] for i, fault in enumerate(LASTING)}
    count = len(faults)
    with Server(in_turn, faults) as server:
        judging = Judging(tmp_path, server.url, count + 2, attempts=2)
        assert judging() == 1
        again = map(list(LASTING).index, ("status 500!", "status 429!", "cut!", "drop!"))
        assert Counter(server.asked) == dict.fromkeys(range(count + 2), 1) | dict.fromkeys(again, 2)
        found = {verdict.index: verdict for verdict in judging.verdicts.values()}
        for i, reason in enumerate(LASTING.values()):
            assert found[i].preference is None and found[i].source is None
            assert found[i].failed.startswith(reason), (found[i].failed, reason)
        assert all(found[i].failed is None for i in range(count, count + 2))
        printed = capsys.readouterr().out
        assert f"judged 2 of {count + 2}, failed {count}" in printed
        assert "2 x connection lost" in printed and "1 x refused" in printed
        faults.clear()
        server.requests.clear()
        assert judging() == 0
        assert sorted(server.asked) == list(range(count))
    assert all(verdict.failed is None for verdict in judging.verdicts.values())
    assert judging.lines() == count + 2


@pytest.mark.parametrize(("fault", "expected"), [
    ("status 401!", "OPENAI_API_KEY"),
    ("status 404!", "model's name and the server's URL"),
    ("redirect!", "redirects are not followed"),
])  # fmt: skip
def test_what_will_not_pass_ends_it_at_once(tmp_path, fault, expected):
    with Server(in_turn, {4: [fault]}) as server:
        judging = Judging(tmp_path, server.url, 50, concurrency=1)
        with pytest.raises(InputError, match=expected):
            judging()
        assert server.asked == [0, 1, 2, 3, 4]
    assert sorted(index for index, _ in judging.verdicts) == [0, 1, 2, 3]


def test_nothing_to_connect_to(tmp_path):
    with socket.socket() as held:  # so that nobody else takes the port; it does not listen
        held.bind(("127.0.0.1", 0))
        judging = Judging(tmp_path, f"http://127.0.0.1:{held.getsockname()[1]}/v1", attempts=2)
        with pytest.raises(InputError, match=r"cannot be reached.*the same command continues"):
            judging()
    assert judging.verdicts == {}


def test_always_the_first_response(tmp_path, capsys):
    """P(X) = (.8 + .05) / (.8 + .1 + .05)."""
    with Server() as server:
        judging = Judging(tmp_path, server.url, 8)
        assert judging() == 0
        assert {request.order for request in server.requests} == {"model_first", "baseline_first"}
        first = 0.85 / 0.95
        for (index, order), verdict in judging.verdicts.items():
            assert order == drawn_order(f"prompt-{index}: say it", 0)
            assert verdict.preference == pytest.approx(first if order == "model_first" else 1 - first)
        assert judging(order="both", out=str(tmp_path / "both.jsonl")) == 0
    assert "judged 16 of 16" in capsys.readouterr().out
    score(str(tmp_path / "both.jsonl"), samples=2)
    printed = capsys.readouterr().out
    assert "| win rate, % | 50.00 |" in printed and f"shown first, % | {100 * first:.1f} |" in printed
    orders = [drawn_order(f"prompt-{i}", 0) for i in range(400)]
    assert 150 < orders.count("model_first") < 250 and orders != [drawn_order(f"prompt-{i}", 1) for i in range(400)]
    assert len(read_verdicts(tmp_path / "both.jsonl")[1]) == 16


def test_without_log_probs_the_letter_counts(tmp_path):
    with Server(in_turn, log_probs=False) as server:
        judging = Judging(tmp_path, server.url)
        assert judging() == 0
        assert judging(log_probs=False, out=str(tmp_path / "not_asked.jsonl")) == 0
        assert "logprobs" not in server.requests[-1].body
    for verdicts in (judging.verdicts.values(), read_verdicts(tmp_path / "not_asked.jsonl")[1]):
        assert [(v.preference, v.source) for v in verdicts] == [(1.0, "text"), (0.0, "text")] * 3


def test_preference_by_hand():
    """.3 + .2 for X, .1 for Y: 5/6. A label that is not listed has no probability."""
    listed = {"X": math.log(0.3), " x": math.log(0.2), "▁Y": math.log(0.1), "XY": math.log(0.3), "The": -3.0}
    assert first_by_log_probs(listed) == pytest.approx(5 / 6)
    assert first_by_log_probs({"Y": -0.1}) == 0
    refusal = {"I": -0.001, "Sorry": -7.5, "X": -13.2}
    for none in ({"The": -0.1}, refusal, {"X": -9999.0}, {"X": math.nan}, {}):
        with pytest.raises(ValueError, match="no label"):
            first_by_log_probs(none)


def test_the_first_token_that_is_no_white_space():
    body = completion({"Y": 0.6, "X": 0.2}, log_probs=True)
    places = body["choices"][0]["logprobs"]["content"]
    newline = {"token": "\n", "logprob": -0.1, "top_logprobs": [{"token": "X", "logprob": -0.1}]}
    assert read_choice(body) == (pytest.approx(0.25), "log_probs")
    body["choices"][0]["logprobs"]["content"] = [newline, *places]
    assert read_choice(body) == (pytest.approx(0.25), "log_probs")
    places[0]["top_logprobs"][0]["logprob"] = "high"
    with pytest.raises(TypeError):
        read_choice(body)
    # braces in texts are texts
    assert "{first} {0}" in messages("{first} {0}", "{second}", "b")[1]["content"]


@pytest.mark.parametrize("user", ["", "user:pass%20word@"])
def test_the_key_is_nowhere(tmp_path, monkeypatch, capfd, user):
    """Even where a reason is cut off in the middle of the key that a body repeats."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echoes = {i + 2: [f"echo {8 * i}!"] for i in range(25)}
    with Server(in_turn, {0: ["status 500!"], 1: ["status 400!"], **echoes}) as server:
        judging = Judging(tmp_path, server.url.replace("//", f"//{user}"), 27, attempts=1)
        assert judging() == 1
        server.faults[0] = ["status 401!"]
        with pytest.raises(InputError) as raised:
            judging()
        sent = server.authorization.removeprefix("Bearer ").removeprefix("Basic ")
    printed = capfd.readouterr()
    kept = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert "***" in judging.path.read_text(errors="replace") and "***" in str(raised.value)  # the server did repeat it
    assert (sent == KEY) == (user == "")
    for text in (printed.out, printed.err, str(raised.value), *kept):
        assert not any(secret in text for secret in (KEY[:8], sent[:8], "pass%20word", "pass word"))
    assert without_secrets("https://a:b@host:1/v1/?key=c#d") == "https://host:1/v1" and without_secrets("a:b@c") == "c"
    assert {"pass%20word", "pass word"} <= set(secrets(None, "http://user:pass%20word@host/v1"))
    assert _printable("red\x1b[31m\r\nline\u202e\x9b") == "red [31m line"


def test_no_key_and_no_package(tmp_path, monkeypatch):
    judging = Judging(tmp_path, "")
    with pytest.raises(InputError, match=r"OPENAI_API_KEY.*base_url"):
        judging(base_url=None)
    for url in ("localhost:8000/v1", "http://localhost:x/v1", "http://[/v1"):
        with pytest.raises(InputError, match="write it in full"):
            judging(base_url=url)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '.\[judge\]'"):
        judging()
    assert not judging.path.exists()


def test_a_short_key_is_no_part_of_a_response(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "X\n")
    judging = Judging(tmp_path, server.url)
    assert judging() == 0
    assert {round(verdict.preference, 3) for verdict in judging.verdicts.values()} == {0.1, 0.9}


@pytest.fixture
def separate(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "answered.log", "0.2") as server:
        yield server


def test_kills_lose_only_what_is_in_flight(separate, tmp_path):
    """The judge is killed, then the server. The server logs an answer before it sends it, so each verdict has a logged
    answer; an answer without a verdict of its own was in flight at one of the two kills, at most 4 at each."""
    judging = Judging(tmp_path, separate.url, 40, concurrency=4)
    first = judging.start()
    wait_for(lambda: judging.lines() > 8)  # the last of them may be cut off
    first.kill()
    first.communicate()
    kept = judging.verdicts
    answered = separate.answered()
    assert kept.keys() <= answered.keys() and len(kept) >= 8
    assert answered.total() - len(kept) <= 4 and set(answered.values()) == {1}
    second = judging.start()
    wait_for(lambda: judging.lines() >= len(kept) + 8)
    separate.kill()
    separate.start()
    assert "judged 40 of 40, failed 0" in ends_with(second, 0)
    assert kept.items() <= judging.verdicts.items() and judging.lines() == 40
    answered = separate.answered()
    assert judging.verdicts.keys() == answered.keys() and len(answered) == 40  # one to one, but for
    assert answered.total() - 40 <= 2 * 4  # what was answered twice, as its first answer was lost in flight
    assert max(answered.values()) <= 3 and not kept.keys() & {key for key, times in answered.items() if times > 1}


def test_an_interrupt_ends_it_and_the_same_command_continues(separate, tmp_path):
    judging = Judging(tmp_path, separate.url, 24, concurrency=4)
    process = judging.start()
    wait_for(lambda: judging.lines() > 8)
    process.send_signal(signal.SIGINT)
    printed = ends_with(process, 130)
    assert "stopped: the same command continues" in printed and "Traceback" not in printed
    kept = judging.verdicts
    assert 8 <= len(kept) < 24 and not list(tmp_path.glob("*-journal"))
    assert judging() == 0 and len(judging.verdicts) == 24
    assert kept.items() <= judging.verdicts.items() and separate.answered().total() <= 28


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


HEADER = {"model": "ours", "baseline": "gpt", "outputs": "0f", "judge": {"model": "j", "seed": 0}}
NAME = "length-controlled win rate without instruction difficulty and gamed baselines"
GAMED = "index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
BOTH = {"model": "j", "order": "both"}


def verdict(index: int, preference: float | str, order: str = "model_first", **changes: Any) -> Verdict:
    """A text instead of a preference is why it failed."""
    failed = isinstance(preference, str)
    result = {"preference": None if failed else preference, "failed": preference if failed else None}
    lengths = {"len_model": 100 + 7 * index**2, "len_baseline": 120 + 3 * index, "tokens": 10 * index, "ended": True}
    result["source"] = None if failed else "log_probs"
    return Verdict(index=index, order=order, **(lengths | result | changes))


def write(path: Path, verdicts: Sequence[Verdict], prompts: int | None = None, **header: Any) -> str:
    count = prompts if prompts is not None else 1 + max(verdict.index for verdict in verdicts)
    path.unlink(missing_ok=True)
    with VerdictsWriter(path, HEADER | {"prompts": count} | header) as writer:
        writer.keep(*verdicts)
    return str(path)


def cells(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split(" | ")] for line in printed.splitlines() if line.startswith("| ")]
    return {first.removeprefix("| "): [*middle, last.removesuffix("|").strip()] for first, *middle, last in rows}


def test_one_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [verdict(i, p) for i, p in enumerate([0.9, 0.5, 0.2, 0.4])] + [verdict(4, "no letter: 'Maybe'", len_model=0)]
    score(write(tmp_path / "v.jsonl", rows, prompts=7), samples=50)
    printed = capsys.readouterr().out
    table = cells(printed)
    assert len({line.count("|") for line in printed.splitlines()}) == 1  # one table, no row with a cell more
    assert table["against gpt, 4 prompts"] == ["", "standard error", "95 % interval"]
    assert "ours" in table and float(table[f"{NAME}, %"][1]) > 0
    # deviations 0.4, 0, -0.3, -0.1: √(0.26 / 3) / 2
    assert table["standard error of the win rate as AlpacaEval has it"][1] == "14.72"
    expected = {
        **{"win rate, %": "50.00", "discrete win rate, %": "37.50"},
        "prompts left out: 3": "not judged yet: 2; no letter: 1",
        # all five responses, the one whose verdict failed as well: 100, 107, 128, 163, 0 and 120, 123, …, 132
        "length of the model's responses, characters": "99.6",
        "length of the baseline's responses, characters": "126.0",
        "length of the model's responses, tokens": "20.0",
        **{"responses that ended by themselves, %": "100.0", "empty responses, %": "20.0"},
        "preference for the response shown first, %": "n/a",
    }
    assert {name: table[name][0] for name in expected} == expected


def test_both_orders_count_with_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(0.9, 0.5), (0.6, 0.4), (0.3, 0.1)]
    rows = [verdict(i, a) for i, (a, _) in enumerate(pairs)]
    rows += [verdict(i, b, "baseline_first") for i, (_, b) in enumerate(pairs)]
    rows += [verdict(3, 1.0), verdict(3, "timeout", "baseline_first"), verdict(4, 1.0)]
    rows += [verdict(0, 0.7)]  # asked again: the last line counts
    score(write(tmp_path / "v.jsonl", rows, judge=BOTH), samples=50)
    table = cells(capsys.readouterr().out)
    assert table["win rate, %"][0] == f"{100 * (0.6 + 0.5 + 0.2) / 3:.2f}"
    assert table["discrete win rate, %"][0] == "50.00"
    assert table["prompts left out: 2"][0] == "timeout: 1; judged in one order only: 1"
    # the model first: 0.7, 0.6, 0.3, 1, 1; the baseline first: 1 minus 0.5, 0.4, 0.1
    assert table["preference for the response shown first, %"][0] == f"{100 * (3.6 / 5 + 2 / 3) / 2:.1f}"


def test_lengths_beside_a_difference_are_of_the_same_prompts(tmp_path, capsys) -> None:
    rows = [verdict(i, 0.1 + 0.2 * i) for i in range(4)]
    long = [verdict(4, 0.5, len_model=9000, len_baseline=9000), verdict(5, "timeout", len_model=9000)]
    paths = [write(tmp_path / name, there, model=name) for name, there in (("a", rows + long), ("b", rows))]
    score(*paths, samples=10)
    printed = capsys.readouterr().out.splitlines()
    for name in ("length of the model's responses, characters", "length of the baseline's responses, characters"):
        lines = [line for line in printed if name in line]
        assert len(lines) == 2 and len(set(lines)) == 1, lines


def test_what_the_file_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [verdict(i, 0.1 + 0.2 * i, tokens=None, ended=None) for i in range(4)]
    score(write(tmp_path / "v.jsonl", rows, model="a|b"), samples=10)
    table = cells(capsys.readouterr().out)
    assert table["length of the model's responses, tokens"][0] == "n/a"
    assert table["responses that ended by themselves, %"][0] == "n/a"
    assert r"a\|b" in table
    assert table["prompts left out: 0"][0] == "none"


def test_no_length_control_is_no_reason_to_hide_the_win_rate(tmp_path, capsys) -> None:
    path = write(tmp_path / "v.jsonl", [verdict(i, 1.0) for i in range(4)])
    score(path, against=path, samples=10)
    printed = capsys.readouterr().out
    assert cells(printed)[f"{NAME}, %"] == ["n/a"] * 3
    assert cells(printed)["win rate, %"] == ["+0.00", "0.00", "+0.00 to +0.00"]  # the last: of the difference
    assert f"no {NAME}: no finite solution" in printed
    assert "| win rate, % | 100.00 |" in printed


def two_models(folder: Path, **header: Any) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    ours = [verdict(i, round(p, 3)) for i, p in enumerate(rng.uniform(size=12))]
    theirs = [replace(v, preference=0.9 * v.preference, len_model=80 + 11 * v.index) for v in ours[2:]]
    theirs[-1] = replace(theirs[-1], preference=None, failed="timeout")
    a = write(folder / "a.jsonl", ours)
    return a, write(folder / "b.jsonl", theirs, prompts=12, **({"model": "other", "outputs": "1e"} | header))


def test_two_models_over_the_prompts_that_both_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_models(tmp_path)
    score(a, against=b, samples=100, seed=4)
    printed = capsys.readouterr().out
    assert "against gpt, 9 prompts" in cells(printed)
    assert [line.strip("| ") for line in printed.splitlines() if line.endswith("|  |  |  |")] == [
        *("ours", "other", "ours minus other")
    ]
    ours, theirs, difference = map(cells, re.split(r"\| ours.*\|  \|  \|  \||\| other \|.*", printed)[1:])
    assert "prompts left out: 0" in ours
    assert theirs["prompts left out: 3"][0] == "not judged yet: 2; timeout: 1"
    shared = [verdict.preference for verdict in read_verdicts(a)[1][2:11]]
    value, error, _ = ours["win rate, %"]
    assert float(value) == pytest.approx(100 * np.mean(shared), abs=0.01)
    assert float(difference["win rate, %"][0]) == pytest.approx(10 * np.mean(shared), abs=0.01)
    assert float(difference["win rate, %"][1]) < 0.2 * float(error)
    rates = [float(rows[f"{NAME}, %"][0]) for rows in (ours, theirs, difference)]
    low, high = map(float, difference[f"{NAME}, %"][2].split(" to "))
    assert rates[2] == pytest.approx(rates[0] - rates[1], abs=0.02) and low < rates[2] < high
    score(a, against=b, samples=100, seed=4)
    assert capsys.readouterr().out == printed


def test_differently_judged_models_are_refused(tmp_path: Path) -> None:
    for header, differs in (
        ({"baseline": "davinci"}, "differ in baseline: gpt there, davinci here: judge both models alike"),
        ({"judge": {"model": "k", "seed": 0}}, "judge.model: j there, k here"),
        ({"judge": {"model": "j", "order": "random"}}, "judge.seed: 0 there, None here; judge.order: None there"),
    ):
        a, b = two_models(tmp_path, **header)
        with pytest.raises(InputError, match=re.escape(differs)):
            score(a, against=b)


def test_other_instructions_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [verdict(i, 0.5) for i in range(4)])
    b = write(tmp_path / "b.jsonl", [verdict(i, 0.5, len_baseline=120 + 3 * (3 - i)) for i in range(4)])
    with pytest.raises(InputError, match=r"the instructions or their order \(first: index 0\): judge both"):
        score(a, against=b)
    b = write(tmp_path / "b.jsonl", [verdict(i, 0.5) for i in range(3, 7)])
    with pytest.raises(InputError, match="1 judged prompts in common: need two"):
        score(a, against=b)


def test_too_few_verdicts(tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", [verdict(0, 0.5), verdict(1, "HTTP 500: oh")])
    with pytest.raises(InputError, match=r"1 judged prompts \(left out: {'HTTP 500': 1}\): judge at least two"):
        score(path)
    # a judge that was stopped when it had asked no prompt twice: no verdict says that half is missing
    path = write(tmp_path / "half.jsonl", [verdict(i, 0.8) for i in range(5)], judge=BOTH)
    with pytest.raises(InputError, match=r"0 judged prompts .*judged in one order only': 5"):
        score(path)
    with pytest.raises(InputError, match="no verdicts file"):
        score(str(tmp_path / "none.jsonl"))


def verdicts_with_gamed(folder: Path) -> tuple[str, str]:
    """A verdicts file of 6 prompts, and a CSV file as AlpacaEval's df_gamed.csv is: each index twice."""
    rng = np.random.default_rng(1)
    path = folder / "df_gamed.csv"
    lines = [f"{i % 6},m{i // 6},{rng.uniform():.4f},{rng.normal():.4f},{i % 6 / 3 - 1:.4f},False" for i in range(12)]
    path.write_text(GAMED + "\n".join(lines) + "\n5,m2,,0.1,0.6667,False\n")
    return write(folder / "v.jsonl", [verdict(i, p) for i, p in enumerate([0.9, 0.5, 0.2, 0.4, 0.7, 0.6])]), str(path)


def test_difficulty_and_gamed_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts, gamed = verdicts_with_gamed(tmp_path)
    difficulty = tmp_path / "instruction_difficulty.csv"  # the first column of AlpacaEval's has no name
    difficulty.write_text("\ufeff,instruction_difficulty\n" + "".join(f"{i},{i / 3 - 1:.4f}\n" for i in range(805)))
    tables = []
    for options in ({"difficulty": str(difficulty)}, {"gamed": gamed}, {"difficulty": gamed, "gamed": gamed}):
        score(verdicts, samples=10, **options)
        tables.append(cells(capsys.readouterr().out))
    assert "length-controlled win rate without gamed baselines, %" in tables[0]
    assert "length-controlled win rate without instruction difficulty, %" in tables[1]
    score(verdicts, samples=10, difficulty=str(difficulty), gamed=gamed)
    assert cells(capsys.readouterr().out) == tables[2]
    assert "length-controlled win rate, %" in tables[2]


def test_bad_files_of_difficulties(tmp_path: Path) -> None:
    (verdicts, _), path = verdicts_with_gamed(tmp_path), tmp_path / "bad.csv"
    head = "index,instruction_difficulty\n"
    for option, content, refusal in (
        ("gamed", None, "cannot be read"),
        ("difficulty", "index,difficulty\n0,1\n", "lacks the column instruction_difficulty; it has index, difficulty"),
        ("difficulty", head + "0,1\n1,2\n", "no difficulty for 4 prompts (first: index 2)"),
        ("difficulty", head + "0,1\n0,2\n", "row 2: index 0 needs one finite"),
        ("difficulty", head + "0,x\n", "row 1: index, instruction_difficulty should be numbers"),
        ("difficulty", head + "0\n", "row 1: cannot be read: ValueError: 1 values"),
        ("difficulty", head + "0,\n", "row 1: index 0 needs one finite"),
        ("gamed", GAMED + "0,m,1.5,0,0,False\n", "each preference from 0 to 1"),
        ("gamed", GAMED + "0,m,0.5,0,0,2\n", "each preference from 0 to 1"),
        ("gamed", GAMED + "0,m,,0,0,False\n", "on at least one row"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=re.escape(refusal)):
            score(verdicts, **{option: str(path)})
