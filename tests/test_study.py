"""Studies: the file, the schedule of runs around a stub of the command line, the tables."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_pairs
from judging import wait_for
from test_configs import build, cli  # noqa: F401

from mixdpo.__main__ import main
from mixdpo.evaluation.compare_runs import _decided, chosen_point, detectable, finished_scores, write_tables
from mixdpo.evaluation.study_design import read_study
from mixdpo.evaluation.study_run import add_finished

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))

STUB = """
import json, os, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(options["--runs"], options["--name"])
with open("calls", "a") as calls:
    calls.write(f"{options['--name']} {os.environ['OMP_NUM_THREADS']} {options.get('--model.adapter', '-')}\\n")
folder.mkdir(parents=True)
if Path(options["--name"] + ".slow").exists():
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)
if Path(options["--name"] + ".fails").exists():
    sys.exit("it broke")
if Path(options["--name"] + ".stops").exists():
    sys.exit(0)  # as Lightning after SIGTERM
(folder / "adapter").mkdir()
(folder / "adapter/adapter_model.safetensors").write_text(options["--seed_everything"])
(folder / "results.json").write_text("{}")
gain = float(options["--gain"]) + 0.1 * float(options.get("--lr", 0))
rows = []
for i, line in enumerate(Path("prompts.jsonl").read_text().splitlines()):
    after = {"score": gain + 0.01 * i, "tokens": 10 + i, "ended": i % 2 == 0}
    rows.append({**json.loads(line), "before": {"score": 0.0, "tokens": 20, "ended": False}, "after": after})
(folder / "responses.json").write_text(json.dumps(rows))
"""

# Python 3.12 warns of any function between fork and exec; ours makes one system call
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

STUDY: dict[str, Any] = {
    **{"config": "base.yaml", "folder": "out", "seeds": [0, 1], "control": "dpo", "prompts": "prompts.jsonl"},
    "outcomes": {"held out": ["seen", "unseen"], "unseen": ["unseen"]},
    "assumed_sd": {"prompts": 0.3, "seeds": 0.0},
    "options": {"data.validation": 0},
    "runs": {"dpo": {"options": {"gain": 0.1}}, "mixdpo": {"options": {"gain": 0.3}}},
}


def write_stub(folder: Path, text: str) -> None:
    """`python -m` looks in the current folder first."""
    (folder / "lightning_modules").mkdir()
    (folder / "lightning_modules/__init__.py").touch()
    (folder / "lightning_modules/cli.py").write_text(text)


def repository(folder: Path) -> Path:
    """A folder in which the stub is lightning_modules.cli, with eight prompts."""
    write_stub(folder, STUB)
    (folder / "base.yaml").write_text("name: base\n")
    parts = ["validation", "validation", *["seen"] * 5, "unseen"]
    write_pairs(folder / "prompts.jsonl", [{"prompt": f"p{i}", "part": part} for i, part in enumerate(parts)])
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return repository(tmp_path)


@pytest.fixture(scope="module")
def one_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study that is done, and what it has printed."""
    folder = repository(tmp_path_factory.mktemp("study"))
    command = [sys.executable, "-m", "mixdpo", "study", write_study(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return folder, done.stdout


@pytest.fixture
def finished(folder: Path, one_study: tuple[Path, str]) -> Path:
    """A copy of that study."""
    shutil.copytree(one_study[0], folder, dirs_exist_ok=True)
    calls(folder)
    return folder


def write_study(where: Path, /, **changes: Any) -> str:
    path = where / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return str(path)


def calls(folder: Path) -> list[str]:
    """Names of the runs that were started, since the last look."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    (folder / "calls").unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def test_parts_that_no_prompt_has_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More wrong files are in bad_input/studies.py."""
    assert main(["study", write_study(folder, outcomes={"x": ["new"]})]) == 2 and not calls(folder)
    assert "prompts.jsonl has no prompt of part new; its parts: ['seen', 'unseen'" in capsys.readouterr().err


def test_a_study_runs_each_job_once_and_tells(one_study: tuple[Path, str], finished: Path, capsys: Any) -> None:
    folder, printed = one_study
    assert "4 runs, 0 done" in printed
    assert "mixdpo-seed1: held out 0.345\n4 of 4 runs have ended" in printed
    assert (folder / "out/table.md").read_text() in printed
    lines = [line.split()[0] for line in (folder / "calls").read_text().splitlines()]
    assert lines == ["dpo-seed0", "mixdpo-seed0", "dpo-seed1", "mixdpo-seed1"]
    assert main(["study", "study.yaml"]) == 0
    assert not calls(finished) and "4 runs, 4 done" in capsys.readouterr().out


def test_command_line_of_a_run(folder: Path) -> None:
    """The overlay is laid over the study's options, a run's own options and the grid over the overlay."""
    runs = {"dpo": {"overlay": "o.yaml", "options": {"c": [1]}}}
    Path("o.yaml").touch()
    plan = read_study(write_study(folder, runs=runs, grid={"m.lr": [0.5]}, options={"data.validation": 0, "b": "text"}))
    (point,) = plan.points
    assert plan.arguments("dpo", point, 7) == [
        *(("--config", "base.yaml"), ("--data.validation", "0"), ("--b", "text")),
        *(("--config", "o.yaml"), ("--c", "[1]"), ("--m.lr", "0.5")),
        *(("--seed_everything", "7"), ("--data.seed", "7"), ("--runs", "out"), ("--name", "dpo-lr0.5-seed7")),
    ]


@pytest.mark.parametrize("kind", ["fails", "stops"])
def test_a_failed_run_is_told_and_tried_again(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 without results is no success either; and a difference over fewer seeds says so."""
    path, fault = write_study(folder), folder / f"dpo-seed1.{kind}"
    fault.touch()
    assert main(["study", path]) == 1
    printed = capsys.readouterr()
    status = 1 if kind == "fails" else 0
    assert f"dpo-seed1: FAILED (status {status}, absent: results.json, responses.json, adapter): see" in printed.out
    assert (folder / "out/dpo-seed1.log").read_text() == ("it broke\n" if kind == "fails" else "")
    assert "- missing: dpo, seeds 1" in printed.out and len(calls(folder)) == 4
    table = (folder / "out/table.md").read_text()
    assert "| mixdpo |  | 2 × 6 |" in table and "| dpo (seeds 0) | +0.200 [" in table
    fault.unlink()
    assert main(["study", path]) == 0
    assert calls(folder) == ["dpo-seed1"] and "missing" not in capsys.readouterr().out.split("have ended")[-1]


def test_a_changed_study_is_refused_for_what_is_done(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> str:
        assert main(["study", "study.yaml"]) == 2 and not calls(finished)
        return capsys.readouterr().err

    write_study(finished, options={"data.validation": 0, "b": 2})
    assert "out/dpo-seed0 is done, but with other options or files: now --b 2. Change them back" in refused()
    write_study(finished)
    (finished / "base.yaml").write_text("name: other\n")
    assert "content of base.yaml" in refused()
    done = {path.name for path in (finished / "out").iterdir() if path.is_dir()}
    assert add_finished(read_study("study.yaml"), done)  # what is known is not looked at again while others run
    (finished / "base.yaml").write_text("name: base\n")
    responses = finished / "out/dpo-seed0/responses.json"
    rows = json.loads(responses.read_text())
    responses.write_text(json.dumps(rows[::-1]))
    assert "out/dpo-seed0/responses.json holds other prompts than prompts.jsonl" in refused()
    (finished / "new/dpo-seed0").mkdir(parents=True)
    write_study(finished, folder="new")
    assert "new/dpo-seed0 is in the way and not of this study" in refused()

    def twice(for_all: int, of_the_run: int) -> str:
        """Of two values of an option the later one counts."""
        runs, options = {"dpo": {"options": {"gain": of_the_run}}}, {"data.validation": 0, "gain": for_all}
        return write_study(finished, folder="twice", options=options, runs=runs, seeds=[0])

    assert main(["study", twice(1, 2)]) == 0 and calls(finished) and twice(2, 1)
    assert "other options or files: now --gain 2; then --gain 2" in refused()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" if Path("/proc").is_dir() else True
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_study_loses_the_run_in_progress_only(folder, how, monkeypatch) -> None:
    if how == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("a killed study's runs go on where there is no PR_SET_PDEATHSIG")
    path, slow = write_study(folder), folder / "dpo-seed1.slow"
    slow.touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mixdpo", "study", path]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
        pid = int((folder / "pid").read_text())
        assert alive(pid)
        monkeypatch.setattr("mixdpo.storage.store.PATIENCE", 0.1)
        assert main(["study", path]) == 2, "two studies in one folder"
        process.send_signal(how)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert ("the same command continues" in printed) == (how != signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    assert calls(folder) == ["dpo-seed0", "mixdpo-seed0", "dpo-seed1"]
    assert (folder / "out/dpo-seed1").is_dir()  # what it had begun
    slow.unlink()
    assert main(["study", path]) == 0
    assert calls(folder) == ["dpo-seed1", "mixdpo-seed1"]


def test_the_grid_is_chosen_at_the_first_seed(folder: Path) -> None:
    runs = {**STUDY["runs"], "worse": {"options": {"gain": -1.0}}}
    path = write_study(folder, grid={"lr": [1, 3, 2]}, choose_by="validation", runs=runs)
    (folder / "worse-lr2-seed0.fails").touch()
    assert main(["study", path]) == 1
    started = calls(folder)
    assert started[:9] == [f"{run}-lr{lr}-seed0" for run in runs for lr in (1, 3, 2)]
    # the stub's score rises with lr; a choice among two of three points would not be the others' choice
    assert started[9:] == ["dpo-lr3-seed1", "mixdpo-lr3-seed1"]
    assert "| mixdpo | lr 3 | 2 × 6 |" in (folder / "out/table.md").read_text()
    plan = read_study(path)
    assert chosen_point(plan, "worse", finished_scores(plan, add_finished(plan, set()))) is None and plan.size == 12
    (folder / "worse-lr2-seed0.fails").unlink()
    assert main(["study", path]) == 0
    assert calls(folder) == ["worse-lr2-seed0", "worse-lr3-seed1"]


def test_tables_by_hand(folder: Path) -> None:
    """Scores of prompt i are gain + i/100: all prompts and seeds differ by the gains, so intervals have no width."""
    runs = {**STUDY["runs"], "same": {"options": {"gain": 0.1}, "control": "dpo"}, "new": {"options": {"gain": 1}}}
    [(folder / f"new-seed{seed}.fails").touch() for seed in (0, 1)]
    assert main(["study", write_study(folder, runs=runs, at_once=2)]) == 1
    threads = {line.split()[1] for line in (folder / "calls").read_text().splitlines()}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))} and len(calls(folder)) == 8
    with (folder / "out/table.csv").open() as lines:
        rows = {(row["outcome"], row["run"]): row for row in csv.DictReader(lines)}
    assert len(rows) == 2 * 4
    mixdpo = rows["held out", "mixdpo"]
    expected = {"mean": 0.345, "tokens": 14.5, "ended": 0.5, "seeds": 2, "prompts": 6, "difference": 0.2}
    assert {key: float(mixdpo[key]) for key in expected} == pytest.approx(expected)
    assert [float(mixdpo[f"difference_{end}"]) for end in ("low", "high")] == pytest.approx([0.2, 0.2])
    assert mixdpo["verdict"] == "decided" and float(mixdpo["detectable"]) == pytest.approx(0)
    # six prompts of 0.32 to 0.37: the mean of six draws stays inside
    assert 0.32 <= float(mixdpo["low"]) < 0.345 < float(mixdpo["high"]) <= 0.37
    assert rows["held out", "same"]["verdict"] == "undecided" and rows["held out", "dpo"]["difference"] == ""
    assert float(rows["unseen", "dpo"]["mean"]) == pytest.approx(0.17)
    assert [rows["unseen", "mixdpo"][key] for key in ("verdict", "p", "detectable")] == ["undecided", "1.0", "nan"]
    start = rows["held out", "(before training)"]
    assert (float(start["mean"]), float(start["tokens"])) == (0, 20) and float(start["difference"]) < 0
    table = (folder / "out/table.md").read_text()
    mean = f"0.345 [{float(mixdpo['low']):.3f}, {float(mixdpo['high']):.3f}]"
    line = f"| mixdpo |  | 2 × 6 | {mean} | 14.5 | 0.500 | dpo | +0.200 [+0.200, +0.200] | decided | 0.000 |"
    assert line in table and "- missing: new, seeds 0, 1" in table


def test_a_family_is_decided_by_holm(finished: Path) -> None:
    """Against Holm's procedure in its own words: the smallest p is tested at α / m, the next one at α / (m - 1), and so
    on, until one fails; an adjusted p is the smallest α at which its run is rejected."""
    draw = np.random.default_rng(5)
    for case in range(60):
        names, count = ["a", "b", "c", "d"], int(draw.integers(5))  # the others of the family are not done yet
        values = {name: float(draw.choice([0.0002, 0.01, 0.02, 0.3, draw.uniform(0, 0.1)])) for name in names[:count]}
        rows = [{"run": name, "p": p, "verdict": "as alone", "detectable": 2.8} for name, p in values.items()]
        rows.insert(case % (count + 1), {"run": "beside", "p": 0.04, "verdict": "as alone", "detectable": 2.8})
        found = {row["run"]: row for row in _decided([*rows, {"run": "control"}], names)}
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            for step, name in enumerate(sorted(values, key=lambda name: values[name])):
                if values[name] > alpha / (4 - step):
                    break
                rejected.add(name)
            assert {name for name in values if found[name]["p"] <= alpha} == rejected
            if alpha == 0.05:
                assert {name for name in values if found[name]["verdict"].startswith("decided, Holm p 0.0")} == rejected
        assert all(found[name]["detectable"] == pytest.approx(2.50 + 0.84) for name in values)  # z of 5 % / 8
        assert (found["beside"]["verdict"], found["beside"]["p"]) == ("as alone", 0.04)
        assert found["control"] == {"run": "control"}
    runs = {**STUDY["runs"], "late": {}}
    plan = read_study(write_study(finished, runs=runs, holm=["late", "mixdpo"]))
    table = write_tables(plan, {f"{run}-seed{seed}" for run in STUDY["runs"] for seed in (0, 1)})
    assert "dpo | +0.200 [+0.200, +0.200] | decided, Holm p 0.0004 |" in table  # 2 × 2 / 10,001
    assert "two-sided 2.5 %): 0.462 with 4 prompts" in detectable(plan, 4)  # (2.24 + 0.84) × 0.3 / 2


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_parse(path: Path, build: Any) -> None:  # noqa: F811
    """Every run's options are run.py's, and what a preset or the grid says is not undone by the study's options."""
    study = read_study(path)
    parser, point = build(ROOT / "configs/demo.yaml").parser, study.points[-1]
    parsed = {}
    for run in study.runs:
        words = [word for pair in study.arguments(run, point, 5) for word in pair]
        parsed[run] = parser.parse_args(["fit", *words]).fit
        assert parsed[run].name == study.name(run, point, 5)
        assert (parsed[run].seed_everything, parsed[run].runs) == (5, study.folder)
        assert parsed[run].data.init_args.seed == 5 and parsed[run].data.init_args.validation == 0
        assert parsed[run].model.init_args.optimizer.init_args.lr == point["model.optimizer.init_args.lr"]
        (callback,) = parsed[run].trainer.callbacks
        assert callback.init_args.prompts == study.prompts
    assert f"python -m mixdpo study {path.relative_to(ROOT)}" in path.read_text("utf-8")
    ways = {run: p.data.init_args.routing for run, p in parsed.items()}
    routing = {run: (way.hard_fraction, way.order) for run, way in ways.items()}
    if path.stem == "default_recipe":
        models = {run: each.model.init_args for run, each in parsed.items()}
        cosine = {run for run, model in models.items() if model.schedule.class_path.endswith(".Cosine")}
        assert cosine == {study.control} and study.control not in study.holm
        weights = {run: model.sft_weight for run, model in models.items() if model.sft_weight != 1}
        assert weights == {study.holm[1]: 0.25}
        assert {routing[run] for run in routing if run.startswith("sft_then_dpo")} == {(0.3, "sft_first")}
        assert {run for run, way in ways.items() if way.assignment == "random"} == {"sft_then_dpo_random"}
        assert {run for run, model in models.items() if model.cleaning} == {"sft_then_dpo_cleaned"}
        assert {(each.trainer.max_epochs, each.trainer.max_steps) for each in parsed.values()} == {(1, -1), (2, 60)}
    if path.stem == "noisy_labels":
        assert routing["dpo"] == routing["dpo_clean"] == (0.0, "shuffled")
        assert routing["mixdpo"] == routing["mixdpo_clean"] == routing["mixdpo_paper_cosine"] == (0.3, "easy_to_hard")
        assert routing["sft_then_dpo"] == (0.3, "sft_first")
        assert parsed["dpo"].data.init_args.source != parsed["dpo_clean"].data.init_args.source
        # matched steps: 240 pairs in fours, and as many where fewer pairs are trained
        assert parsed["dpo_easy_only"].trainer.max_steps == 240 // parsed["dpo"].data.init_args.batch_size == 60
