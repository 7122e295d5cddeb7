"""The best checkpoint of a run: known by its content, copied by the run that continues, loaded at the end."""

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mixdpo.storage.files import sha256, written_whole

_sha256 = cache(lambda path, changed: sha256(path))
"""SHA-256 of a file, computed once for each path and modification time."""


def load_best(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """Give the module the best policy, where a ModelCheckpoint monitors a metric.

    Returns:
        The ModelCheckpoint. None without one, or with a warning if its file cannot be loaded: the last policy stays.
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
        reason = f"cannot be loaded ({type(error).__name__}: {str(error)[:99]})"
        rank_zero_warn(f"the best checkpoint {best.best_model_path} {reason}: adapter/ holds the last policy")
        return None


def describe_best(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Add to each ModelCheckpoint's state, to find its files again: the path from the run's folder, the path on this
    machine, and the SHA-256 (False for the file that the checkpoint is about to be written to)."""
    for state in checkpoint.get("callbacks", {}).values() if trainer.is_global_zero else ():
        for path in {*state.get("best_k_models", ()), state.get("best_model_path", "")} - {""}:
            place, root = Path(path).resolve(), Path(trainer.default_root_dir).resolve()
            content = place.is_file() and _sha256(place, place.stat().st_mtime_ns)
            state.setdefault("files", {})[path] = (os.path.relpath(place, root), str(place), content)


def keep_best(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let ModelCheckpoints continue from their best score, with copies in the continued run's own folder. (Lightning
    forgets both in another folder.) Best-checkpoint files that no longer exist are skipped. Usually a better one
    replaced them after this checkpoint was written, and the continued run makes the better one again."""
    for callback in trainer.checkpoint_callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key, {})
        if "best_k_models" in state:
            copies = _copies(trainer.ckpt_path, callback.dirpath, state) if trainer.is_global_zero else {}
            copies, best = trainer.strategy.broadcast(copies), state["best_model_path"]
            scores = {copies[path]: score for path, score in state["best_k_models"].items() if path in copies}
            state |= {"dirpath": callback.dirpath, "last_model_path": "", "best_k_models": scores}
            state |= {name: copies.get(state[name], "") for name in ("best_model_path", "kth_best_model_path")}
            if callback.monitor and best and best not in copies:
                state["best_model_score"] = None
                lost = f"the best checkpoint so far, {best}, is gone, or another file"
                rank_zero_warn(f"{lost}: put the file back, continue again")


def _copies(ckpt_path: str, dirpath: str, state: dict[str, Any]) -> dict[str, str]:
    """Copy the files of a ModelCheckpoint's state into its new folder: {old path: new path} without lost files."""
    copies, beside = {}, Path(ckpt_path).absolute().parent
    for path, (inside, absolute, content) in state.get("files", {}).items():
        name = os.path.relpath(path, state["dirpath"])
        for place in (beside.parent / inside, beside / name, Path(ckpt_path), Path(absolute)):
            # the continued checkpoint may be this very file, and no file holds its own hash
            itself = place.name == Path(path).name and place.exists() and place.samefile(ckpt_path)
            if itself or (content and place.is_file() and sha256(place) == content):
                copies[path] = str(_copied(place, Path(dirpath, name)))
                break
    return copies


def _copied(place: Path, target: Path) -> Path:
    if target.exists():  # the same file, or one of another run that has the same folder
        return place.resolve()
    with written_whole(target) as partial:
        shutil.copyfile(place, partial)
    return target
