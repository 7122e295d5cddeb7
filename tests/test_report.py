"""The page of a run, and of several."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import make_pairs, write_pairs

from lightning_modules.callbacks import run_files
from mixdpo.__main__ import main
from mixdpo.evaluation import report as page
from mixdpo.routing import Routing
from mixdpo.storage.files import write_json

BAD = "<script>alert('$x$')</script>"


def write_csv(path: Path, columns: tuple[str, ...], rows: list[Any]) -> None:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [columns, *rows]))


def write_run(folder: Path, pairs: int = 60, held_out: int = 40, seed: int = 0, score: Any = 0.5) -> str:
    """Every file of a run, with markup wherever a run may hold a text."""
    rng, steps = np.random.default_rng(seed), pairs // 4
    folder.mkdir(parents=True)
    rows = [(i // 4, m, int(m < 0), int(m >= 0)) for i, m in enumerate(np.sort(rng.normal(size=pairs))[::-1].tolist())]
    write_csv(folder / "order.csv", ("step", "margin", "hard", "preference_share"), rows)
    columns = ("step", "train/preference_loss", "train/sft_loss", "lr", "grad_norm", "val/all/rewards/accuracy")
    rows = [(step, *rng.random(4), "" if step < steps - 1 else 0.5) for step in range(steps)]
    write_csv(folder / "metrics.csv", columns, rows)
    ids = rng.permutation(held_out + seed)[:held_out] + 2**60  # a double would round these
    columns = ("pair_id", "rewards/accuracy", "tokens/chosen", "tokens/rejected")
    write_csv(folder / "heldout.csv", columns, [(i, int(rng.random() < 0.7), 5, 7) for i in ids.tolist()])
    plan = {"order": BAD, "threshold": 0.0, "ties_at_threshold": 3, "hard_at_threshold": 1, "warnings": [BAD]}
    write_json(folder / "route.json", {"pairs": pairs} | plan)
    write_json(folder / "results.json", {"heldout_prompts": {}, "summary": {BAD: BAD}})
    response = {"text": BAD, "tokens": 4, "ended": True, "score": score}
    rows = [{"prompt": f"{n} {BAD}", "before": response | {"score": 0.0}, "after": response} for n in range(20)]
    rows[17]["after"] = response | {"text": "most changed", "score": -1.0}
    write_json(folder / "responses.json", rows)
    (folder / "config.yaml").write_text(f"name: {BAD}\n")
    return str(folder)


def written(out: Path, *runs: str) -> str:
    assert main(["report", *runs, "--out", str(out)]) == 0
    return out.read_text("utf-8")


def test_a_large_run_is_a_small_page_that_fetches_nothing(tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", write_run(tmp_path / "<i>run", 61_135))
    assert len(text.encode()) < 400_000 and text.count("<path") + text.count("<use") < 1_000
    assert text.count("<svg") == text.count('role="img" aria-label="') == text.count("<figcaption>") == 9
    links = re.findall(r"(?:src|href|action|data)\s*=\s*[\"']?([^\"'\s>]*)|url\(([^)]*)\)|@import", text)
    assert links and all(("".join(link)).startswith("#") for link in links)
    assert "<script" not in text and "<i>" not in text and text.count("&lt;script&gt;") == 40
    assert text.index("most changed") < text.index(">1 &lt;script") and ">13 &lt;script" not in text  # 12 of 20
    assert "τ = 0; pairs at τ: 3, hard among these: 1" in text
    # light and dark differ by variables only, of which each that is used has a value in both
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    figures = "".join(re.findall(r"<svg.*?</svg>", dark, re.DOTALL))
    used = set(re.findall(r"var\((--s\d)\)", figures))
    assert used == {"--s0", "--s1"} and "currentColor" in figures
    assert all(f"{name}:" in part for name in used for part in (light, dark.partition("}")[0]))
    assert not re.search(r"(stroke|fill): #", figures)


def test_absent_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", score=None)
    assert "Not in" not in written(tmp_path / "page.html", run)
    for name in ("heldout.csv", "order.csv", "results.json", "route.json"):
        Path(run, name).unlink()
    text = written(tmp_path / "page.html", run)
    assert "order.csv, heldout.csv, results.json, route.json, plan.json." in text
    assert "not drawn: Margins; Order as trained: margins; Order as trained: routes; " in text
    Path(run, "metrics.csv").write_text("step,lr\n1,x\n")
    assert main(["report", run]) == 2 and f"{run}/metrics.csv is damaged" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "give the folder of a run" in capsys.readouterr().err


def test_differences_are_of_what_both_measured(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "same", seed=n, held_out=200, score=n) for n, name in enumerate("ab")]
    rows = [[line.split(",") for line in Path(run, "heldout.csv").read_text().split()[1:]] for run in runs]
    first, second = ({row[0]: float(row[1]) for row in of_run} for of_run in rows)
    gains = np.array([second[key] - first[key] for key in first.keys() & second.keys()])
    assert 100 < len(gains) < 201
    drawn = np.random.default_rng(5).choice(gains, (20_000, len(gains))).mean(1)
    accuracy, gold, length = page.differences([page.read_run(run, run) for run in runs])
    gain = accuracy["gain"]
    assert accuracy["n"] == len(gains) and gain.mean == pytest.approx(gains.mean())
    assert [gain.low, gain.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)
    assert (gold["n"], gold["gain"].mean, gold["decided"], length["decided"]) == (20, 0.95, True, False)
    text = unescape(written(tmp_path / "page.html", *runs))  # two runs of one name are told apart by their folders
    assert f"{gain:+.3f}" in text and all(f"{run}: preference" in text for run in runs)


def test_a_fit_writes_its_page_and_survives_a_failure(
    tiny_model: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_files, "report", page.report)
    for name in ("drawn", "not"):
        trainer, module, data = build(tiny_model, source, tmp_path / name)
        trainer.fit(module, data)
        assert Path(tmp_path, name, "adapter").is_dir() and Path(tmp_path, name, "results.json").exists()
        assert Path(tmp_path, name, "report.html").exists() == (name == "drawn")
        monkeypatch.setattr(page, "draw", lambda *_, **__: 1 / 0)
    assert re.search(r"\nwarning: no report.html \(ZeroDivisionError: .*\)\n", capsys.readouterr().out)


def test_held_out_rows_are_of_training(tiny_model: str, tmp_path: Path, capsys: Any) -> None:
    """Not of the sanity check. Without margins there is no histogram, which is no fault of the run."""
    data = {"validation": 0.3, "routing": Routing(hard_fraction=0, order="shuffled")}
    rows = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in make_pairs(24)]
    bare, logger = write_pairs(tmp_path / "bare.jsonl", rows), TensorBoardLogger(str(tmp_path), name="board")
    for name, every in (("never", 2), ("once", 1)):
        options = {"logger": logger, "num_sanity_val_steps": 2, "check_val_every_n_epoch": every}
        trainer, module, pairs = build(tiny_model, bare, tmp_path / name, data=data, trainer=options)
        trainer.fit(module, pairs)
        summary = json.loads((tmp_path / name / "results.json").read_text())["summary"]
        assert (every == 1) == (tmp_path / name / "heldout.csv").exists() == any("held-out" in line for line in summary)
        assert (tmp_path / name / "adapter/README.md").exists() and "warning: no" not in capsys.readouterr().out
    assert summary["optimizer steps of the policy on held-out pairs"] == summary["optimizer steps"]
