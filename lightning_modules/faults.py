"""Callbacks for what goes wrong in a run: signals, numbers that are not finite, memory and disk that run out."""

import math
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lightning_modules.callbacks import WholeCheckpointIO, logs_step, peak_memory_gb
from mixdpo.errors import InputError, NonFiniteError, OutOfSpaceError, Stopped
from mixdpo.files import write_json

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LastCheckpoint(Checkpoint):
    def __init__(self, every_n_steps: int = 50) -> None:
        """Keeps the latest state of the run as `checkpoints/last.ckpt`: adapters, optimizer, schedule, RNG, position.

        Written as well before a validation, after the last step, and where SIGINT or SIGTERM ends the run: after the
        step in progress; a second signal ends it at once.

        Args:
            every_n_steps: Optimizer steps between two checkpoints.
        """
        if every_n_steps < 1:
            raise InputError(f"checkpoint.every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._signal = 0
        self._validated = False  # since the last batch
        self._stops = False  # something has told Lightning to stop in the middle of a step
        self._owes, self._epoch = "no", 0  # whether a validation was to follow the checkpoint, and its epoch

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not where the user has named another
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        due = not self._validated and _validates(trainer)
        stops, trainer.should_stop = trainer.should_stop, False
        # that of a run that stops here is none of one that goes on
        checkpoint["owes_validation"] = "no" if not due else "always" if _validates(trainer) else "at the end"
        trainer.should_stop = stops

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._owes, self._epoch = checkpoint.get("owes_validation", "no"), checkpoint["epoch"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a disk that the run would fill; listen to signals; make up for a validation that was cut off."""
        learning = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        adapters = sum(p.numel() * p.element_size() for n, p in pl_module.named_parameters() if "lora_" in n)
        # the old and the new checkpoint (adapters, two moments) and adapter/
        need, folder = 2 * (adapters + 2 * learning) + learning, Path(trainer.default_root_dir)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise OutOfSpaceError(
                f"{folder} has {free / 1e6:.0f} MB free, and checkpoints and adapter of this run take {need / 1e6:.0f} "
                "MB: free some, or give another folder with --runs"
            )
        if threading.current_thread() is threading.main_thread() and not trainer.fit_loop.done:
            for each in SIGNALS:  # Lightning restores its own when it ends
                signal.signal(each, self._stop)
        if trainer.enable_validation and (self._owes == "always" or (self._owes != "no" and trainer.fit_loop.done)):
            self._make_up(trainer, pl_module)

    def _make_up(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The validation that Lightning takes for done, as its loops do it, so that callbacks see one of that epoch."""
        progress, connector = trainer.fit_loop.epoch_progress.current, trainer._logger_connector
        epoch, progress.completed = progress.completed, self._epoch
        first, connector._first_loop_iter = connector._first_loop_iter, None
        trainer.validating, loop = True, trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        loop.run()
        trainer.training, connector._first_loop_iter = True, first
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # many look at the score there only
            for callback in trainer.callbacks:
                if isinstance(callback, ModelCheckpoint | EarlyStopping):
                    callback.on_train_epoch_end(trainer, pl_module)
        progress.completed = epoch

    def on_train_batch_start(self, *_: Any) -> None:
        self._validated = False

    def _stop(self, number: int, frame: Any) -> None:
        self._signal = number
        print(f"{signal.Signals(number).name}: stopping after this step; once more to stop at once", file=sys.stderr)
        _default_handlers()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Only where an optimizer step is complete: in the middle of one, its accumulated gradient would be lost."""
        if trainer.fit_loop._should_accumulate():
            return self._hold(trainer)
        trainer.should_stop |= self._stops
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        ends = trainer.global_step == trainer.max_steps or (trainer.is_last_batch and last_epoch) or trainer.should_stop
        stops = bool(self._signal)
        if trainer.world_size > 1:  # a signal may reach one process only
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if ends or stops or _validates(trainer) or trainer.global_step % self.every_n_steps == 0:
            # weights_only=False: the whole state
            trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", "last.ckpt"), weights_only=False)
        if ends:
            _default_handlers()  # what follows the last step can be done again from its checkpoint
        elif stops:
            raise Stopped(self._signal or signal.SIGTERM)

    def _hold(self, trainer: L.Trainer) -> None:
        """Let the step end first, as by a signal: such as that max_time is over."""
        self._stops |= trainer.should_stop
        trainer.should_stop = False

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # in the middle of a step there is no checkpoint of what came before it
        if self._signal and trainer.world_size == 1 and not trainer.fit_loop._should_accumulate():
            raise Stopped(self._signal)

    def on_validation_epoch_end(self, *_: Any) -> None:
        self._validated = True

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            return
        if trainer.fit_loop._should_accumulate():
            self._hold(trainer)
        if trainer.should_stop and trainer.fit_loop._can_stop_early:  # early stopping, after the last step
            _default_handlers()

    on_train_epoch_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        own = Path(trainer.default_root_dir, "checkpoints", "last.ckpt").exists() or isinstance(exception, Stopped)
        if trainer.is_global_zero and trainer.state.fn == "fit" and own:
            step = "" if isinstance(exception, Stopped) else "the last checkpoint is whole; "
            print(f"{step}continue with:\n  {resume_command(trainer)}", file=sys.stderr)


def _default_handlers() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _validates(trainer: L.Trainer) -> bool:
    """Whether a validation follows the batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def last_checkpoint(trainer: L.Trainer) -> str | None:
    """Of this run, or before it has one the one that it continues."""
    path = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
    return str(path) if path.exists() else trainer.ckpt_path


def resume_command(trainer: L.Trainer) -> str:
    words = ["--config", str(Path(trainer.default_root_dir, "config.yaml"))]
    if (path := last_checkpoint(trainer)) is not None:
        words += ["--ckpt_path", path]
    return f"python run.py {shlex.join(words)}"


class NonFinite(Callback):
    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        """Ends a run whose loss or gradient is not finite, and writes RUN/non_finite.json: the step, its rows with
        their texts and losses, and the command that comes to the same step again.

        Args:
            action: stop: looked for where steps are logged and before every checkpoint, so that nothing waits for the
                device in between. skip: leave such a step out; that takes a look, and waits, in every step.
        """
        self.action = action
        self.skipped = 0
        self._ids: Any = None
        self._losses: list[tuple[Any, Tensor]] = []  # ids and losses of the micro-batches since the last step
        self._steps: list[tuple[int, Tensor, list[tuple[Any, Tensor]]]] = []  # not looked at yet

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._ids = batch.ids[: batch.count]

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._losses.append((self._ids, pl_module.row_losses[: len(self._ids)]))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if trainer.precision == "16-mixed":  # its scaler tries too large factors and steps over what overflows
            norm = torch.zeros_like(norm)
        self._steps.append((trainer.global_step, norm, self._losses))
        self._losses = []
        if self.action == "skip" and (found := self._found(trainer)) is not None:
            optimizer.zero_grad(set_to_none=True)  # zeros would move Adam, which remembers earlier gradients
            self.skipped += 1
            pl_module.callback_values["skipped_steps"] = self.skipped
            self._report(trainer, *found)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if logs_step(trainer):
            self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)  # what is not finite never gets into one

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _look(self, trainer: L.Trainer) -> None:
        if (found := self._found(trainer)) is not None:
            raise NonFiniteError(self._report(trainer, *found))

    def _found(self, trainer: L.Trainer) -> tuple[int, float, list[tuple[Any, Tensor]]] | None:
        """The first step with a number that is not finite: number, gradient norm, ids and losses of its rows."""
        steps, self._steps = self._steps, []
        if not steps:
            return None
        values = [
            torch.stack([norm.float(), *(losses.sum().float() for _, losses in each)]).sum() for _, norm, each in steps
        ]
        bad = [not math.isfinite(value) for value in torch.stack(values).tolist()]
        if trainer.world_size > 1:  # one rank's losses may be finite, and all must stop or skip
            bad = [trainer.strategy.reduce_boolean_decision(each, all=False) for each in bad]
        first = next((step for step, is_bad in zip(steps, bad, strict=True) if is_bad), None)
        return None if first is None else (first[0], float(first[1]), first[2])

    def _report(self, trainer: L.Trainer, step: int, norm: float, losses: list[tuple[Any, Tensor]]) -> str:
        data, rows = trainer.datamodule, []
        for ids, values in losses:
            found = zip(data.rows_of(ids.tolist()), values.tolist(), strict=True)
            rows += [row | {"loss": loss} for row, loss in found]
        bad = [row for row in rows if not math.isfinite(row["loss"])]
        for row in bad:
            row["loss"] = str(row["loss"])  # JSON has no NaN
        path = Path(trainer.default_root_dir) / "non_finite.json"
        again = f"{resume_command(trainer)} --trainer.log_every_n_steps 1"
        content = {"step": step, "gradient_norm": str(norm), "again": again, "source": data.source, "rows": rows}
        if trainer.is_global_zero:
            write_json(path, content)
        which = f"of row {', '.join(str(row['row']) for row in bad[:5])} of {data.source}" if bad else "gradient"
        said = (
            f"step {step} has a {'loss' if bad else ''} {which} that is not finite (gradient norm {norm:.3g}; "
            f"{len(bad)} of its {len(rows)} rows)"
        )
        if self.action == "skip":
            print(f"warning: {said}: left out; {path}", file=sys.stderr)
        return (
            f"{said}: rows, texts and losses are in {path}. Look at these rows, lower the learning rate, set "
            f"trainer.gradient_clip_val or a wider model.dtype, or leave such steps out (--non_finite.action skip). To "
            f"see it again: {again}"
        )


class OutOfMemory(Callback):
    """Says with numbers what to change where the memory was not enough."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self._batch = batch.count, batch.rows.tokens, batch.unit

    on_validation_batch_start = on_train_batch_start

    def on_train_epoch_end(self, *_: Any) -> None:
        self.__dict__.pop("_batch", None)  # what follows is no micro-batch

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not is_out_of_memory(exception) or not hasattr(self, "_batch"):
            return
        rows, tokens, unit = self._batch
        data, now = trainer.datamodule, trainer.accumulate_grad_batches
        most = data.batch_size // trainer.world_size
        advice = []
        if trainer.validating or trainer.sanity_checking:
            advice.append(f"data.eval_batch_size 1 (now {data.eval_batch_size})")
        elif now < most:
            advice.append(f"trainer.accumulate_grad_batches {min(2 * now, most)} (now {now}, at most {most})")
        if pl_module.activation_checkpointing is not True:
            advice.append(f"model.activation_checkpointing true (now {pl_module.activation_checkpointing})")
        longest = data.encoding["max_length"]
        advice.append(f"data.max_length {longest // 2} (now {longest})")
        advice.append("model.optimizer bitsandbytes.optim.PagedAdamW8bit")
        exception.add_note(
            f"out of memory: a micro-batch of {rows} {unit} with {tokens} tokens took more than the "
            f"{peak_memory_gb(pl_module.device):.1f} GB reached. What to change, the first alone may do: "
            f"{'; '.join(advice)}"
        )


OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of running out of memory: of the CPU, the driver (`torch.AcceleratorError`), cuBLAS (`RuntimeError`)."""


def is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in OUT_OF_MEMORY)
