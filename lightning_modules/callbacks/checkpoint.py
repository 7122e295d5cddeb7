"""The last checkpoint, exact resume, and files that appear whole or not at all."""

import io
import os
import random
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mixdpo.errors import InputError, OutOfSpaceError, Stopped
from mixdpo.storage.files import written_whole

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the checkpoint, which takes its place once its content is on the disk. (Lightning
    renames one from the system's temporary folder, which copies where that is another disk.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            OutOfSpaceError: the file cannot be written; says how much is free.
        """
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        content, folder = io.BytesIO(), Path(path).parent
        torch.save(checkpoint, content)  # not to the file: on a full disk torch raises what names no reason
        try:
            with written_whole(path) as partial:
                partial.write_bytes(content.getbuffer())
        except OSError as error:
            said = f"the checkpoint of step {checkpoint.get('global_step')} cannot be written to {folder}"
            free = shutil.disk_usage(folder).free / 1e6
            raise OutOfSpaceError(f"{said}: {os.strerror(error.errno or 0)}; {free:.0f} MB are free") from error


class ExactResume(Callback):
    """A resumed run draws the random numbers that it would have drawn; validation draws none of them."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._aside: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Of every process: they share a seed, but dropout draws as many numbers as a process has tokens."""
        states: list[Any] = [_random_state()]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, states[0])
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._restored = state_dict["ranks"][min(rank, len(state_dict["ranks"]) - 1)]  # validation may use fewer

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["computed_on"] = _processor(trainer.strategy.root_device)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        was, now = checkpoint.get("computed_on"), _processor(trainer.strategy.root_device)
        if trainer.state.fn == "fit" and was not in (None, now):
            rank_zero_warn(
                f"the checkpoint was computed on {was}, but the run continues on {now}, which rounds differently and "
                "draws other dropout masks: the adapter will not be bit-identical to that of an uninterrupted run. If "
                f"it must be, continue on {was}"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored is not None:
            _set_random_state(self._restored)
            self._restored = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._aside = _random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _set_random_state(self._aside)


def _processor(device: torch.device) -> str:
    """Name of a kind of processor that rounds alike: a GPU's model name, or a CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.backends.cpu.get_cpu_capability()}"


def _random_state() -> dict[str, Any]:
    """Plain types only, so that a checkpoint loads with `weights_only=True`."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():  # else it was saved on another machine
        torch.cuda.set_rng_state_all(state["cuda"])


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
        self._owed_validation, self._epoch = "no", 0  # whether a validation was to follow the checkpoint, and its epoch

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
        self._owed_validation, self._epoch = checkpoint.get("owes_validation", "no"), checkpoint["epoch"]

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
        if trainer.enable_validation and (
            self._owed_validation == "always" or (self._owed_validation != "no" and trainer.fit_loop.done)
        ):
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
