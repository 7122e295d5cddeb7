"""Scores, weights and stages of one run over its token pool: in memory, in checkpoints, and in the run's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixdpo.errors import InputError
from mixdpo.files import write_json, written_whole
from mixdpo.samples import TokenPool

ARRAYS = ("scores", "weights", "decided")


class RunTokens:
    """What a run decided about each of the M response tokens of its pool, by the options `cleaning`.

    Attributes:
        scores, weights: (M,) float32, NaN where a token has not been scored, or not been reached by training.
        decided: (N,) int16, the number in `stages` of the entry that decided a sample's tokens last; -1 none yet.
        stages: one summary per stage so far, in JSON's types.
    """

    def __init__(self, pool: TokenPool, identity: Mapping[str, str], cleaning: str) -> None:
        self.pool, self.identity, self.cleaning = pool, dict(identity), cleaning
        self.scores, self.weights = np.full((2, len(pool)), np.nan, dtype=np.float32)
        self.decided = np.full(len(pool.offsets) - 1, -1, dtype=np.int16)
        self.stages: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain types."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in ARRAYS}
        return {
            **arrays,
            "identity": {**self.identity, "cleaning": self.cleaning},
            "stages": json.loads(json.dumps(self.stages)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            InputError: the state is of other data, another tokenizer, template or model; says which.
        """
        refuse_changed(state["identity"], {**self.identity, "cleaning": self.cleaning}, "the checkpoint")
        for name in ARRAYS:
            setattr(self, name, state[name].numpy().copy())
        self.stages = list(state["stages"])

    def write_samples(self, folder: Path) -> None:
        """The pool's samples as a data set, so that report and export need nothing else; whole or not at all."""
        with written_whole(folder / "samples") as partial:
            self.pool.samples.save_to_disk(str(partial), num_shards=1)

    def write(self, folder: Path, tokenizer: str) -> None:
        """scores.npy, weights.npy, decided.npy and stages.json, each whole or not at all."""
        for name in ARRAYS:
            with written_whole(folder / f"{name}.npy") as partial:
                np.save(partial, getattr(self, name))
        content = {"identity": self.identity, "tokenizer": tokenizer, "stages": self.stages}
        write_json(folder / "stages.json", content)


def read_masks(folder: Path, identity: Mapping[str, str]) -> np.ndarray:
    """(M,) weights of an earlier run's folder `cleaning`, NaN where it never came.

    Raises:
        InputError: nothing is there, or it was made for other data, another tokenizer, template or model; says which.
    """
    paths = folder / "stages.json", folder / "weights.npy"
    if not all(path.is_file() for path in paths):
        raise InputError(
            f"cleaning.masks {folder}: no stages.json and weights.npy there; give a run's folder RUN/cleaning"
        )
    refuse_changed(json.loads(paths[0].read_text("utf-8"))["identity"], identity, f"cleaning.masks {folder}")
    return np.load(paths[1], mmap_mode="r")


def refuse_changed(then: Mapping[str, str], now: Mapping[str, str], what: str) -> None:
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    changed = [key for key in changed if key != "ids"] or changed  # other ids follow from what else has changed
    if changed:
        differences = "; ".join(f"{key}: {then.get(key)} there, {now.get(key)} here" for key in changed)
        raise InputError(
            f"{what} was made with another {' and '.join(changed)} ({differences}): its weights would fall on other "
            "tokens or mean something else. Use the options it was made with, or score anew."
        )
