"""Two processes make the updates of one with the same steps, and only the first of them writes."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import build, build_sft, make_pairs, make_samples, write_pairs
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from test_cli import ROOT, contents, in_process

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.run_files import RunFiles
from mixdpo.batches.steps import Slices
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss
from mixdpo.token_cleaning.selection import Selection

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def options(model: str, source: str, validation: str, runs: Path) -> list[str]:
    """13 pairs in steps of 4, so that one process has no pair of the last step; 3 held out in batches of 2 and 1."""
    words = f"""--config configs/demo.yaml --name tiny --runs {runs} --model.base {model} --model.quantization none
        --model.dtype float64 --trainer.precision 64-true --model.optimizer torch.optim.SGD --model.optimizer.lr 0.1
        --model.log_gradient_norms true --model.schedule mixdpo.routing.Constant --data.source {source}
        --data.validation {validation} --data.batch_size 4 --data.eval_batch_size 2 --data.max_length 64
        --data.max_prompt_length 32 --trainer.callbacks null --trainer.log_every_n_steps 1
        --trainer.gradient_clip_val 1.0 --trainer.enable_progress_bar false"""
    return [*words.split(), "--data.routing", "{hard_fraction: 0.4, threshold: null}"]


def on_two(arguments: list[str], launcher: tuple[str, ...] = ()) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accumulate_grad_batches", "1"]
    command = [sys.executable, *launcher, "run.py", *arguments, *two]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_close(one: Path, other: Path) -> None:
    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-10)
    assert any(value.abs().max() > 1e-3 for key, value in mine.items() if "lora_B" in key)


def test_two_processes_are_one(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(13))
    held_out = [row | {"prompt": f"held out {row['prompt']}"} for row in make_pairs(3, seed=1)]
    validation = write_pairs(tmp_path / "validation.jsonl", held_out)
    one, two = ((tiny_model, source, validation, tmp_path / name) for name in ("one", "two"))
    assert in_process(*options(*one), "--trainer.accumulate_grad_batches", "2") == 0
    on_two(options(*two))
    folders = [tmp_path / name / "tiny" for name in ("one", "two")]
    assert [folder.name for folder in (tmp_path / "two").iterdir()] == ["tiny"]
    assert_close(*folders)
    names = [{name for name in contents(folder) if "tfevents" not in name} for folder in folders]
    assert names[0] == names[1]
    measured = [rows(folder) for folder in folders]
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


@pytest.mark.slow
def test_torchrun(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(13))
    arguments = options(tiny_model, source, "0", tmp_path / "runs")
    assert in_process(*arguments, "--name", "one", "--trainer.accumulate_grad_batches", "2") == 0
    on_two(arguments, ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713"))
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["one", "tiny"]
    assert_close(tmp_path / "runs" / "one", tmp_path / "runs" / "tiny")


def clean(
    model: str, source: str, folder: Path, cleaning: Cleaning, first: tuple[Any, ...] = (), **trainer: Any
) -> None:
    callbacks = [*first, RunFiles(), ExactResume(), LastCheckpoint()]
    trainer, module, data = build_sft(
        model,
        source,
        folder,
        trainer=trainer | {"callbacks": callbacks},
        data={"slices": Slices(3)},
        cleaning=cleaning,
        dtype="float64",
        schedule=Constant(warmup=0.0),
    )
    trainer.fit(module, data)


def test_two_processes_clean_as_one(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-evolving, with 5 samples in a slice, so that the second process has none in the last step of each."""
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    source = write_pairs(tmp_path / "samples.jsonl", make_samples(15))
    how = Cleaning(selection=Selection(0.6), warm_up_stages=1)
    common = {"cleaning": how, "first": (RefreshReference(),), "precision": "64-true"}
    clean(tiny_model, source, tmp_path / "one", accumulate_grad_batches=2, **common)
    clean(tiny_model, source, tmp_path / "two", strategy="ddp_fork", devices=2, **common)
    assert_close(tmp_path / "one", tmp_path / "two")
    for name in ("scores", "weights", "decided"):
        mine, theirs = (np.load(tmp_path / folder / "cleaning" / f"{name}.npy") for folder in ("one", "two"))
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-6)
    assert 0.5 < np.load(tmp_path / "two" / "cleaning" / "weights.npy").mean() < 1


def test_two_processes_clean_hard_pairs_as_one(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step with a hard pair one process has none, and in the last one the second has filler only."""
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(13))
    how = Cleaning(scorer=Loss("base"), selection=Selection(0.6))

    def run(name: str, **trainer: Any) -> None:
        trainer |= {"callbacks": [RunFiles(), ExactResume(), LastCheckpoint()], "precision": "64-true"}
        data = {"routing": Routing(hard_fraction=0.3, order="interleaved")}
        options = {"cleaning": how, "dtype": "float64", "schedule": Constant(warmup=0.0)}
        fitter, module, pairs = build(tiny_model, source, tmp_path / name, trainer=trainer, data=data, **options)
        fitter.fit(module, pairs)

    run("one", accumulate_grad_batches=2)
    run("two", strategy="ddp_fork", devices=2)
    assert_close(tmp_path / "one", tmp_path / "two")
    mine, theirs = (np.load(tmp_path / name / "cleaning" / "weights.npy") for name in ("one", "two"))
    assert np.array_equal(mine, theirs) and 0.5 < mine.mean() < 0.7


@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist")  # the modules reduce their means themselves
def test_two_processes_resume_exactly_with_dropout(tiny_model: str, tmp_path: Path) -> None:
    """Each draws its own random numbers from where it was; the best policy is that of the first of two validations,
    and goes on with its run, whose folder has another name by then."""
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(13))

    def run(name: str, ckpt_path: str | None = None, **trainer: Any) -> None:
        module: dict[str, Any] = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "schedule": Constant(warmup=0.0)}
        best = ModelCheckpoint(monitor="val/all/sft_loss", mode="max")
        options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 2, "first": (best,), **trainer}
        held_out = {"validation": 0.2}
        fitter, model, data = build(tiny_model, source, tmp_path / name, trainer=options, data=held_out, **module)
        fitter.fit(model, data, ckpt_path=ckpt_path, weights_only=True)

    run("whole")
    run("cut", max_steps=4)
    moved = (tmp_path / "cut").rename(tmp_path / "moved")
    run("rest", ckpt_path=str(moved / "checkpoints" / "last.ckpt"))
    kept = [[path.name for path in (folder / "checkpoints").glob("epoch=0*")] for folder in tmp_path.glob("[rw]*/")]
    assert len(kept) == 2 and kept[0] == kept[1] != []
    whole, rest = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "rest")
    )
    assert whole == rest
    last = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "rest")]
    states = [each["state_dict"] for each in last]  # the best one is older than the interruption
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()) and states[0]


def test_a_fresh_adapter_is_the_same_on_all_ranks(tiny_model: str, tmp_path: Path) -> None:
    """Dropout has drawn unlike random numbers by then."""

    class Same(Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            sums = [float(p.detach().double().sum()) for p in pl_module.parameters() if p.requires_grad]
            found: list[Any] = [None, None]
            torch.distributed.all_gather_object(found, sums)
            assert found[0] == found[1]

    source = write_pairs(tmp_path / "samples.jsonl", make_samples(15))
    trainer, module, data = build_sft(
        tiny_model,
        source,
        tmp_path / "run",
        trainer={"strategy": "ddp_fork", "devices": 2, "first": (Same(),)},
        data={"slices": Slices(3)},
        lora=Lora(rank=4, alpha=8, dropout=0.3),
        stage_start="fresh_adapter",
        schedule=Constant(warmup=0.0),
    )
    trainer.fit(module, data)


def test_a_signal_that_reaches_one_process_stops_both(tiny_model: str, tmp_path: Path) -> None:
    class SignalToTheFirst(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1 and trainer.global_rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(13))
    callbacks = [SignalToTheFirst(), RunFiles(), ExactResume(), LastCheckpoint()]
    trainer = {"strategy": "ddp_fork", "devices": 2, "callbacks": callbacks}
    fitter, module, data = build(tiny_model, source, tmp_path / "run", trainer=trainer)
    with pytest.raises(Exception, match="Stopped"):
        fitter.fit(module, data)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_scorer_of_the_policy_is_refused_on_two_devices(tiny_model: str, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "samples.jsonl", make_samples(12))
    how = Cleaning(scorer=ExcessLoss(worse="policy"), selection=Selection(0.6, scope="sample"))
    with pytest.raises(Exception, match="several devices") as error:
        clean(tiny_model, source, tmp_path / "run", how, strategy="ddp_fork", devices=2)
    assert "InputError" in f"{error.type} {error.value}" or error.type is InputError
