"""Judging through a real HTTP server: every prompt ends judged or listed with its reason, whatever the server does."""

import math
import socket
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from judge_server import Server, completion
from judging import Judging, in_turn

from mixdpo.errors import InputError
from mixdpo.evaluation import endpoint
from mixdpo.evaluation.endpoint import retry_after, secrets, without_secrets
from mixdpo.evaluation.judge import drawn_order
from mixdpo.evaluation.judge_prompt import Malformed, first_by_log_probs, messages, read_choice
from mixdpo.evaluation.verdicts import read_verdicts

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(in_turn) as server:
        yield server


def test_judges_all_and_says_what_scoring_needs(server, tmp_path, capsys):
    judging = Judging(tmp_path, server.url)
    assert judging() == 0
    file = read_verdicts(judging.path)
    assert file.header["model"] == "the model" and file.header["baseline"] == "the baseline"
    assert file.header["prompts"] == 6 and file.header["judge"]["base_url"] == server.url
    assert [verdict.index for verdict in file.verdicts] == list(range(6))
    for i, verdict in enumerate(file.verdicts):
        assert verdict.preference == pytest.approx(0.1 if i % 2 else 0.9)
        assert (verdict.source, verdict.failed, verdict.tokens, verdict.ended) == ("log_probs", None, i, i % 2 == 0)
        assert (verdict.len_model, verdict.len_baseline) == (len(f"model answer {i}"), len(f"baseline response {i}"))
        assert (verdict.judge_prompt_tokens, verdict.judge_completion_tokens) == (100, 1)
        assert verdict.order == drawn_order(f"prompt-{i}: say it", 0)
    said = capsys.readouterr().out
    assert "judged 6 of 6, failed 0" in said and "mean preference for the model: 0.5000" in said
    assert "for these verdicts the judge read 600 tokens and wrote 6" in said
    assert f"python -m mixdpo score {judging.path}" in said
    body = server.requests[0].body
    assert (body["temperature"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (0, 1, True, 20)
    assert judging() == 0 and len(server.requests) == 6  # nothing is asked again


PASSING = ["wait 1", "status 500", "status 503", "truncated", "cut", "drop", "refusal", "null", "prose", "vague"]
PASSING += ["empty", "list", "status 408"]


def test_what_passes_is_tried_again(tmp_path):
    faults = {i: [fault, fault] for i, fault in enumerate(PASSING)}
    with Server(in_turn, faults) as server:
        judging = Judging(tmp_path, server.url, len(PASSING), attempts=3)
        assert judging() == 0
        assert Counter(server.asked) == dict.fromkeys(range(len(PASSING)), 3)
    assert all(v.preference == pytest.approx(0.1 if v.index % 2 else 0.9) for v in judging.verdicts.values())
    assert judging.verdicts[9, drawn_order("prompt-9: say it", 0)].judge_prompt_tokens == 300  # all three were paid


def test_what_was_paid_before_a_refusal_is_told(tmp_path):
    with Server(in_turn, {0: ["vague", "status 400"]}) as server:
        judging = Judging(tmp_path, server.url, 1, attempts=3)
        assert judging() == 1
    (verdict,) = judging.verdicts.values()
    assert verdict.failed.startswith("HTTP 400") and verdict.judge_prompt_tokens == 100


def test_a_request_that_hangs(tmp_path):
    with Server(in_turn, {0: ["hang 60!"], 1: ["hang 60"]}) as server:
        judging = Judging(tmp_path, server.url, 3, attempts=2, timeout=3)
        assert judging() == 1
        assert Counter(server.asked) == {0: 2, 1: 2, 2: 1}
    assert [v.failed for v in judging.verdicts.values()] == ["time-out: no response in 3 s", None, None]


LASTING = {
    "status 500!": "HTTP 500: ",
    "status 429!": "HTTP 429: ",
    "status 400!": "HTTP 400: ",
    "truncated!": "response is no JSON: ",
    "cut!": "connection lost: ",
    "drop!": "connection lost: ",
    "refusal!": "refused: 'I cannot help with that.'",
    "null!": "no text: ",
    "prose!": "no label: 'X is better, I think'",
    "vague!": "no label among the likeliest tokens: 'The', 'Both'",
    "empty!": "no chat completion: ",
    "list!": "no chat completion: ",
}


def test_what_lasts_is_listed_and_asked_again_by_the_next_call(tmp_path, capsys):
    count = len(LASTING)
    faults = {i: [fault] for i, fault in enumerate(LASTING)}
    with Server(in_turn, faults) as server:
        judging = Judging(tmp_path, server.url, count + 3, attempts=2)
        assert judging() == 1
        asked = Counter(server.asked)
        assert asked == {i: 2 if i < count and "400" not in faults[i][0] else 1 for i in range(count + 3)}
        found = {verdict.index: verdict for verdict in judging.verdicts.values()}
        assert found.keys() == set(range(count + 3))
        for i, reason in enumerate(LASTING.values()):
            assert found[i].preference is None and found[i].source is None
            assert found[i].failed.startswith(reason), (found[i].failed, reason)
        assert all(found[i].failed is None for i in range(count, count + 3))
        said = capsys.readouterr().out
        assert f"judged 3 of {count + 3}, failed {count}" in said
        assert "2 x connection lost" in said and "1 x refused" in said
        faults.clear()
        server.requests.clear()
        assert judging() == 0
        assert sorted(server.asked) == list(range(count))
    assert all(verdict.failed is None for verdict in judging.verdicts.values())
    assert judging.lines() == count + 3


@pytest.mark.parametrize(("fault", "least"), [("wait 1", 1.0), ("until 2", 1.0)])
def test_retry_after_is_obeyed_by_all_requests(tmp_path, fault, least):
    with Server(in_turn, {0: [fault]}) as server:
        assert Judging(tmp_path, server.url, 4)(concurrency=1) == 0
        asked = [request.number for request in server.requests]
        pause = server.requests[1].time - server.requests[0].time
    assert asked == [0, 0, 1, 2, 3]
    assert least - 0.005 <= pause < 60


def test_retry_after_holds_what_others_would_ask(tmp_path):
    with Server(in_turn, {0: ["wait 1"]}, seconds=0.05) as server:
        assert Judging(tmp_path, server.url, 8)(concurrency=2) == 0
        told = next(request.time for request in server.requests if request.number == 0)
        later = [request.time - told for request in server.requests[2:]]
    assert len(later) == 7 and sum(after < 0.995 for after in later) <= 1  # one may have been on its way


def test_reading_retry_after():
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=90.0) == 10
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=200.0) == 0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("status 401!", "OPENAI_API_KEY"),
        ("status 403!", "OPENAI_API_KEY"),
        ("status 404!", "model's name and the server's URL"),
        ("wait 7200!", "asks to wait 7200 s"),
        ("parameter!", "--log_probs false"),
    ],
)
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
        said = capsys.readouterr().out
        assert f"{first:.4f} where it is shown first" in said and f"difference {2 * first - 1:+.4f}" in said
        assert judging(order="both", out=str(tmp_path / "both.jsonl")) == 0
    said = capsys.readouterr().out
    assert "judged 16 of 16" in said and "mean preference for the model: 0.5000 (8 prompts in both orders)" in said
    assert f"shown first {first:.4f}" in said and "changes with the order for 100.0%" in said
    assert len(read_verdicts(tmp_path / "both.jsonl").verdicts) == 16


def test_the_order_depends_on_seed_and_instruction_only(server, tmp_path):
    orders = [drawn_order(f"prompt-{i}", 0) for i in range(400)]
    assert 150 < orders.count("model_first") < 250
    assert orders != [drawn_order(f"prompt-{i}", 1) for i in range(400)]
    judging = Judging(tmp_path, server.url)
    assert judging(limit=2) == 0 and len(judging.verdicts) == 2
    before = judging.verdicts
    assert judging() == 0 and len(server.requests) == 6
    assert before.items() <= judging.verdicts.items()


def test_without_log_probs_the_letter_counts(tmp_path):
    with Server(in_turn, log_probs=False) as server:
        judging = Judging(tmp_path, server.url)
        assert judging() == 0
        assert judging(log_probs=False, out=str(tmp_path / "not_asked.jsonl")) == 0
        assert "logprobs" not in server.requests[-1].body
    for verdicts in (judging.verdicts.values(), read_verdicts(tmp_path / "not_asked.jsonl").verdicts):
        assert [(v.preference, v.source) for v in verdicts] == [(1.0, "text"), (0.0, "text")] * 3


def test_preference_by_hand():
    """.3 + .2 for X, .1 for Y: 5/6. A label that is not listed has no probability."""
    listed = [("X", math.log(0.3)), (" x", math.log(0.2)), ("▁Y", math.log(0.1)), ("XY", math.log(0.3)), ("The", -3.0)]
    assert first_by_log_probs(listed) == pytest.approx(5 / 6)
    assert first_by_log_probs([("Y", -0.1)]) == 0
    refusal = [("I", -0.001), ("Sorry", -7.5), ("X", -13.2)]
    for none in ([("The", -0.1)], refusal, [("X", -9999.0)], [("X", math.nan)], []):
        with pytest.raises(Malformed, match="no label"):
            first_by_log_probs(none)


def test_the_first_token_that_is_no_white_space():
    body = completion({"Y": 0.6, "X": 0.2}, log_probs=True)
    places = body["choices"][0]["logprobs"]["content"]
    newline = {"token": "\n", "logprob": -0.1, "top_logprobs": [{"token": "X", "logprob": -0.1}]}
    assert read_choice(body) == (pytest.approx(0.25), "log_probs")
    body["choices"][0]["logprobs"]["content"] = [newline, *places]
    assert read_choice(body) == (pytest.approx(0.25), "log_probs")


@pytest.mark.parametrize("broken", [{}, {"choices": [{}]}, {"choices": [{"message": {"content": "x"}}]}, [], None, "X"])
def test_what_is_no_chat_completion(broken):
    with pytest.raises(Malformed):
        read_choice(broken)
    body = completion({"X": 1.0}, log_probs=True)
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [{"token": "Y", "logprob": "high"}]
    with pytest.raises(Malformed, match="no chat completion"):
        read_choice(body)


def test_braces_in_texts_are_texts():
    assert "{first} {0}" in messages("{first} {0}", "{second}", "b")[1]["content"]


@pytest.mark.parametrize("user", ["", "user:pass%20word@"])
def test_the_key_is_nowhere(tmp_path, monkeypatch, capfd, user):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(in_turn, {0: ["status 500!"], 1: ["status 400!"]}) as server:
        judging = Judging(tmp_path, server.url.replace("//", f"//{user}"), attempts=2)
        assert judging() == 1
        server.faults[0] = ["status 401!"]
        with pytest.raises(InputError) as raised:
            judging()
        sent = server.authorization.removeprefix("Bearer ").removeprefix("Basic ")
    said = capfd.readouterr()
    kept = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert "***" in judging.path.read_text(errors="replace") and "***" in str(raised.value)  # the server did repeat it
    assert (sent == KEY) == (user == "")
    for text in (said.out, said.err, str(raised.value), *kept):
        assert not any(secret in text for secret in (KEY, sent, "pass%20word", "pass word"))
    assert without_secrets("https://a:b@host:1/v1/?key=c#d") == "https://host:1/v1"
    assert {"pass%20word", "pass word"} <= set(secrets(None, "http://user:pass%20word@host/v1"))


def test_no_key_and_no_package(tmp_path, monkeypatch):
    judging = Judging(tmp_path, "")
    with pytest.raises(InputError, match=r"OPENAI_API_KEY.*base_url"):
        judging(base_url=None)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '.\[judge\]'"):
        judging()
    assert not judging.path.exists()


@pytest.mark.parametrize("bad", [{"limit": 0}, {"concurrency": 0}, {"attempts": 0}, {"timeout": 0}, {"max_tokens": 0}])
def test_options_out_of_range(tmp_path, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Judging(tmp_path, "http://127.0.0.1:1/v1")(**bad)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "http://localhost:x/v1", "ftp://localhost/v1", "v1"])
def test_what_is_no_address(tmp_path, url):
    with pytest.raises(InputError, match="write it in full"):
        Judging(tmp_path, url)()


def test_a_short_key_is_no_part_of_an_response(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "X\n")
    judging = Judging(tmp_path, server.url)
    assert judging() == 0
    assert all(
        verdict.preference == pytest.approx(0.1 if verdict.index % 2 else 0.9) for verdict in judging.verdicts.values()
    )


def test_a_body_that_repeats_the_key(tmp_path, monkeypatch):
    """Where the reason is cut off in the middle of the key, as well."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(in_turn, {i: [f"echo {8 * i}!"] for i in range(25)}) as server:
        judging = Judging(tmp_path, server.url, 25, attempts=1)
        assert judging() == 1
    assert KEY[:8] not in judging.path.read_text(errors="replace")
