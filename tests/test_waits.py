"""Between logged steps a run waits for nothing; the bar, clipping and kernels that this needs."""

import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import adapter_weights, build, build_sft, fit, make_pairs, make_samples, make_trainer, write_pairs
from lightning.pytorch.callbacks import Callback
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import CleanTokens
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory
from lightning_modules.callbacks.logging import Throughput, logs_step
from lightning_modules.callbacks.progress import StepBar
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.optimizer import choose_kernels, describe
from mixdpo.routing.route import Routing
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.selection import Selection

WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")


class Waits(TorchDispatchMode):
    """Counts, by stack, what would wait for a GPU. On the device are weights, what `to_device` moves, and all that is
    computed from these. A tensor that nothing else went into may be on either side."""

    def __init__(self) -> None:
        super().__init__()
        # a weak reference keeps the number of a storage from being used again
        self.device: dict[int, StorageWeakRef] = {}
        self.either: dict[int, StorageWeakRef] = {}
        self.found: Counter[str] = Counter()
        self.watches, self.seen = False, 0

    def on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.device

    def add(self, what: str) -> None:
        if self.watches:
            stack = [f"{f.filename.split('site-packages/')[-1]}:{f.lineno}" for f in traceback.extract_stack()[:-2]]
            ours = [line for line in stack if "_modules/" in line or "mixdpo/" in line]
            self.found[f"{what}: {' < '.join([*stack[:-4:-1], *ours[:-3:-1]])}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.device:
            return result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        held = [value.untyped_storage()._cdata for value in given]
        side, name = (
            self.device if any(each in self.device for each in held) else self.either,
            func.overloadpacket.__name__,
        )
        other = [
            each for each, t in zip(held, given, strict=True) if each not in self.device and each not in self.either
        ]
        if side is self.device:
            self.seen += self.watches
            if name in WAIT or any(t.dim() for t in given if t.untyped_storage()._cdata in other):
                self.add(name)
        if side is self.device or not other:
            mark(side, *tree_leaves(result))
        return result


def mark(side: dict[int, StorageWeakRef], *tensors: Any) -> None:
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in side:
            side[storage._cdata] = StorageWeakRef(storage)


class Watch(Callback):
    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        mark(self.waits.device, *pl_module.parameters(), *pl_module.buffers())

    def on_train_batch_start(self, *_: Any) -> None:
        self.waits.watches = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.waits.watches &= not logs_step(trainer)

    on_validation_batch_start = on_train_batch_start

    def on_validation_batch_end(self, *_: Any) -> None:
        self.waits.watches = False


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        mark(waits.device, moved := tensor.clone())
        return moved

    def reads(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if waits.on_device(self):
                waits.add(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, read)

    for module in ("batches.rows", "batches.batch", "model.reference_cache"):
        monkeypatch.setattr(f"mixdpo.{module}.to_device", to_device)
    for name in ("tolist", "numpy", "cpu"):
        reads(name)
    score = CleanTokens._score

    def scores(*arguments: Any) -> None:  # once a stage, and may wait
        waits.watches = False
        score(*arguments)
        waits.watches = True

    monkeypatch.setattr(CleanTokens, "_score", scores)
    return waits


CLEANING = Cleaning(selection=Selection(0.6), reference_lr=0.01)
RUNS: dict[str, dict[str, Any]] = {
    "pairs": {"data": {"routing": Routing(hard_fraction=0.5, order="interleaved"), "validation": 0.2}},
    "pairs, cleaned": {"data": {"routing": Routing(hard_fraction=0.5), "validation": 0.2}, "cleaning": CLEANING},
    "samples": {"make": build_sft, "data": {"validation": 0.2}},
}


def watched(name: str, model: str, folder: Path, *first: Any, **trainer: Any) -> None:
    options = dict(RUNS[name])
    rows = make_samples(20) if "make" in options else make_pairs(20)
    source = write_pairs(folder / "rows.jsonl", rows)
    callbacks = [
        StepBar(),
        *first,
        NonFinite(),
        RunFiles(),
        ExactResume(),
        Throughput(),
        OutOfMemory(),
        LastCheckpoint(),
    ]
    trainer |= {"callbacks": callbacks, "enable_progress_bar": True, "log_every_n_steps": 2}
    trainer |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_steps": 4}
    fit(model, source, folder, trainer=trainer, optimizer=torch.optim.AdamW, lr=1e-2, **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_waits_only_where_it_logs(name: str, waits: Waits, tiny_model: str, tmp_path: Path) -> None:
    with waits:
        watched(name, tiny_model, tmp_path, Watch(waits))
    assert not waits.found, "\n".join(f"{count} {what}" for what, count in waits.found.most_common())
    assert waits.seen > 1000
