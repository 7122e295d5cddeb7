"""SFT on weighted tokens: the step's normalisation, stages, and what cleaning does to the loss."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, build, build_sft, fit, make_pairs, make_samples, write_pairs
from test_faults import At, Crash, crash
from test_scoring import saved_adapter

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.gold_evaluation import GoldEvaluation
from lightning_modules.callbacks.logging import Throughput
from lightning_modules.callbacks.run_files import RunFiles
from mixdpo.batches.steps import Slices
from mixdpo.model.adapters import adapter_state
from mixdpo.routing.route import Routing
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss
from mixdpo.token_cleaning.selection import Selection

SOURCE_ROWS = make_samples(24)
EVOLVING: dict[str, Any] = {"stage_start": "restart", "optimizer": torch.optim.AdamW, "lr": 1e-2}
EVOLVING["cleaning"] = Cleaning(scorer=ExcessLoss(), selection=Selection(0.6), warm_up_stages=1)


def check_resuming(stop: int, every: Any, model: str, source: str, folder: Path, **options: Any) -> None:
    """A run of six steps that is killed and continued leaves what one leaves that never stops, to the bit."""

    def go(name: str, first: tuple[Any, ...] = (), **more: Any) -> Any:
        trainer = {"first": (RefreshReference(every), *first), "accumulate_grad_batches": 2}
        return fit(model, source, folder / name, make=build_sft, trainer=trainer, **options, **more)

    whole = go("whole")
    with pytest.raises(Crash):
        go("cut", (At(stop, crash), LastCheckpoint(1)))
    resumed = go("rest", ckpt_path=str(folder / "cut" / "checkpoints" / "last.ckpt"))
    assert resumed.trainer.global_step == 6
    torch.testing.assert_close(adapter_state(whole), adapter_state(resumed), rtol=0, atol=0)
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


# Outside of steps, where bf16-mixed is entered by hand: the adapter is fp32, the states are bf16.
MIXED: dict[str, Any] = {"dtype": "bfloat16", "trainer": {"precision": "bf16-mixed"}}


def scores(make: Any, model: str, source: str, folder: Path, **options: Any) -> np.ndarray:
    """Of the same cleaning in bf16-mixed and in fp32: (2, M)."""
    for name, how in (("mixed", MIXED), ("full", {})):
        fit(model, source, folder / name, make=make, **options, **how)
    return np.stack([np.load(folder / name / "cleaning/scores.npy") for name in ("mixed", "full")])


def test_scores_of_a_given_reference(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "samples.jsonl", make_samples(12))
    cleaning = Cleaning(reference=saved_adapter(tiny_model, tmp_path / "reference", rank=4))
    mixed, full = scores(build_sft, tiny_model, source, tmp_path, cleaning=cleaning)
    assert np.abs(full).max() > 0.5 and 0 < np.abs(mixed - full).max() < 0.1


def test_a_reference_fitted_to_easy_pairs(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    options: dict[str, Any] = {"cleaning": Cleaning(selection=Selection(0.6), reference_lr=0.01)}
    options["data"] = {"routing": Routing(hard_fraction=0.5)}
    mixed, full = scores(build, tiny_model, source, tmp_path, **options)
    assert np.abs(full).max() > 0.1 and 0 < np.abs(mixed - full).max() < 0.1


def test_responses_of_the_model_as_it_is_trained(tiny_model: str, tmp_path: Path) -> None:
    prompts = write_pairs(tmp_path / "prompts.jsonl", [{"prompt": f"{word} 7"} for word in WORDS[:3]])
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    evaluation = GoldEvaluation(prompts, scorer=None, max_new_tokens=4, batch_size=2, dequantise=False)
    trainer = {"callbacks": [RunFiles(), ExactResume(), Throughput(), evaluation], **MIXED["trainer"]}
    start = saved_adapter(tiny_model, tmp_path / "start", rank=4)
    fit(tiny_model, source, tmp_path / "run", **MIXED | {"trainer": trainer}, adapter=start, lr=1.0)
    rows = json.loads((tmp_path / "run/responses.json").read_text())
    assert any(row["before"]["text"] != row["after"]["text"] for row in rows)
    assert not torch.is_autocast_enabled("cpu")
