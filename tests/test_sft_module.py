"""SFT on weighted tokens: the step's normalisation, stages, and what cleaning does to the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_sft, fit, make_samples
from lightning.pytorch.callbacks import Callback

from lightning_modules.callbacks.checkpoint import LastCheckpoint
from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.batches.steps import Slices
from mixdpo.model.adapters import adapter_state
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss
from mixdpo.token_cleaning.selection import Selection

SOURCE_ROWS = make_samples(24)
EVOLVING: dict[str, Any] = {
    "cleaning": Cleaning(scorer=ExcessLoss(), selection=Selection(0.6), warm_up_stages=1),
    "stage_start": "restart",
    "optimizer": torch.optim.AdamW,
    "lr": 1e-2,
}


def run(tiny_model: str, source: str, folder: Path, **options: Any) -> Any:
    return fit(tiny_model, source, folder, make=build_sft, **options)


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def check_resuming(stop: int, every: Any, model: str, source: str, folder: Path, **options: Any) -> None:
    """A run of six steps that is killed and continued leaves what one leaves that never stops, to the bit."""

    def go(name: str, first: tuple[Any, ...] = (), **more: Any) -> Any:
        trainer = {"first": (RefreshReference(every), *first), "accumulate_grad_batches": 2}
        return run(model, source, folder / name, trainer=trainer, **options, **more)

    whole = go("whole")
    with pytest.raises(Killed):
        go("cut", (KillAt(stop), LastCheckpoint(1)))
    resumed = go("rest", ckpt_path=str(folder / "cut" / "checkpoints" / "last.ckpt"))
    assert resumed.trainer.global_step == 6
    ours, theirs = adapter_state(whole), adapter_state(resumed)
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    for name in ("scores.npy", "weights.npy", "decided.npy", "stages.json"):
        assert (folder / "whole/cleaning" / name).read_bytes() == (folder / "rest/cleaning" / name).read_bytes(), name


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("stage_start", ["restart", "fresh_adapter", "continue"])
def test_killed_and_resumed_equals_never_stopping(stage_start, stop, tiny_model, source, tmp_path) -> None:
    """Killed in each of three stages and where one ends."""
    options = EVOLVING | {"stage_start": stage_start, "data": {"slices": Slices(3)}}
    check_resuming(stop, "stage", tiny_model, source, tmp_path, **options)


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_an_online_scorer_resumes_in_the_middle_of_a_stage(stop, tiny_model, source, tmp_path) -> None:
    """The reference's losses are those of the batches that the stage began with; others round otherwise."""
    rho = Cleaning(scorer=ExcessLoss("policy", "cleaning_reference"), selection=Selection(0.6, scope="batch"))
    check_resuming(stop, 3, tiny_model, source, tmp_path, **EVOLVING | {"cleaning": rho, "stage_start": "continue"})


def test_validation_says_what_a_loop_over_samples_says(tiny_model: str, source: str, tmp_path: Path) -> None:
    """Loss, top-1 accuracy and entropy per response token, by plain forwards of the model on each sample alone."""
    trainer, module, data = build_sft(tiny_model, source, tmp_path / "run", data={"validation": 0.25})
    trainer.validate(module, data, verbose=False)
    means = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("loss", "token_accuracy", "entropy")}
    sums, tokens = {"loss": 0.0, "token_accuracy": 0.0, "entropy": 0.0}, 0
    for sample in data.validation_pool.samples:
        ids = torch.tensor([sample["input_ids"]])
        with torch.no_grad():
            log_probs = module.model.get_base_model()(input_ids=ids).logits[0].double().log_softmax(-1)
        for start, end in zip(sample["spans"][::2], sample["spans"][1::2], strict=True):
            for position in range(start, end):
                predicted, target = log_probs[position - 1], sample["input_ids"][position]
                sums["loss"] -= float(predicted[target])
                sums["token_accuracy"] += float(predicted.argmax() == target)
                sums["entropy"] -= float((predicted.exp() * predicted).sum())
                tokens += 1
    assert tokens > 20 and 0 < sums["token_accuracy"] < tokens
    for name, value in sums.items():
        assert means[name] == pytest.approx(value / tokens, abs=1e-5)
