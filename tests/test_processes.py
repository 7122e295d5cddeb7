"""Two processes make the updates of one with the same steps, and only the first of them writes."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import build_sft, fit, make_pairs, make_samples, write_pairs
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from test_cli import ROOT, contents, in_process, metrics

from lightning_modules.callbacks.clean_tokens import RefreshReference
from mixdpo.batches.steps import Slices
from mixdpo.errors import InputError
from mixdpo.evaluation.fit_results import read_columns
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss
from mixdpo.token_cleaning.selection import Selection

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", make_pairs(13))


def options(model: str, source: str, validation: str, runs: Path) -> list[str]:
    """13 pairs in steps of 4, so that one process has no pair of the last step; 3 held out in batches of 2 and 1."""
    words = f"""--config configs/demo.yaml --name tiny --runs {runs} --model.base {model} --model.quantization none
        --model.dtype float64 --trainer.precision 64-true --model.optimizer torch.optim.SGD --model.optimizer.lr 0.1
        --model.schedule mixdpo.routing.Constant --data.source {source}
        --data.validation {validation} --data.batch_size 4 --data.eval_batch_size 2 --data.max_length 64
        --data.max_prompt_length 32 --trainer.callbacks null --trainer.log_every_n_steps 1
        --trainer.gradient_clip_val 1.0 --trainer.enable_progress_bar false"""
    return [*words.split(), "--data.routing", "{hard_fraction: 0.4, threshold: null}"]


def on_two(arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accumulate_grad_batches", "1"]
    command = [sys.executable, "run.py", *arguments, *two]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one: Path, other: Path) -> None:
    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-10)
    assert any(value.abs().max() > 1e-3 for key, value in mine.items() if "lora_B" in key)


def test_two_processes_are_one(tiny_model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = [row | {"prompt": f"held out {row['prompt']}"} for row in make_pairs(3, seed=1)]
    validation = write_pairs(tmp_path / "validation.jsonl", held_out)
    one, two = ((tiny_model, pairs, validation, tmp_path / name) for name in ("one", "two"))
    assert in_process(*options(*one), "--trainer.accumulate_grad_batches", "2") == 0
    on_two(options(*two))
    folders = [tmp_path / name / "tiny" for name in ("one", "two")]
    assert [folder.name for folder in (tmp_path / "two").iterdir()] == ["tiny"]
    assert_close(*folders)
    names = [
        {name for name in contents(folder) if "tfevents" not in name and name != "report.html"} for folder in folders
    ]
    assert names[0] == names[1]
    measured = [metrics(folder) for folder in folders]
    held = [read_columns(folder / "heldout.csv") for folder in folders]
    assert len(held[0]["pair_id"]) == 3 and held[0].keys() == held[1].keys()
    assert all(held[0][name] == pytest.approx(held[1][name], rel=1e-6, abs=1e-7) for name in held[0])
    assert len(measured[0]) == len(measured[1])
    speed = ("_per_second", "memory/", "floor_share")
    for mine, theirs in zip(*measured, strict=True):
        for name in mine:
            if mine[name] and not any(part in name for part in speed):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-6, abs=1e-7), name
    assert sum(bool(row["val/all/rewards/accuracy"]) for row in measured[1]) == 1
    # another number of processes would cut the steps otherwise
    checkpoint = str(folders[1] / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert in_process(*options(*one), "--trainer.accumulate_grad_batches", "1", "--ckpt_path", checkpoint) == 1
    assert "devices: 2 there, 1 here" in capsys.readouterr().err


FORK: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
CONSTANT = Constant(warmup=0.0)


@pytest.fixture
def samples(tmp_path: Path) -> str:
    """Five in each of three slices, so that the second process has none in the last step of each."""
    return write_pairs(tmp_path / "samples.jsonl", make_samples(15))


def on_one_and_two(folder: Path, train: Any, **trainer: Any) -> None:
    train(folder / "one", trainer={**trainer, "precision": "64-true", "accumulate_grad_batches": 2})
    train(folder / "two", trainer={**trainer, "precision": "64-true", **FORK})
    assert_close(folder / "one", folder / "two")


def test_two_processes_clean_as_one(tiny_model: str, samples: str, tmp_path: Path) -> None:
    """Self-evolving."""
    options = {"cleaning": Cleaning(selection=Selection(0.6), warm_up_stages=1), "schedule": CONSTANT}
    options |= {"make": build_sft, "data": {"slices": Slices(3)}, "dtype": "float64"}
    on_one_and_two(tmp_path, partial(fit, tiny_model, samples, **options), first=(RefreshReference(),))
    for name in ("scores", "weights", "decided"):
        mine, theirs = (np.load(tmp_path / folder / "cleaning" / f"{name}.npy") for folder in ("one", "two"))
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-6)
    assert 0.5 < np.load(tmp_path / "two" / "cleaning" / "weights.npy").mean() < 1


def test_two_processes_clean_hard_pairs_as_one(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """In the first step with a hard pair one process has none, and in the last one the second has filler only."""
    data = {"routing": Routing(hard_fraction=0.3, order="interleaved")}
    how = Cleaning(scorer=Loss("base"), selection=Selection(0.6))
    options = {"cleaning": how, "dtype": "float64", "schedule": CONSTANT, "data": data}
    on_one_and_two(tmp_path, partial(fit, tiny_model, pairs, **options))
    mine, theirs = (np.load(tmp_path / name / "cleaning" / "weights.npy") for name in ("one", "two"))
    assert np.array_equal(mine, theirs) and 0.5 < mine.mean() < 0.7


@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist")  # the modules reduce their means themselves
def test_two_processes_resume_exactly_with_dropout(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Each draws its own random numbers from where it was; the best policy is that of the first of two validations,
    and goes on with its run, whose folder has another name by then."""

    def run(name: str, ckpt_path: str | None = None, **trainer: Any) -> None:
        best = ModelCheckpoint(monitor="val/all/sft_loss", mode="max")
        options = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "schedule": CONSTANT, "data": {"validation": 0.2}}
        trainer = {**FORK, "max_epochs": 2, "first": (best,), **trainer}
        fit(tiny_model, pairs, tmp_path / name, trainer=trainer, ckpt_path=ckpt_path, **options)

    run("whole")
    run("cut", max_steps=4)
    moved = (tmp_path / "cut").rename(tmp_path / "moved")
    run("rest", ckpt_path=str(moved / "checkpoints" / "last.ckpt"))
    folders = [tmp_path / name for name in ("whole", "rest")]
    kept = [[path.name for path in (folder / "checkpoints").glob("epoch=0*")] for folder in folders]
    assert kept[0] == kept[1] != []
    whole, rest = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert whole == rest
    last = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders]
    states = [each["state_dict"] for each in last]  # the best one is older than the interruption
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()) and states[0]


def test_a_fresh_adapter_is_the_same_on_all_ranks(tiny_model: str, samples: str, tmp_path: Path) -> None:
    """Dropout has drawn unlike random numbers by then."""

    class Same(Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            sums = [float(p.detach().double().sum()) for p in pl_module.parameters() if p.requires_grad]
            gathered: list[Any] = [None, None]
            torch.distributed.all_gather_object(gathered, sums)
            assert gathered[0] == gathered[1]

    options = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "stage_start": "fresh_adapter", "schedule": CONSTANT}
    options |= {"make": build_sft, "data": {"slices": Slices(3)}}
    fit(tiny_model, samples, tmp_path / "run", trainer={**FORK, "first": (Same(),)}, **options)


def test_a_signal_that_reaches_one_process_stops_both(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    class SignalToTheFirst(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1 and trainer.global_rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Exception, match="Stopped"):
        fit(tiny_model, pairs, tmp_path / "run", trainer={**FORK, "first": (SignalToTheFirst(),)})
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_scorer_of_the_policy_is_refused_on_two_devices(tiny_model: str, samples: str, tmp_path: Path) -> None:
    how = Cleaning(scorer=ExcessLoss(worse="policy"), selection=Selection(0.6, scope="sample"))
    with pytest.raises(Exception, match=r"give --trainer.devices 1") as error:
        fit(tiny_model, samples, tmp_path / "run", make=build_sft, cleaning=how, trainer=FORK)
    assert "InputError" in f"{error.type} {error.value}" or error.type is InputError
