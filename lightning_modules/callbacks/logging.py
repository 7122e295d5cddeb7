"""The rows of metrics.csv: when a step is logged, its throughput and memory, and what can be monitored."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, LearningRateMonitor

from mixdpo.errors import InputError, nearest
from mixdpo.model.memory import floor_flops, linear_sizes, matrix_rate


def logs_step(trainer: L.Trainer) -> bool:
    """Whether the batch that has just been trained ends an optimizer step whose row is logged; none is with 0."""
    every = trainer.log_every_n_steps
    return every > 0 and not trainer.fit_loop._should_accumulate() and trainer.global_step % every == 0


class LogRows(Callback):
    """Lets the module log the row of a step after what callbacks add to it, and before the step is in a checkpoint."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if logs_step(trainer):
            pl_module.log_row()


def refuse_missing_metrics(trainer: L.Trainer, names: set[str]) -> None:
    """Refuse, before training, a `monitor` that no metric of the run has. Skipped if a class of the user may log more.

    Args:
        names: the metrics that the run will have.

    Raises:
        InputError: an EarlyStopping or ModelCheckpoint monitors another one.
    """
    parts = (*trainer.callbacks, trainer.lightning_module, trainer.datamodule)
    silent = [not isinstance(part, LambdaCallback | LearningRateMonitor) for part in parts]
    ours = [type(part).__module__.startswith(("lightning.", "lightning_modules.", "datamodules.")) for part in parts]
    for each in trainer.callbacks if all(silent) and all(ours) and not trainer.fast_dev_run else ():
        # `strict` is of EarlyStopping, `save_top_k` of ModelCheckpoint
        metric, needs = getattr(each, "monitor", None), getattr(each, "strict", getattr(each, "save_top_k", False))
        if needs and metric not in {None, *names, *(("step", "epoch") if hasattr(each, "save_top_k") else ())}:
            said = f"callbacks cannot monitor {metric!r} in this run{nearest(metric, names) or '.'}"
            shown = ", ".join([*sorted(names)[:14], *(["…"] if len(names) > 14 else [])]) or "none"
            raise InputError(f"{type(each).__name__}.monitor: {said} Give a metric that the run has: it has {shown}")


class ValidateAtMaxSteps(Callback):
    """A run that `max_steps` ends in mid-epoch is validated as well, not only one that ends with its epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if 0 < trainer.max_steps <= trainer.global_step and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = True


class Throughput(Callback):
    """Logs tokens_per_second (of the policy, padding not counted), pairs_ or samples_per_second, memory/peak_gb, and
    floor_share: the time that the step's necessary operations take at the matrix rate, over the time it took."""

    def __init__(self) -> None:
        self.tokens, self.rows, self.flops, self.seconds = 0, 0, 0.0, 0.0
        self._total_rows, self._total_seconds, self._started = 0, 0.0, 0.0
        self._sizes, self._rate = (0, 0), 1.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        base = pl_module.model.get_base_model()
        dtype = torch.bfloat16 if trainer.precision.startswith("bf16") else base.get_output_embeddings().weight.dtype
        self._sizes = linear_sizes(base)
        self._rate = matrix_rate(base.get_output_embeddings().weight.shape[1], pl_module.device, dtype)

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = self._started or time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        now = time.perf_counter()
        self.tokens += batch.rows.tokens
        self.rows += batch.count
        self.flops += floor_flops(self._sizes, batch.rows)
        self.seconds += now - self._started
        self._started = now
        if not logs_step(trainer):
            return
        self._total_rows += self.rows
        self._total_seconds += self.seconds
        rates = {
            "tokens_per_second": self.tokens / self.seconds,
            f"{batch.unit}_per_second": self.rows / self.seconds,
            "floor_share": self.flops / self._rate / self.seconds,
        }
        pl_module.callback_values.update(rates | {"memory/peak_gb": peak_memory_gb(pl_module.device)})
        self.tokens, self.rows, self.flops, self.seconds = 0, 0, 0.0, 0.0

    @property
    def mean_rows_per_second(self) -> float:
        """Over the whole run up to the last logged step."""
        return self._total_rows / self._total_seconds if self._total_seconds else float("nan")


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far in GB (1e9 bytes): allocated on a CUDA device, or else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
