"""Files that grow line by line: one writer at a time, and nothing of another file is touched."""

import threading
from pathlib import Path
from typing import Any

import pytest

from mixdpo.errors import InputError
from mixdpo.evaluation.responses_file import RESPONSES
from mixdpo.evaluation.verdicts import VERDICTS
from mixdpo.signals.margins_file import MARGINS, MarginsWriter, read_margins
from mixdpo.storage import lines_file
from mixdpo.storage.lines_file import LineFormat, LinesWriter

MARGINS_HEADER = {"pairs": 2, "signal": "s", "needs": "rating", "source": "d", "base": "b", "adapter": None}
KINDS: list[tuple[LineFormat, dict[str, Any], dict[str, Any]]] = [
    (MARGINS, MARGINS_HEADER, {"pair_id": 1, "text": "t", "margin": 0.5}),
    (RESPONSES, {"base": "b"}, {"key": "1", "answers": [{"text": "a", "tokens": 1, "ended": True}]}),
    (
        VERDICTS,
        {"model": "m", "baseline": "b", "outputs": "0f", "prompts": 2, "judge": {"model": "j"}},
        {"index": 0, "order": "model_first", "preference": 0.5, "from": "text", "judge_prompt_tokens": None}
        | {"judge_completion_tokens": None, "len_model": 1, "len_baseline": 1, "tokens": None, "ended": None},
    ),
]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_file, "PATIENCE", 0.3)


@pytest.mark.parametrize(("kind", "header", "line"), KINDS, ids=lambda value: getattr(value, "rows", ""))
def test_one_writer_at_a_time(kind: LineFormat, header: dict[str, Any], line: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with LinesWriter(path, kind, header) as writer:
        writer.append(line)
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"another process is writing to .*lines"):
            LinesWriter(path, kind, header)
    assert path.read_bytes() == before
    with LinesWriter(path, kind, header | {"date": "another"}) as writer:
        assert writer.rows == kind.read(path)[1] and len(writer.rows) == 1
    with pytest.raises(InputError, match=rf"holds other {kind.rows} \(more: None there, 1 here\)"):
        LinesWriter(path, kind, header | {"more": 1})
    path.write_bytes(before[:-5])  # the line is left out, and cut away by who writes next
    assert not kind.read(path)[1]
    with LinesWriter(path, kind, header) as writer:
        writer.append(line)
    assert path.read_bytes() == before


def test_a_writer_waits_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process had started holds it a little longer."""
    monkeypatch.setattr(lines_file, "PATIENCE", 20.0)
    first = LinesWriter(tmp_path / "lines", RESPONSES, {})
    timer = threading.Timer(0.5, first.close)
    timer.start()
    LinesWriter(tmp_path / "lines", RESPONSES, {}).close()
    timer.join()


def test_margins_that_another_process_has_finished_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writer had found no file when it began to wait: it computes nothing and overwrites nothing."""
    monkeypatch.setattr(lines_file, "PATIENCE", 20.0)
    path = str(tmp_path / "m.margins")
    first = MarginsWriter(path, MARGINS_HEADER, {1: "a", 2: "b"})
    first.append([1, 2], [0.5, 1.0])
    timer = threading.Timer(0.5, first.finish)
    timer.start()
    second = MarginsWriter(path, MARGINS_HEADER, {1: "a", 2: "b"})
    timer.join()
    assert second.margins == {1: 0.5, 2: 1.0} and "complete already" in second.finish()
    assert len(read_margins(path).pairs) == 2 and not Path(f"{path}.part").exists()
