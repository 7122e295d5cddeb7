"""A continued run is the run that never stopped: same batches, same random numbers, same adapter, bit for bit."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter_weights, build, fit, same
from test_faults import ADAMW, SOURCE_ROWS, checkpoint, run, whole

from lightning_modules.callbacks.checkpoint import ExactResume, _random_state
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora

__all__ = ["SOURCE_ROWS", "run", "whole"]  # fixtures, and their rows
DROPOUT = {"lora": Lora(rank=4, alpha=8, dropout=0.3)}


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (5, 0), (7, 0), (5, 2)])
def test_resume_equals_never_stopping(stop: int, workers: int, run: Any, whole: Any, tmp_path: Path) -> None:
    """10 steps in two epochs; stops in mid-epoch and at an epoch's end, with a validation in between."""
    trainer: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    data = {"validation": 0.2}
    expected = whole(data=data, trainer=trainer, **DROPOUT)
    data |= {"workers": workers}
    run(tmp_path / "cut", data=data, trainer=trainer | {"max_steps": stop}, **DROPOUT)
    resumed = run(tmp_path / "rest", after=tmp_path / "cut", data=data, trainer=trainer, **DROPOUT)
    assert resumed.trainer.global_step == expected.trainer.global_step and same(resumed, expected)


def test_checkpoint_holds_adapters_and_optimizer_only(run: Any, tmp_path: Path) -> None:
    module = run(tmp_path)
    state = torch.load(checkpoint(tmp_path), weights_only=True)["state_dict"]
    assert set(state) == set(adapter_weights(module)) and all(".lora_" in key for key in state)
    assert (tmp_path / "route.json").is_file()


def test_validation_refuses_another_adapter(run: Any, tiny_model: str, source: str, tmp_path: Path) -> None:
    """What training refuses is in bad_input/checkpoints.py."""
    run(tmp_path / "run")
    other = {"lora": Lora(rank=4, targets=["q_proj"]), "data": {"validation": 0.3}, **ADAMW}
    validator, module, pairs = build(tiny_model, source, tmp_path / "v", **other)
    with pytest.raises(InputError, match="adapter does not fit"):
        validator.validate(module, pairs, ckpt_path=checkpoint(tmp_path / "run"), weights_only=True)


def test_a_later_fit_does_not_draw_the_numbers_of_a_checkpoint_again() -> None:
    resume = ExactResume()
    resume._restored = _random_state()
    resume.on_train_start(None, None)  # type: ignore[arg-type]
    first = torch.rand(4)
    resume.on_train_start(None, None)  # type: ignore[arg-type]
    assert not torch.equal(torch.rand(4), first)


def test_a_fit_outside_of_the_main_thread(tiny_model: str, source: str, tmp_path: Path) -> None:
    """Only the main thread may set handlers of signals, as a notebook's or a tuner's threads are not."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(fit(tiny_model, source, tmp_path / "run")))
    thread.start()
    thread.join()
    assert done and (tmp_path / "run/checkpoints/last.ckpt").exists()
