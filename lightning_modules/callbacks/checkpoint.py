"""The last checkpoint, exact resume, and checkpoint files that appear whole or not at all."""

import io
import random
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mixdpo.errors import Stopped
from mixdpo.storage.files import written_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the checkpoint, and renames the file once its content is on the disk. (Lightning's
    temporary file is in the system's temporary folder, and a rename from another disk is a copy.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)  # not to the file: on a full disk torch's error names no reason
        try:
            with written_whole(path) as partial:
                partial.write_bytes(content.getbuffer())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


class ExactResume(Callback):
    """A resumed run draws the random numbers of a run that never stopped. Validation leaves the random state alone."""

    _restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every process: dropout draws as many numbers as a process has tokens."""
        states: list[Any] = [_random_state()] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(states, states[0])
        checkpoint |= {"random_states": states, "computed_on": _processor(trainer.strategy.root_device)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and "random_states" in checkpoint:
            self._restored = checkpoint["random_states"][trainer.global_rank]
            if (was := checkpoint["computed_on"]) != (now := _processor(trainer.strategy.root_device)):
                text = "which rounds differently: the adapter is not bit-identical to that of an uninterrupted run"
                rank_zero_warn(f"the checkpoint was computed on {was}, and the run continues on {now}, {text}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored is not None:
            _set_random_state(self._restored)
            self._restored = None  # a later fit starts from its own

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._aside = _random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _set_random_state(self._aside)


def _processor(device: torch.device) -> str:
    """Name of a kind of processor that rounds alike: a GPU's model name, or a CPU's instruction set."""
    cpu = f"{device.type} with {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def _random_state() -> dict[str, Any]:
    """Plain types only, so that a checkpoint loads with `weights_only=True`."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state_all()}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():  # else it was saved on another machine
        torch.cuda.set_rng_state_all(state["cuda"])


class LastCheckpoint(Checkpoint):
    def __init__(self, every_n_steps: PositiveInt = 50) -> None:  # type: ignore[valid-type]
        """Keeps the latest state of the run as `checkpoints/last.ckpt`: adapters, optimizer, schedule, RNG, position.

        The file is also written before a validation and after the last step. SIGINT or SIGTERM ends the run with this
        checkpoint, after the step in progress. A second signal ends the run at once.

        Args:
            every_n_steps: Optimizer steps between two checkpoints.
        """
        self.every_n_steps = every_n_steps
        self._signal = 0
        self._validated = False  # since the last batch
        self._stops = False  # Lightning was told to stop in the middle of a step
        self._owed_validation, self._epoch = "no", 0  # whether a validation was to follow the checkpoint, and its epoch

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not a plugin of the user's
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        due = not self._validated and _validates(trainer)
        stops, trainer.should_stop = trainer.should_stop, False
        # a run that stops here validates at its end, and a longer run does not
        checkpoint["owes_validation"] = "no" if not due else "always" if _validates(trainer) else "at the end"
        trainer.should_stop = stops

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._owed_validation, self._epoch = checkpoint.get("owes_validation", "no"), checkpoint["epoch"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals; make up for a validation that was cut off."""
        if not trainer.fit_loop.done:
            _handle_signals(self._stop, self._stop)  # Lightning restores its own when it ends
        owed = self._owed_validation == "always" or (self._owed_validation != "no" and trainer.fit_loop.done)
        if trainer.enable_validation and owed:
            self._make_up(trainer, pl_module)

    def _make_up(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the validation that Lightning counts as done, as Lightning's loops do, in the epoch of the checkpoint."""
        progress, connector = trainer.fit_loop.epoch_progress.current, trainer._logger_connector
        epoch, progress.completed = progress.completed, self._epoch
        first, connector._first_loop_iter = connector._first_loop_iter, None
        trainer.validating, loop = True, trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        loop.run()
        trainer.training, connector._first_loop_iter = True, first
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # ModelCheckpoint and EarlyStopping act there
            for callback in trainer.callbacks:
                if isinstance(callback, ModelCheckpoint | EarlyStopping):
                    callback.on_train_epoch_end(trainer, pl_module)
        progress.completed = epoch

    def on_train_batch_start(self, *_: Any) -> None:
        self._validated = False

    def _stop(self, number: int, frame: Any) -> None:
        self._signal = number
        print(f"{signal.Signals(number).name}: stopping after this step; a second signal stops now", file=sys.stderr)
        _handle_signals()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Act only where an optimizer step is complete: in its middle, the accumulated gradient would be lost."""
        if trainer.fit_loop._should_accumulate():
            return self._hold(trainer)
        # max_steps too, so that a run which ends in mid-epoch is validated: Lightning validates where an epoch ends
        trainer.should_stop |= self._stops or 0 < trainer.max_steps <= trainer.global_step
        ends = trainer.should_stop or (trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)
        # a signal may reach one process only
        stops = trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False)
        if ends or stops or _validates(trainer) or trainer.global_step % self.every_n_steps == 0:
            # weights_only=False: the whole state
            trainer.save_checkpoint(_last_checkpoint(trainer), weights_only=False)
        if ends:
            _handle_signals()  # whatever follows the last step can be done again from the checkpoint
        elif stops:
            raise Stopped(self._signal or signal.SIGTERM)

    def _hold(self, trainer: L.Trainer) -> None:
        """Let the step end before the run stops, where max_time or a callback has told Lightning to stop."""
        self._stops |= trainer.should_stop
        trainer.should_stop = False

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # in the middle of a step there is no checkpoint of the batches before
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
            _handle_signals()

    on_train_epoch_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, Stopped)
        if trainer.is_global_zero and trainer.state.fn == "fit" and (stopped or _last_checkpoint(trainer).exists()):
            whole = "" if stopped else "the last checkpoint is whole; "
            print(f"{whole}continue with:\n  {resume_command(trainer)}", file=sys.stderr)


def _handle_signals(interrupt: Any = signal.default_int_handler, terminate: Any = signal.SIG_DFL) -> None:
    """Set the handlers of SIGINT and SIGTERM; without arguments, those of Python. Only a program's main thread may."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def _validates(trainer: L.Trainer) -> bool:
    """Whether a validation follows the batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _last_checkpoint(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir, "checkpoints", "last.ckpt")


def resume_command(trainer: L.Trainer) -> str:
    """The command that continues from this run's last checkpoint or, without one, from `ckpt_path`, if any."""
    path = _last_checkpoint(trainer) if _last_checkpoint(trainer).exists() else trainer.ckpt_path
    if not (config := Path(trainer.default_root_dir, "config.yaml")).exists():
        return "the same script in another folder" + f", ckpt_path={str(path)!r}, weights_only=True" * bool(path)
    words = ["--config", str(config), *(["--ckpt_path", str(path)] if path else [])]
    return f"{'python run.py' if Path(sys.argv[0]).name == 'run.py' else 'mixdpo fit'} {shlex.join(words)}"
