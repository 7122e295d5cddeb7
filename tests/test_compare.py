"""`mixdpo compare`: runs around a stub of the command line, the table against its own bootstrap, real runs by hand."""

import csv
import json
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from judging import wait_for
from test_cli import in_process, options
from test_study import write_stub

from mixdpo.__main__ import main
from mixdpo.evaluation.compare import MATCHED

ROOT = Path(__file__).parents[1]
STUB = """
import json, random, sys, time
from pathlib import Path
if sys.argv[-1] == "--print_config":
    print(Path("resolved.yaml").read_text())
    sys.exit()
folder = Path(sys.argv[-3], sys.argv[-1])
with open("calls", "a") as calls:
    calls.write(json.dumps([*zip(sys.argv[1::2], sys.argv[2::2])]) + "\\n")
(folder / "adapter").mkdir(parents=True)
if Path(folder.name + ".slow").exists():
    time.sleep(600)
draw, gain = random.Random(folder.name), 0.2 * folder.name.startswith("demo")
rows = [f"{i},{int(i % 3 == 0)},{i % 2},{draw.random() + gain}" for i in range(30)]
(folder / "heldout.csv").write_text("\\n".join(["pair_id,hard,length_accuracy,rewards/accuracy", *rows]))
(folder / "route.json").write_text('{"threshold": 0.25}')
(folder / "results.json").write_text('{"steps": 7}')
"""
DATA = {"validation": 0.1, "validation_threshold": None, "routing": {"assignment": "margin", "hard_fraction": 0.1}}
RESOLVED = {"name": "demo", "runs": "out", "trainer": {"callbacks": None}, "data": {"init_args": DATA}}
COMPARE = ["compare", "base.yaml", "--with", "dpo,random_to_sft", "--seeds", "2", "--data.limit=9"]


def accuracies(run: str, parts: tuple[int, ...]) -> np.ndarray:
    files = [f"out/compare/demo/{run}-seed{s}/heldout.csv" for s in (0, 1)]
    tables = [np.genfromtxt(file, delimiter=",", skip_header=1) for file in files]
    return np.array([table[np.isin(table[:, 1], parts), 3] for table in tables])


def interval(values: np.ndarray, draws: int = 20_000) -> tuple[float, float, float]:
    """By counts: how often each seed and each pair is drawn."""
    rng, (seeds, pairs) = np.random.default_rng(7), values.shape
    s, p = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in (seeds, pairs))
    return float(values.mean()), *np.quantile(np.einsum("ds,sn,dn->d", s, values, p), [0.025, 0.975]).tolist()


def test_a_killed_comparison_goes_on_and_its_intervals_are_a_two_way_bootstrap(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_stub(tmp_path, STUB)
    for name, text in {"base.yaml": "name: demo", "resolved.yaml": json.dumps(RESOLVED)}.items():
        Path(name).write_text(text)
    (slow := Path("dpo-seed1.slow")).touch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with subprocess.Popen([sys.executable, "-m", "mixdpo", *COMPARE], stdout=subprocess.DEVNULL) as process:
        wait_for(Path("out/compare/demo/dpo-seed1/adapter").is_dir)
        process.send_signal(signal.SIGKILL if sys.platform == "linux" else signal.SIGTERM)
    slow.unlink()
    assert main(COMPARE) == 0 and main(COMPARE) == 0
    assert "mixdpo judge" in capsys.readouterr().out
    made = [dict(json.loads(line)) for line in Path("calls").read_text().splitlines()]
    order = "demo-seed0 demo-seed1 dpo-seed0 random_to_sft-seed0 dpo-seed1 dpo-seed1 random_to_sft-seed1"
    assert [each["--name"] for each in made] == order.split()
    for each in made:
        matched = [each.get(f"--{name}") for name in ("trainer.max_epochs", *MATCHED)]
        assert matched == ([None] * 3 if "demo" in each["--name"] else ["-1", "7", "0.25"])
        assert each["--data.limit"] == "9" and each["--seed_everything"] == each["--data.seed"] == each["--name"][-1]
    table = csv.DictReader(Path("out/compare/demo/table.csv").read_text().splitlines())
    rows = {(row["outcome"], row["run"]): row for row in table}
    for outcome, parts in {"held-out pairs": (0, 1), "easy pairs": (0,), "hard pairs": (1,)}.items():
        for run in ("demo", "dpo", "random_to_sft"):
            row, values = rows[outcome, run], accuracies(run, parts)
            assert [float(row[key]) for key in ("mean", "low", "high")] == pytest.approx(interval(values), abs=0.012)
            if run != "demo":
                gain = [float(row["difference" + key]) for key in ("", "_low", "_high")]
                assert gain == pytest.approx(interval(values - accuracies("demo", parts)), abs=0.015)
    assert float(rows["held-out pairs", "(the longer response wins)"]["mean"]) == 0.5


def test_adapters_are_those_of_the_commands_typed_by_hand(tiny_model, source, tmp_path, monkeypatch) -> None:
    def process(command: list[str], **_: Any) -> Any:
        with redirect_stdout(out := StringIO()):
            status = in_process(*command[3:])
        return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr="", poll=lambda: status)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mixdpo.evaluation.compare.run", process)
    monkeypatch.setattr("mixdpo.evaluation.study_run.subprocess", SimpleNamespace(Popen=process, STDOUT=0, DEVNULL=0))
    given = [*options(tiny_model, source, tmp_path), "--data.validation_threshold=null"]
    assert main(["compare", "--config", "configs/demo.yaml", "--with", "dpo_easy_only", "--seeds", "1", *given]) == 0
    ours = tmp_path / "compare/tiny"
    hand = "--config configs/controls/dpo_easy_only.yaml --trainer.max_epochs -1 --trainer.max_steps 5 --name hand"
    hand += " --data.validation_threshold 2.5 --seed_everything 0"  # 9 pairs in twos are 5 steps, the 6 easy ones 3
    assert in_process("--config", "configs/demo.yaml", *given, *hand.split()) == 0
    for file in ("adapter/adapter_model.safetensors", "heldout.csv"):
        assert (ours / "dpo_easy_only-seed0" / file).read_bytes() == (tmp_path / "hand" / file).read_bytes()
    ids = [np.genfromtxt(ours / f"{n}-seed0/heldout.csv", delimiter=",")[1:, 0] for n in ("tiny", "dpo_easy_only")]
    assert len(ids[0]) > 2 and (ids[0] == ids[1]).all()
