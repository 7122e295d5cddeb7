"""A run's decisions on its tokens: in memory, in checkpoints, in the run's folder, and as a labelled data set."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixdpo.batches.token_pool import TokenPool, data_weights, turns
from mixdpo.errors import InputError
from mixdpo.storage.files import read_array, read_json, write_json, written_whole
from mixdpo.storage.identity import refuse_changed

ARRAYS, HEAD = ("scores", "weights", "decided"), ("identity", "tokenizer")
AGAIN = "the files are damaged or of different runs, so run the cleaning again"


@dataclass(frozen=True)
class ScoredStage:
    """Samples whose tokens were scored together.

    Attributes:
        summary: the entry of stages.json.
        samples: (n,) indices of the samples.
        centre: the threshold or, without one, the median score.
        reach: 95 % of the scores lie within this distance of `centre`.
    """

    summary: dict[str, Any]
    samples: np.ndarray
    centre: float
    reach: float


@dataclass
class RunTokens:
    """A run's decisions on each of the M response tokens of the N samples of its pool.

    Attributes:
        identity: what the decisions depend on: pool, model and dtype.
        tokenizer: name of the tokenizer.
        scores, weights: (M,) float32, NaN where a token has not been scored, or not been reached by training.
        decided: (N,) int16, the number in `stages` of the entry that decided a sample's tokens last; -1 none yet.
        stages: one summary per stage so far, in JSON's types.
    """

    pool: TokenPool
    identity: Mapping[str, str]
    tokenizer: str
    scores: np.ndarray
    weights: np.ndarray
    decided: np.ndarray
    stages: list[dict[str, Any]]

    @classmethod
    def undecided(cls, pool: TokenPool, identity: Mapping[str, str], tokenizer: str) -> "RunTokens":
        scores, weights = np.full((2, len(pool)), np.nan, dtype=np.float32)
        decided = np.full(len(pool.offsets) - 1, -1, dtype=np.int16)
        return cls(pool, identity, tokenizer, scores, weights, decided, [])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain types."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in ARRAYS}
        return {**arrays, "identity": dict(self.identity), "stages": json.loads(json.dumps(self.stages))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint; refuse a checkpoint of other data, another tokenizer, template or model."""
        refuse_changed(state["identity"], self.identity, "the checkpoint")
        for name in ARRAYS:
            setattr(self, name, state[name].numpy().copy())
        self.stages = list(state["stages"])

    def write_samples(self, folder: Path) -> None:
        """The pool's samples as a data set, so that report and export need nothing else; whole or not at all."""
        with written_whole(folder / "samples") as partial:
            self.pool.samples.save_to_disk(str(partial), num_shards=1)

    def write(self, folder: Path) -> None:
        """scores.npy, weights.npy, decided.npy and stages.json, each whole or not at all."""
        for name in ARRAYS:
            with written_whole(folder / f"{name}.npy") as partial:
                np.save(partial, getattr(self, name))
        write_json(folder / "stages.json", {name: getattr(self, name) for name in (*HEAD, "stages")})

    def in_progress(self) -> np.ndarray:
        """Indices of the samples of a stage that is decided, or being decided, and not among `stages` yet."""
        return np.flatnonzero(self.decided == len(self.stages))

    def samples_with(self, values: np.ndarray) -> np.ndarray:
        """Indices of the samples with a token whose value in `values` (M,) is not NaN."""
        filled = np.flatnonzero(np.diff(self.pool.offsets))  # reduceat gives an empty sample the next one's token
        return filled[np.logical_or.reduceat(~np.isnan(values), self.pool.offsets[filled])]

    def scored_stages(self) -> list[ScoredStage]:
        stages = []
        for number, entry in enumerate(self.stages):
            if entry["scorer"]:
                samples = np.flatnonzero(self.decided == number)
                scores = self.scores[self.pool.tokens(samples)]
                scores = scores[~np.isnan(scores)] if not np.isnan(scores).all() else np.zeros(1)
                centre = np.median(scores) if entry["threshold"] is None else entry["threshold"]
                reach = np.quantile(np.abs(scores - centre), 0.95)
                stages.append(ScoredStage(entry, samples, float(centre), float(reach)))
        return stages

    def examples(self, count: int, seed: int) -> list[tuple[int, ScoredStage]]:
        """`count` scored samples, drawn at random."""
        scored = set(self.samples_with(self.scores).tolist())
        among = [(i, stage) for stage in self.scored_stages() for i in stage.samples.tolist() if i in scored]
        drawn = random.Random(seed).sample(range(len(among)), min(count, len(among)))
        return [among[place] for place in sorted(drawn)]


def read_cleaning(run: str) -> RunTokens:
    """Read the folder `run`/cleaning; its arrays are memory-mapped.

    Raises:
        InputError: the folder is none of a run with token cleaning, or its files do not fit together.
    """
    from datasets import load_from_disk

    folder = Path(run) / "cleaning"
    record = _read_record(folder)
    try:
        pool = TokenPool.of(load_from_disk(str(folder / "samples")), record["identity"])
    except Exception as error:  # of datasets and pyarrow: an open list
        raise InputError(f"{folder / 'samples'} is damaged ({type(error).__name__}): {AGAIN}") from error
    if pool.identity != record["identity"]:
        raise InputError(f"{folder / 'samples'} holds other tokens than stages.json names: {AGAIN}")
    sizes = {"scores": len(pool), "weights": len(pool), "decided": len(pool.samples)}
    arrays = {name: read_array(folder / f"{name}.npy", (sizes[name],), AGAIN) for name in ARRAYS}
    return RunTokens(pool, record["identity"], record["tokenizer"], **arrays, stages=record["stages"])


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / "stages.json").is_file():
        raise InputError(f"{folder} has no stages.json: give a run with token cleaning, for masks its RUN/cleaning")
    return read_json(folder / "stages.json", {*HEAD, "stages"}, AGAIN)


def read_masks(folder: Path, identity: Mapping[str, str], tokens: int) -> np.ndarray:
    """(M,) weights of an earlier run's folder `cleaning`, NaN for tokens that training never reached.

    Raises:
        InputError: the folder is none of a run with token cleaning, or of other data or another model.
    """
    refuse_changed(_read_record(folder)["identity"], identity, f"cleaning.masks {folder}")
    return read_array(folder / "weights.npy", (tokens,), AGAIN)


def export_labels(run: str, out: str) -> None:
    """Write a run's cleaned labels as a data set for any trainer that takes input_ids and labels.

    Columns: sample_id, source, input_ids, labels, weights. A label is the token where its weight is above 0, else -100
    (prompt, cut tokens, tokens that training never reached). Weights are 0 wherever the label is -100. Samples that
    training never reached are left out. identity.json in the same folder says what the labels depend on.

    Args:
        run: folder of a run with token cleaning.
        out: folder to write, which does not exist; read it with datasets.load_from_disk.

    Raises:
        InputError: `out` exists, `run` has no cleaning, or training reached no sample.
    """
    if Path(out).exists():
        raise InputError(f"{out} exists: give another folder, or remove this one")
    cleaning = read_cleaning(run)
    reached, samples = cleaning.samples_with(cleaning.weights), cleaning.pool.samples
    if not len(reached):
        raise InputError(f"{run}: training has reached none of the {len(samples)} samples: nothing to export")
    arrays = {"weights": cleaning.weights, "starts": cleaning.pool.offsets[reached]}
    labelled = samples.select(reached, keep_in_memory=True)
    labelled = labelled.map(_label, with_indices=True, fn_kwargs=arrays, keep_in_memory=True)
    with written_whole(Path(out)) as unfinished:
        labelled.select_columns(["sample_id", "source", "input_ids", "labels", "weights"]).save_to_disk(str(unfinished))
        write_json(unfinished / "identity.json", {k: vars(cleaning)[k] for k in HEAD} | {"run": run})
    tokens = f"{int((cleaning.weights > 0).sum())} of {len(cleaning.pool)} response tokens have a label"
    left_out = f"{len(samples) - len(reached)} samples that training never reached"
    print(f"wrote {out}: {len(reached)} samples, {tokens}; left out {left_out}")


def _label(row: dict[str, Any], index: int, weights: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    ids, start = np.array(row["input_ids"]), starts[index]
    places = np.concatenate([np.arange(first, end) for first, end in turns(row["spans"])])
    spread = np.zeros(len(ids), dtype=np.float32)
    spread[places] = weights[start : start + len(places)] * data_weights([row])
    spread[~(spread > 0)] = 0  # NaN: never reached
    return {"labels": np.where(spread > 0, ids, -100), "weights": spread}  # cross-entropy skips -100
