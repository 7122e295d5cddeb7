"""Between logged steps a run waits for nothing; the bar, the clipping and the kernels that this needs."""

import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build_sft, fit, make_pairs, make_samples, write_pairs
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import CleanTokens
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory
from lightning_modules.callbacks.logging import Throughput, logs_step
from lightning_modules.callbacks.progress import StepBar
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.optimizer import choose_kernels
from lightning_modules.qlora import AdapterModule
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import StepPlan
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import Random
from mixdpo.token_cleaning.selection import Selection

WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")
Storages = dict[int, StorageWeakRef]
"""By number, which a weak reference keeps from being used again."""


def mark(side: Storages, *tensors: Any) -> None:
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    side |= {storage._cdata: StorageWeakRef(storage) for storage in storages if storage._cdata not in side}


class Waits(TorchDispatchMode):
    """Counts, by stack, what would wait for a GPU. On the device are weights, what `to_device` moves, and all that is
    computed from these. A tensor that nothing else went into may be on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Storages = {}
        self.either: Storages = {}
        self.found: Counter[str] = Counter()
        self.watches, self.seen = False, 0

    def add(self, what: str) -> None:
        if self.watches:
            stack = [f"{f.filename.split('site-packages/')[-1]}:{f.lineno}" for f in traceback.extract_stack()[-3::-1]]
            ours = [line for line in stack if "_modules/" in line or "mixdpo/" in line]
            self.found[f"{what}: {' < '.join([*stack[:3], *ours[:2]])}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.device:
            return result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        held = [value.untyped_storage()._cdata for value in given]
        side, name = self.either, func.overloadpacket.__name__
        host = [t for t, each in zip(given, held, strict=True) if each not in self.device and each not in self.either]
        if any(each in self.device for each in held):
            side, self.seen = self.device, self.seen + self.watches
            if name in WAIT or any(tensor.dim() for tensor in host):
                self.add(name)
        if side is self.device or not host:
            mark(side, *tree_leaves(result))
        return result


class Watch(Callback):
    """Calls `switch` where waiting begins to be forbidden, and where it ends to be: between logged steps, and in each
    batch of validation. A stage of cleaning is scored when the stage begins, and may wait."""

    def __init__(self, switch: Callable[[bool], None], patch: pytest.MonkeyPatch) -> None:
        self.switch, score = switch, CleanTokens._score
        patch.setattr(CleanTokens, "_score", lambda *given: (switch(False), score(*given), switch(True)))

    def on_train_batch_start(self, *_: Any) -> None:
        self.switch(True)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if logs_step(trainer):
            self.switch(False)

    def on_validation_batch_end(self, *_: Any) -> None:
        self.switch(False)

    on_validation_batch_start, on_exception = on_train_batch_start, on_validation_batch_end


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        mark(waits.device, moved := tensor.clone())
        return moved

    def listen(name: str, original: Any) -> None:
        def read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if self.untyped_storage()._cdata in waits.device:
                waits.add(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, read)

    for module in ("batches.rows", "batches.batch", "model.reference_cache"):
        monkeypatch.setattr(f"mixdpo.{module}.to_device", to_device)
    for name in ("tolist", "numpy", "cpu"):  # these are not dispatched
        listen(name, getattr(torch.Tensor, name))
    return waits


HELD_OUT = {"validation": 0.2}
CLEANED = {"routing": Routing(hard_fraction=0.5), **HELD_OUT}
RUNS: dict[str, dict[str, Any]] = {
    "pairs": {"data": {"routing": Routing(hard_fraction=0.5, order="interleaved"), **HELD_OUT}},
    "pairs, cleaned": {"data": CLEANED, "cleaning": Cleaning(selection=Selection(0.6), reference_lr=0.01)},
    "samples, cleaned": {"make": build_sft, "data": HELD_OUT, "cleaning": Cleaning(Random(), Selection(0.6))},
}


def run(name: str, model: str, folder: Path, *first: Any, **trainer: Any) -> Any:
    """Four steps of two micro-batches, of which the second and the fourth are logged, with all of a run's callbacks."""
    source = write_pairs(folder / "rows.jsonl", make_samples(20) if "make" in RUNS[name] else make_pairs(20))
    ours = [StepBar(), *first, NonFinite(), RunFiles(), ExactResume(), Throughput(), OutOfMemory(), LastCheckpoint()]
    trainer |= {"callbacks": ours, "enable_progress_bar": True, "log_every_n_steps": 2, "max_steps": 4}
    trainer |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    optimizer = partial(torch.optim.AdamW, fused=True) if name == "pairs" else torch.optim.AdamW
    return fit(model, source, folder, trainer=trainer, optimizer=optimizer, lr=1e-2, **RUNS[name])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_waits_only_where_it_logs(name, waits, tiny_model, tmp_path, monkeypatch, capsys) -> None:
    watch = Watch(partial(setattr, waits, "watches"), monkeypatch)
    watch.on_train_start = lambda _, module: mark(waits.device, *module.parameters(), *module.buffers())
    with waits:
        module = run(name, tiny_model, tmp_path, watch)
    assert not waits.found, "\n".join(f"{count} {what}" for what, count in waits.found.most_common())
    assert waits.seen > 1000
    first, *_, last = lines = [line for line in capsys.readouterr().out.splitlines() if "/4 [" in line]  # of the bar
    assert len(lines) == 4 and "loss" not in first and f", loss={module.logged['train/loss']:.3g}," in last
    assert last.startswith("stage 2/2: 100%") == (name == "pairs, cleaned") and ("kept_fraction=" in last) == (
        "cl" in name
    )
    assert ("preference_loss=" in last and "sft_loss=" in last) == ("pairs" in name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_waits_only_where_it_logs(name, tiny_model, tmp_path, monkeypatch) -> None:
    watch = Watch(lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default"), monkeypatch)
    module = run(name, tiny_model, tmp_path, watch, accelerator="gpu", devices=1)
    assert module.optimizers().optimizer.param_groups[0]["fused"]
    assert module.logged["memory/reserved_gb"] >= module.logged["memory/peak_gb"] > 0


@pytest.mark.parametrize(("terminal", "shows"), [(False, True), (True, True), (False, False)])
def test_the_bar_of_a_continued_run(terminal, shows, monkeypatch, capsys) -> None:
    """The second half of 400 steps of two micro-batches, logged every tenth, in a log, on a terminal, and of rank 1."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    bar, module, data = (
        StepBar(),
        SimpleNamespace(logged={}),
        SimpleNamespace(step_plan=lambda: StepPlan(np.zeros(400))),
    )
    trainer = SimpleNamespace(global_step=200, datamodule=data, is_global_zero=shows)
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    for micro_batch in range(400):
        bar.on_train_batch_start(trainer, module, None, micro_batch)
        trainer.global_step = 200 + (micro_batch + 1) // 2
        bar.on_train_batch_end(trainer, module, None, None, micro_batch)
        if trainer.global_step % 10 == 0:
            module.logged = {"train/loss": float(trainer.global_step)}
    bar.on_train_epoch_end(trainer, module)
    bar.on_train_end(trainer, module)
    out = capsys.readouterr().out
    assert ("| 400/400 [" in out) == ("loss=400]" in out) == shows and ("\r" in out) == terminal
    assert terminal or [line.split("[")[0][-8:-1] for line in out.splitlines()] == [
        f"{step}/400" for step in range(220, 401, 20) if shows
    ]


PLUGINS = [Precision(), DoublePrecision(), HalfPrecision("bf16-true"), MixedPrecision("bf16-mixed", "cpu")]
SCALED = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("plugin", [*PLUGINS, SCALED], ids=lambda plugin: plugin.precision)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", [None, GradClipAlgorithmType.VALUE])
def test_gradients_are_clipped_as_by_lightning(plugin: Any, fused: bool, algorithm: Any) -> None:
    """Of a fused optimizer too, which Lightning refuses under bf16-mixed. Under 16-mixed such gradients are scaled."""
    weights = [[torch.nn.Parameter(torch.ones(n)) for n in (3, 5)] for _ in range(2)]
    for weight in sum(weights, []):
        weight.grad = torch.linspace(-1, 2, len(weight))
    ours, its = (torch.optim.AdamW(each, fused=kind) for each, kind in zip(weights, (fused, False), strict=True))
    how = {"gradient_clip_val": 0.7, "gradient_clip_algorithm": algorithm}
    module = AdapterModule("base")
    module.trainer = SimpleNamespace(precision=plugin.precision, precision_plugin=plugin, **how)
    if fused and plugin is SCALED:
        with pytest.raises(RuntimeError, match="'fused' optimizer"):
            module.configure_gradient_clipping(ours, **how)
        return
    module.configure_gradient_clipping(ours, **how)
    plugin.clip_gradients(its, 0.7, algorithm or "norm")
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one.grad, other.grad) and one.grad[-1] < 2


def test_the_fused_kernel_is_the_default_on_cuda_only() -> None:
    def chosen(kind: Any, device: str, precision: str = "bf16-mixed", **options: Any) -> Any:
        optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1, **options)
        choose_kernels(optimizer, torch.device(device), precision)
        return [optimizer.param_groups[0][name] for name in ("fused", "foreach")]

    adamw, adam, sgd = torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD
    assert chosen(adamw, "cuda") == chosen(adam, "cuda", "32-true") == [True, None]
    assert chosen(adamw, "cpu") == chosen(adamw, "cuda", "16-mixed") == chosen(sgd, "cuda") == [None, None]
    assert chosen(adamw, "cuda", fused=False) == [False, None] and chosen(adamw, "cuda", foreach=True) == [None, True]


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_continues_with_the_kernel_of_its_device(devices, tiny_model, source, tmp_path, monkeypatch) -> None:
    """Only the choice is that of the device: both kernels run on the CPU."""
    checkpoint, options = None, {"optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule_steps": 3}
    for device, steps in zip(devices, (1, 3), strict=True):
        choose = partial(lambda at, optimizer, _, name: choose_kernels(optimizer, torch.device(at), name), device)
        monkeypatch.setattr("lightning_modules.qlora.choose_kernels", choose)
        train = partial(fit, tiny_model, source, trainer={"max_steps": steps}, **options)
        whole, module = train(tmp_path / f"{device}, whole"), train(tmp_path / device, ckpt_path=checkpoint)
        assert module.optimizers().optimizer.param_groups[0]["fused"] == {"cuda": True}.get(device)
        checkpoint = str(tmp_path / device / "checkpoints/last.ckpt")
    torch.testing.assert_close(adapter_weights(module), adapter_weights(whole))
