"""A continued run is the run that never stopped: same batches, same random numbers, same adapter, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter_weights, build, fit, make_pairs, write_pairs

from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant

DROPOUT: dict[str, Any] = {
    "lora": Lora(rank=4, alpha=8, dropout=0.3),
    "optimizer": torch.optim.AdamW,
    "lr": 1e-2,
    "schedule": Constant(warmup=0.0),
}


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", make_pairs(20))


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (5, 0), (7, 0), (5, 2)])
def test_resume_equals_never_stopping(stop: int, workers: int, tiny_model: str, source: str, tmp_path: Path) -> None:
    """10 steps in two epochs; stops in mid-epoch and at an epoch's end, with a validation in between."""
    data = {"workers": workers, "validation": 0.2}
    trainer: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    whole = fit(tiny_model, source, tmp_path / "whole", trainer=trainer, data=data, **DROPOUT)
    cut = trainer | {"max_steps": stop}
    fit(tiny_model, source, tmp_path / "cut", trainer=cut, data=data, **DROPOUT)
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed = fit(
        tiny_model, source, tmp_path / "rest", trainer=trainer, data=data, ckpt_path=str(checkpoint), **DROPOUT
    )
    assert resumed.trainer.global_step == whole.trainer.global_step
    for key, value in adapter_weights(whole).items():
        assert torch.equal(value, adapter_weights(resumed)[key]), key


def test_checkpoint_holds_adapters_and_optimizer_only(tiny_model: str, source: str, tmp_path: Path) -> None:
    module = fit(tiny_model, source, tmp_path / "run", **DROPOUT)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(adapter_weights(module))
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    assert (tmp_path / "run" / "route.json").is_file()


def test_checkpoint_of_another_adapter_or_route_is_refused(tiny_model: str, source: str, tmp_path: Path) -> None:
    fit(tiny_model, source, tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    other_lora = {"lora": Lora(rank=4, targets=["q_proj"])}
    with pytest.raises(InputError, match=r"another run \(lora: "):
        fit(tiny_model, source, tmp_path / "a", ckpt_path=checkpoint, **other_lora)
    validator, module, pairs = build(tiny_model, source, tmp_path / "v", data={"validation": 0.3}, **other_lora)
    with pytest.raises(InputError, match="adapter does not fit"):
        validator.validate(module, pairs, ckpt_path=checkpoint, weights_only=True)
    with pytest.raises(InputError, match="another run"):
        other = {"routing": Routing(hard_fraction=0.5)}
        fit(tiny_model, source, tmp_path / "b", ckpt_path=checkpoint, data=other)


def test_validate_reads_a_checkpoint(tiny_model: str, source: str, tmp_path: Path) -> None:
    data = {"validation": 0.3}
    fitter, module, pairs = build(tiny_model, source, tmp_path / "run", data=data, lr=1.0)
    fitter.fit(module, pairs)
    trained = dict(fitter.callback_metrics)
    again, fresh, same = build(tiny_model, source, tmp_path / "validate", data=data)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (found,) = again.validate(fresh, same, ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert {"val/easy/rewards/accuracy", "val/hard/rewards/accuracy", "val/all/displacement/chosen"} <= set(found)
    for name, value in found.items():
        assert value == pytest.approx(float(trained[name])), name
    assert found["val/all/displacement/chosen"] != 0
