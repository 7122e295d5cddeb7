"""The rows of metrics.csv: which steps are logged, their throughput and memory, and what callbacks can monitor."""

import resource
import sys
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, LearningRateMonitor

from mixdpo.errors import InputError, nearest
from mixdpo.model.memory import floor_flops, linear_sizes, matrix_rate


def logs_step(trainer: L.Trainer) -> bool:
    """Whether the batch just trained ends an optimizer step whose row is logged. `log_every_n_steps: 0` logs none."""
    every = trainer.log_every_n_steps
    return every > 0 and not trainer.fit_loop._should_accumulate() and trainer.global_step % every == 0


class LogRows(Callback):
    """Lets the module log the row of a step: after callbacks have added to the row, before the step is saved."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if logs_step(trainer):
            pl_module.log_row()


def refuse_missing_metrics(trainer: L.Trainer, names: set[str]) -> None:
    """Refuse, before training, a `monitor` that names no metric of the run.

    Skipped if a class of the user's own may log further metrics.

    Args:
        names: the metrics that the run will have.

    Raises:
        InputError: an EarlyStopping or ModelCheckpoint monitors another metric.
    """
    for part in (*trainer.callbacks, trainer.lightning_module, trainer.datamodule):
        ours = type(part).__module__.startswith(("lightning.", "lightning_modules.", "datamodules."))
        if not ours or isinstance(part, LambdaCallback | LearningRateMonitor) or trainer.fast_dev_run:
            return
    for each in trainer.callbacks:
        # `strict` is of EarlyStopping, `save_top_k` of ModelCheckpoint
        metric, needs = getattr(each, "monitor", None), getattr(each, "strict", getattr(each, "save_top_k", False))
        if needs and metric not in {None, *names, *(("step", "epoch") if hasattr(each, "save_top_k") else ())}:
            wrong = f"{type(each).__name__}.monitor: callbacks cannot monitor {metric!r} in this run"
            known = f"Give a metric of this run: {', '.join(sorted(names)) or 'none'}"
            raise InputError(f"{wrong}{nearest(metric, names) or '.'} {known}")


class Throughput(Callback):
    """Logs tokens_per_second (of the policy, without padding), pairs_ or samples_per_second, memory/peak_gb, on CUDA
    memory/reserved_gb, and floor_share: the time of the step's necessary operations at the rate of a matrix product,
    over the step's time."""

    def __init__(self) -> None:
        # tokens, rows, operations, seconds: since the last row, all
        self._sums, self._totals = np.zeros(4), np.zeros(4)
        self._started, self.mean_rows_per_second = 0.0, float("nan")  # mean over the run up to the last logged step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        base = pl_module.model.get_base_model()
        dtype = torch.bfloat16 if trainer.precision.startswith("bf16") else base.get_output_embeddings().weight.dtype
        self._sizes = linear_sizes(base)
        self._rate = matrix_rate(base.get_output_embeddings().weight.shape[1], pl_module.device, dtype)

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = self._started or time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        now = time.perf_counter()
        self._sums += (batch.rows.tokens, batch.count, floor_flops(self._sizes, batch.rows), now - self._started)
        self._started = now
        if not logs_step(trainer):
            return
        self._totals += self._sums
        self.mean_rows_per_second = self._totals[1] / self._totals[3]
        tokens, rows, flops, seconds = self._sums.tolist()
        rates = {"tokens_per_second": tokens / seconds, f"{batch.unit}_per_second": rows / seconds}
        rates |= {"floor_share": flops / self._rate / seconds, "memory/peak_gb": peak_memory_gb(pl_module.device)}
        if pl_module.device.type == "cuda":
            rates["memory/reserved_gb"] = torch.cuda.max_memory_reserved(pl_module.device) / 1e9
        pl_module.callback_values.update(rates)
        self._sums = np.zeros(4)


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in GB (1e9 bytes): allocated on a CUDA device, or else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
