"""Between logged steps a run waits for nothing; the bar, the clipping and the kernels that this needs."""

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build_sft, fit, make_pairs, make_samples, write_pairs
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import CleanTokens
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory
from lightning_modules.callbacks.logging import Throughput, logs_step
from lightning_modules.callbacks.progress import StepBar
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.qlora import AdapterModule
from mixdpo.model.optimizer import choose_kernels
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import StepPlan
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import Random
from mixdpo.token_cleaning.selection import Selection

WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")


def mark(side: dict[int, StorageWeakRef], *tensors: Any) -> None:
    """Keep the numbers of the tensors' storages. A weak reference keeps a number from being used again."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    side |= {storage._cdata: StorageWeakRef(storage) for storage in storages if storage._cdata not in side}


class Waits(TorchDispatchMode):
    """Counts, by stack, what would wait for a GPU. On the device are weights, what `to_device` moves, and all that is
    computed from these. A tensor that nothing else went into may be on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.either, self.found, self.watches, self.seen = {}, {}, Counter(), False, 0

    def add(self, what: str) -> None:
        if self.watches:
            frames = [f for f in traceback.extract_stack()[-3::-1] if "/torch/" not in f.filename]
            self.found[f"{what}: {' < '.join(f'{f.filename}:{f.lineno}' for f in frames[:4])}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.device:
            return result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        held = [value.untyped_storage()._cdata for value in given]
        host = [t for t, each in zip(given, held, strict=True) if each not in self.device and each not in self.either]
        if any(each in self.device for each in held):
            self.seen += self.watches
            mark(self.device, *tree_leaves(result))
            if func.overloadpacket.__name__ in WAIT or any(tensor.dim() for tensor in host):
                self.add(str(func))
        elif not host:
            mark(self.either, *tree_leaves(result))
        return result


class Watch(Callback):
    """Calls `switch` where waiting begins to be forbidden, and where it ends to be: between logged steps, and in each
    batch of validation. A stage of cleaning is scored when the stage begins, and may wait."""

    def __init__(self, switch: Callable[[bool], None], patch: pytest.MonkeyPatch) -> None:
        self.switch, score = switch, CleanTokens._score
        patch.setattr(CleanTokens, "_score", lambda *given: (switch(False), score(*given), switch(True)))

        self.on_train_batch_start = self.on_validation_batch_start = lambda *_: switch(True)
        self.on_validation_batch_end = self.on_exception = lambda *_: switch(False)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if logs_step(trainer):
            self.switch(False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        mark(waits.device, moved := tensor.clone())
        return moved

    def read(original: Any, self: torch.Tensor, *arguments: Any) -> Any:
        if self.untyped_storage()._cdata in waits.device:
            waits.add(original.__name__)
        return original(self, *arguments)

    for module in ("batches.rows", "batches.batch", "model.reference_cache"):
        monkeypatch.setattr(f"mixdpo.{module}.to_device", to_device)
    for name in ("tolist", "numpy", "cpu"):  # these are not dispatched
        monkeypatch.setattr(torch.Tensor, name, partialmethod(partial(read, getattr(torch.Tensor, name))))
    return waits


HALF, RANDOM = Routing(hard_fraction=0.5), Cleaning(Random(), Selection(0.6))
RUNS: dict[str, dict[str, Any]] = {
    "pairs": {"data": {"routing": Routing(hard_fraction=0.5, order="interleaved")}},
    "pairs, cleaned": {"data": {"routing": HALF}, "cleaning": Cleaning(selection=Selection(0.6), reference_lr=0.01)},
    "samples, cleaned": {"make": build_sft, "data": {}, "kl_weight": 0.1, "cleaning": RANDOM},
}


def run(name: str, model: str, folder: Path, *first: Any, **trainer: Any) -> Any:
    """Four steps of two micro-batches, of which the second and the fourth are logged, with all of a run's callbacks."""
    source = write_pairs(folder / "rows.jsonl", make_samples(20) if "make" in RUNS[name] else make_pairs(20))
    ours = [StepBar(), *first, NonFinite(), RunFiles(), ExactResume(), Throughput(), OutOfMemory(), LastCheckpoint()]
    trainer |= {"callbacks": ours, "enable_progress_bar": True, "log_every_n_steps": 2, "max_steps": 4}
    trainer |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    optimizer = partial(torch.optim.AdamW, fused=True) if name == "pairs" else torch.optim.AdamW
    options = RUNS[name] | {"data": {"validation": 0.2} | RUNS[name]["data"]}
    return fit(model, source, folder, trainer=trainer, optimizer=optimizer, lr=1e-2, **options)


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
    assert last.startswith("stage 2/2: 100%") == (name == "pairs, cleaned")
    assert [name in last for name in ("sft_loss=", "kept_fraction=")] == ["pairs" in name, "cleaned" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_waits_only_where_it_logs(name, tiny_model, tmp_path, monkeypatch) -> None:
    watch = Watch(lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default"), monkeypatch)
    module = run(name, tiny_model, tmp_path, watch, accelerator="gpu", devices=1)
    assert module.optimizers().optimizer.param_groups[0]["fused"]
    assert module.logged["memory/reserved_gb"] >= module.logged["memory/peak_gb"] > 0


@pytest.mark.parametrize(("terminal", "rank"), [(False, 0), (True, 0), (False, 1)])
def test_the_bar_of_a_continued_run(terminal: bool, rank: int, monkeypatch: Any, capsys: Any) -> None:
    """The second half of 400 steps of two micro-batches, every tenth logged."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    bar, module, trainer = StepBar(), SimpleNamespace(logged={}), SimpleNamespace(is_global_zero=not rank)
    trainer.datamodule = SimpleNamespace(step_plan=lambda: StepPlan(np.zeros(400)))
    bar.setup(trainer, module, "fit")
    trainer.global_step = 200
    bar.on_train_start(trainer, module)
    for step in range(400, 800):
        trainer.global_step, module.logged = step // 2, {"train/loss": step // 20 * 10.0}
        bar.on_train_batch_start(trainer, module)
        bar.on_train_batch_end(trainer, module)
    trainer.global_step = 400
    bar.on_train_epoch_end(trainer, module)
    bar.on_train_end(trainer, module)
    out = capsys.readouterr().out
    assert ("| 400/400 [" in out) == ("loss=390]" in out) == (rank == 0) and ("\r" in out) == terminal
    assert out.count("\n") == (1 if terminal else 10 - 10 * rank)


SCALED = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("plugin", [Precision(), DoublePrecision(), MixedPrecision("bf16-mixed", "cpu"), SCALED])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", [None, "value"])
def test_gradients_are_clipped_as_by_lightning(plugin: Any, fused: bool, algorithm: str | None) -> None:
    """Of a fused optimizer too, which Lightning refuses under bf16-mixed. Under 16-mixed such gradients are scaled."""
    weights = [[torch.nn.Parameter(torch.ones(n)) for n in (3, 5)] for _ in range(2)]
    for weight in (*weights[0], *weights[1]):
        weight.grad = torch.linspace(-1, 2, len(weight))
    how, module = {"gradient_clip_val": 0.7, "gradient_clip_algorithm": algorithm}, AdapterModule("base")
    module.trainer = SimpleNamespace(precision=plugin.precision, precision_plugin=plugin, **how)
    with pytest.raises(RuntimeError, match="'fused'") if fused and plugin is SCALED else nullcontext():
        module.configure_gradient_clipping(torch.optim.AdamW(weights[0], fused=fused), **how)
        plugin.clip_gradients(torch.optim.AdamW(weights[1]), 0.7, algorithm or "norm")
        assert all(torch.equal(one.grad, other.grad) and one.grad[-1] < 2 for one, other in zip(*weights, strict=True))


def test_the_fused_kernel_is_the_default_on_cuda_only() -> None:
    cases = [("cuda", "bf16-mixed", {}, True), ("cpu", "32-true", {}, None), ("cuda", "16-mixed", {}, None)]
    cases += [("cuda", "32-true", {"fused": False}, False), ("cuda", "32-true", {"foreach": True}, None)]
    for device, precision, options, fused in cases:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **options)
        choose_kernels(optimizer, torch.device(device), precision)
        assert optimizer.param_groups[0]["fused"] is fused


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_continues_on_another_device(devices, tiny_model, source, tmp_path, monkeypatch) -> None:
    """Only the choice of the kernel is that of the device: both kernels run on the CPU."""
    checkpoint, options = None, {"optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule_steps": 3}
    for device, steps in zip(devices, (1, 3), strict=True):
        choose = partial(lambda at, optimizer, _, name: choose_kernels(optimizer, torch.device(at), name), device)
        monkeypatch.setattr("lightning_modules.qlora.choose_kernels", choose)
        train = partial(fit, tiny_model, source, trainer={"max_steps": steps}, **options)
        whole, module = train(tmp_path / f"{device}, whole"), train(tmp_path / device, ckpt_path=checkpoint)
        checkpoint = str(tmp_path / device / "checkpoints/last.ckpt")
    torch.testing.assert_close(adapter_weights(module), adapter_weights(whole))
