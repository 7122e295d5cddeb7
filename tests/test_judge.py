"""Judging through a real HTTP server: every prompt ends judged or listed with its reason, whatever the server does."""

import math
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import Server, completion
from judging import Judging, in_turn

import mixdpo
from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import _printable, secrets, without_secrets
from mixdpo.evaluation.judge import drawn_order
from mixdpo.evaluation.score import score
from mixdpo.evaluation.verdicts import first_by_log_probs, messages, read_choice, read_verdicts

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
