"""A judge or a server that is killed loses only the verdicts in flight, and the same command continues."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from judging import Judging, ServerProcess, ends_with, wait_for


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
