"""What happens around the steps: files of the run, exact resume, throughput. All are on by default in run.py, and so
are those of `faults`."""

import io
import os
import random
import resource
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, LambdaCallback, LearningRateMonitor
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mixdpo.errors import InputError, OutOfSpaceError, nearest
from mixdpo.export import save_adapter
from mixdpo.files import sha256, write_json, written_whole
from mixdpo.throughput import floor_flops, linear_sizes, matrix_rate

_sha256 = cache(lambda path, changed: sha256(path))
"""SHA-256 of a file, computed once for each path and modification time."""


def logs_step(trainer: L.Trainer) -> bool:
    """Whether the batch that has just been trained ends an optimizer step whose row is logged; none is with 0."""
    every = trainer.log_every_n_steps
    return every > 0 and not trainer.fit_loop._should_accumulate() and trainer.global_step % every == 0


class LogRows(Callback):
    """Lets the module log the row of a step after what callbacks add to it, and before the step is in a checkpoint."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if logs_step(trainer):
            pl_module.log_row()


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


def load_best(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """Give the module its best policy, where a ModelCheckpoint monitors a metric.

    Returns:
        That callback; None without one, or where its file cannot be loaded: then the last policy stays, with a warning.
    """
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_path", "") and c.monitor), None)
    try:
        if best is not None:
            checkpoint = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
            state = checkpoint.get("callbacks", {}).get(best.state_key, {})  # none where only weights are saved
            # the file's own score: another one may have been the best when it was written
            if (score := state.get("current_score", best.best_model_score)) != best.best_model_score:
                raise ValueError(f"its score is {score:.4f}, not {best.best_model_score:.4f}: it is of another run")
            pl_module.model.stacked = checkpoint["adapters"]["stacked"]
            pl_module.load_state_dict(checkpoint["state_dict"], strict=False)
        return best
    except Exception as error:  # of pickle, zipfile and torch: an open list
        said = (
            f"the best checkpoint {best.best_model_path} cannot be loaded ({type(error).__name__}: {str(error)[:99]})"
        )
        rank_zero_warn(
            f"{said}: adapter/ holds the last policy. To get the best policy, continue from a checkpoint that is older "
            "than the damaged file, or train again"
        )
        return None


def describe_best(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Add to a ModelCheckpoint's state the path of each of its files from the run's folder, the path on this machine,
    and the SHA-256 (False for the file that the checkpoint is about to be written to)."""
    for state in checkpoint.get("callbacks", {}).values() if trainer.is_global_zero else ():
        for path in {*state.get("best_k_models", ()), state.get("best_model_path", "")} - {""}:
            place, root = Path(path).resolve(), Path(trainer.default_root_dir).resolve()
            content = place.is_file() and _sha256(place, place.stat().st_mtime_ns)
            state.setdefault("files", {})[path] = (os.path.relpath(place, root), str(place), content)


def keep_best(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let ModelCheckpoints go on from their best score, with files in the continued run's own folder. (Lightning
    forgets both in another folder.) Best-checkpoint files that no longer exist are skipped. Usually a better one
    replaced them after this checkpoint was written, and the continued run makes the better one again."""
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key, {})
        if "best_k_models" in state:
            own = _own_files(trainer.ckpt_path, callback.dirpath, state) if trainer.is_global_zero else {}
            own, best = trainer.strategy.broadcast(own), state["best_model_path"]
            state |= {"dirpath": callback.dirpath, "last_model_path": "", "best_model_path": own.get(best, "")}
            state["kth_best_model_path"] = own.get(state["kth_best_model_path"], "")
            state["best_k_models"] = {own[path]: score for path, score in state["best_k_models"].items() if path in own}
            if callback.monitor and best and best not in own:
                state["best_model_score"] = None
                said = f"the best checkpoint so far, {best}, is not there any more, or is another file now"
                rank_zero_warn(
                    f"{said}: only checkpoints of the continued run count as best. Nothing is lost if the first run "
                    "had replaced the file by a better one. Otherwise put the file back, and continue again"
                )


def _own_files(ckpt_path: str, dirpath: str, state: dict[str, Any]) -> dict[str, str]:
    """Copy the files of a ModelCheckpoint's state into its new folder. Old path -> new path, without what is gone."""
    own, beside = {}, Path(ckpt_path).absolute().parent
    for path, (inside, absolute, content) in state.get("files", {}).items():
        name = os.path.relpath(path, state["dirpath"])
        for place in (beside.parent / inside, beside / name, Path(ckpt_path), Path(absolute)):
            # the checkpoint that is continued may be the file itself: its own hash is not in it
            itself = place.name == Path(path).name and place.exists() and place.samefile(ckpt_path)
            if itself or (content and place.is_file() and sha256(place) == content):
                own[path] = str(_copied(place, Path(dirpath, name)))
                break
    return own


def _copied(place: Path, target: Path) -> Path:
    if target.exists():  # the same file, or one of another run that has the same folder
        return place.resolve()
    with written_whole(target) as partial:
        shutil.copyfile(place, partial)
    return target


class CloseFiles(Callback):
    """Lets the module close what it writes to where Lightning ends without a teardown, after an error or interrupt."""

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.close_files()


class RunConfig(SaveConfigCallback):
    """config.yaml lies in the run's folder, whatever loggers there are."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class RunFiles(Callback):
    """The plan of the data (route.json or stages.json) before training, the policy as a PEFT folder `adapter/` after
    it: the last one, or the best one where a ModelCheckpoint monitors a metric."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        facts = pl_module.plan_facts()
        if trainer.is_global_zero:
            data = trainer.datamodule
            write_json(Path(trainer.default_root_dir) / data.summary_file, data.summary() | facts)
            trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            print(f"policy: {trainable / 1e6:.2f}M trainable parameters; run folder: {trainer.default_root_dir}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if best := load_best(trainer, pl_module):
            print(f"adapter/ holds the best {best.monitor}, {float(best.best_model_score):.4f}: {best.best_model_path}")
        if trainer.is_global_zero:
            save_adapter(pl_module.model, Path(trainer.default_root_dir) / "adapter")


class ValidateAtMaxSteps(Callback):
    """A run that `max_steps` ends in mid-epoch is validated as well, not only one that ends with its epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if 0 < trainer.max_steps <= trainer.global_step and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = True


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
