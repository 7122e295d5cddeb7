"""What the benchmarks keep and compare: no measurement is lost, and none is taken for another one."""

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from test_pairs import PAIR, write

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


@pytest.fixture
def runs(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`cleaning_runs` beside a config and an adapter, and the commands that it starts; they do nothing."""
    module, started = benchmark("cleaning_runs"), []

    def run_nothing(command: list[str], **_: Any) -> CompletedProcess[str]:
        if "run.py" in command:
            started.append(command)
            (tmp_path / "runs" / command[command.index("--name") + 1]).mkdir(parents=True)
        return CompletedProcess(command, 0, "", "")

    (tmp_path / "full.yaml").write_text("name: full")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setattr("subprocess.run", run_nothing)
    return module, started


def test_a_run_that_is_done_is_not_repeated_and_is_refused_when_it_would_be_another(runs: Any, tmp_path: Path) -> None:
    (module, started), reference = runs, f"{{reference: {tmp_path / 'adapter'}}}"

    def run(*options: str) -> Path:
        return module.run(tmp_path / "runs", ("a", "full", ["--model.cleaning", reference, *options]))

    assert run() == run() == tmp_path / "runs" / "a" and len(started) == 1
    with pytest.raises(SystemExit, match=r"is done, but with something else.*--data\.limit.*remove it to repeat"):
        run("--data.limit", "8")
    for name in ("full.yaml", "adapter/adapter_model.safetensors"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text("other")
        with pytest.raises(SystemExit, match=r"something else \(files\..*there"):
            run()
        (tmp_path / name).write_text(before)
    run()
    assert len(started) == 1


def test_prompts_to_be_answered_were_not_trained_on(benchmark: Any, tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": f"prompt {i}"} for i in range(6)]
    rows[0]["chosen"] = rows[0]["rejected"]  # not usable: with a limit of 3 the first 4 rows are read
    config = {"data": {"init_args": {"source": write(tmp_path / "a.jsonl.gz", rows), "limit": 3}}}
    benchmark("compare_methods").write_prompts(config, tmp_path / "prompts.jsonl")
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert asked == ["prompt 4", "prompt 5"]


def test_a_killed_process_loses_no_other_run(benchmark, monkeypatch, tmp_path, capsys) -> None:
    module, out, written = benchmark("memory_8b"), tmp_path / "memory.json", []

    def in_fresh_process(side: Any, *_: Any) -> dict[str, float]:
        written.append(len(json.loads(out.read_text())["runs"]) if out.exists() else 0)
        if side is module.trl:
            raise BrokenProcessPool
        return {"peak_gb": 1.5, "tokens_per_second": 2.0}

    monkeypatch.setattr(module, "GPU", False)
    monkeypatch.setattr(module, "random_model", lambda *_: None)
    monkeypatch.setattr(module, "in_fresh_process", in_fresh_process)
    monkeypatch.setattr(sys, "argv", ["memory_8b.py", "--tiny", "--ranks", "1,2", "--lengths", "8", "--out", str(out)])
    module.main()
    assert written == [0, 1, 2, 3]
    assert [run["fits"] for run in json.loads(out.read_text())["runs"]] == [True, None, True, None]
    assert "| trl, r 2, 2 × 8 | – | – | – | – |" in capsys.readouterr().out


CLOCK = """
import json
from measuring import Clock
with Clock() as clock:
    kept = bytearray(50_000_000)
    del kept  # the peak stays
print(json.dumps(clock.costs))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this kernel forgets no peak")
def test_the_clock_measures_what_a_block_takes() -> None:
    """In a process of its own: in this one, what is freed or reclaimed of earlier tests meanwhile counts against it."""
    done = subprocess.run([sys.executable, "-c", CLOCK], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    costs = json.loads(done.stdout)
    assert 40 < costs["peak_mb"] - costs["resident_before_mb"] < 100
    assert costs["cpu_seconds"] > 0 and 0 < costs["seconds"] < 60
