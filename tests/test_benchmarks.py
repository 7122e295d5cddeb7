"""What the benchmarks keep and compare: no measurement is lost, and none is taken for another one."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from test_pairs import PAIR, write

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`cleaning_runs` beside a config and an adapter, and the commands that it starts; they do nothing."""
    module, started = import_module("cleaning_runs"), []

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


def test_prompts_to_be_answered_were_not_trained_on(tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": f"prompt {i}"} for i in range(6)]
    rows[0]["chosen"] = rows[0]["rejected"]  # not usable: with a limit of 3 the first 4 rows are read
    config = {"data": {"init_args": {"source": write(tmp_path / "a.jsonl.gz", rows), "limit": 3}}}
    import_module("compare_methods").write_prompts(config, tmp_path / "prompts.jsonl")
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert asked == ["prompt 4", "prompt 5"]


def test_a_killed_process_loses_no_other_run(monkeypatch, tmp_path, capsys) -> None:
    module, out, written = import_module("memory_8b"), tmp_path / "memory.json", []

    def in_fresh_process(side: Any, asked: Any, tiny: bool) -> dict[str, float]:
        written.append(len(json.loads(out.read_text())["runs"]) if out.exists() else 0)
        if side is module.trl:
            raise BrokenProcessPool
        return {"peak_gb": 1.5, "tokens_per_second": 2.0}

    monkeypatch.setattr(module, "GPU", False)
    monkeypatch.setattr(module, "in_fresh_process", in_fresh_process)
    monkeypatch.setattr(sys, "argv", ["memory_8b.py", "--tiny", "--out", str(out)])
    module.main()
    assert written == [*range(8)]
    assert [run["fits"] for run in json.loads(out.read_text())["runs"]] == [True] * 3 + [None] + [True] * 4
    assert "| trl, r 16, 2 × 32, recomputed | – | – | – | – | – | – |" in capsys.readouterr().out


def test_weights_drawn_on_the_device_are_packed_and_whole() -> None:
    inputs = import_module("inputs")
    model = inputs.random_policy(inputs.TINY, torch.device("cpu"), rank=4)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 2 * 7 * 2  # bitsandbytes' in PEFT's
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_a_part_that_fails_keeps_what_it_found(monkeypatch, tmp_path, capsys) -> None:
    module = import_module("device")

    def part(tiny: bool, out: Path) -> Any:
        yield "first", {"ms": 1.5, "said": ["a|b"]}
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "PARTS", {"facts": part, "speed": lambda *_: iter([("way", {"error": "no"})])})
    for name, error in (("facts", RuntimeError), ("speed", SystemExit)):
        monkeypatch.setattr(sys, "argv", ["device.py", name, "--tiny", "--out", str(tmp_path)])
        with pytest.raises(error):
            module.main()
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["facts"]["error"] == "RuntimeError: no kernel" and found["speed"]["found"]["way"] == {"error": "no"}
    assert {"device", "versions", "commit", "command"} <= found["facts"]["about"].keys()
    (tmp_path / "parts.tsv").write_text("facts\t3 s\texit 1\nwaits\t9 s\tstopped after 9 s\n")
    module.print_table(tmp_path)
    shown = capsys.readouterr().out
    assert "| facts | 3 s, exit 1 | RuntimeError: no kernel |\n|  | first | ms 1.5; said a¦b |\n| waits | 9 s" in shown


@pytest.mark.parametrize("script", ["device.sh", "device_study.sh"])
def test_no_part_stops_the_next_one(script: str, tmp_path: Path) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("#!/bin/sh\ncase $2 in facts) sleep 60 ;; starts) exit 3 ;; esac\n")
    python.chmod(0o755)
    given = os.environ | {"PARTS": "facts:1 starts:9 tests:9", "OUT": str(out), "PYTHON": str(python)}
    for budget, expected in ("60", ["stopped after 1 s", "exit 3", "exit 0"]), ("5", ["no time left"] * 3):
        command = ["bash", str(BENCHMARKS / script)]
        subprocess.run(command, env=given | {"BUDGET": budget}, check=True, timeout=30)
        assert [line.split("\t")[2] for line in (out / "parts.tsv").read_text().splitlines()] == expected


def test_the_study_for_a_gpu_and_gains_of_the_seeds_that_both_runs_have(monkeypatch, tmp_path) -> None:
    module, read_study = import_module("device_study"), import_module("mixdpo.evaluation.study_design").read_study
    monkeypatch.setattr(module, "GPU", True)
    shipped, first, every = map(read_study, (module.STUDY, *module.write_studies(tmp_path, False)))
    assert [*first.runs] == [shipped.control, *shipped.holm] and [*every.runs] == [*shipped.runs]
    assert first.folder == every.folder and first.seeds == [*range(8)]
    assert first.options.items() >= module.ON_GPU.items() and first.grid == shipped.grid
    right = {("d", module.CONTROL, 0): (1, 0), ("d", "dpo", 0): (1, 1), ("d", "dpo", 1): (0, 0)}
    lines = module.pairs_table({job: ([3, 0.25, None], [*enumerate(each)]) for job, each in right.items()}).splitlines()
    assert lines[2:] == [
        f"| d | {module.CONTROL} | 1 × 2 | 3 | 0.500 [0.000, 1.000] |  | 0.250 | – |",
        "| d | dpo | 2 × 2 | 3 | 0.500 [0.000, 1.000] | +0.500 [+0.000, +1.000], seeds 0 | 0.250 | – |",
    ]


SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in ("trl", "resume")]


@pytest.mark.long
@pytest.mark.parametrize("part", ["facts", "starts", "waits", "parity", "speed", "memory", "generation", *SLOW])
def test_each_part_runs_with_small_models_on_a_cpu(part: str, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/device.py", part, "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, cwd=BENCHMARKS.parent, env=os.environ | {"PYTHONPATH": "."}, check=True)
    assert json.loads((tmp_path / "device.json").read_text())[part]["found"]


def test_the_second_study_asks_what_no_earlier_prompt_asked(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    script = import_module("noisy_labels")
    pairs, words = script.lines_of(script.DATA / "constraints_pairs.jsonl"), json.loads(script.WORDS.read_text("utf-8"))
    assert [script.picked(pairs[:240], seeds) for seeds in script.SEEDS.values()] == [16, 24]
    prompts = script.fresh_prompts(pairs)
    assert Counter(row["part"] for row in prompts) == {"validation": 100, "seen": 240, "unseen": 60}
    old = {*script.TASK["requests"], *script.TASK["training_subjects"], *script.TASK["held_out_subjects"]}
    for row in prompts:
        subjects = words["validation_subjects" if row["part"] == "validation" else "held_out_subjects"]
        asked = [each.format(subject) for each in words["requests"] if each not in old for subject in subjects]
        assert any(row["prompt"].startswith(each) for each in asked) and not old & set(subjects)
    words["held_out_subjects"][3] = script.TASK["held_out_subjects"][0]
    monkeypatch.setattr(script, "WORDS", tmp_path / "words.json")
    script.WORDS.write_text(json.dumps(words))
    with pytest.raises(ValueError, match=r"used before, or twice: .*a volcano"):
        script.fresh_prompts(pairs)
