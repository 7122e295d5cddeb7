"""Scores, weights and stages of one run over its token pool: in memory, in checkpoints, and in the run's folder."""

import json
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixdpo.batches.token_pool import TokenPool
from mixdpo.errors import InputError
from mixdpo.storage.files import read_array, read_json, write_json, written_whole
from mixdpo.storage.identity import refuse_changed

ARRAYS = ("scores", "weights", "decided")


FILES = ("samples", *(f"{name}.npy" for name in ARRAYS), "stages.json")


AGAIN = "the files are damaged or of different runs, so run the cleaning again"


MODERATE = range(30, 301)  # response tokens of a sample that is pleasant to read


@dataclass(frozen=True)
class ScoredStage:
    """Samples whose tokens were scored together.

    Attributes:
        facts: the entry of stages.json.
        samples: (n,) indices of the samples.
        centre: the threshold or, without one, the median score.
        reach: 95 % of the scores are this near to `centre`, or nearer.
    """

    facts: dict[str, Any]
    samples: np.ndarray
    centre: float
    reach: float


@dataclass
class RunTokens:
    """What a run decided about each of the M response tokens of the N samples of its pool.

    Attributes:
        identity: what must be the same for it to hold: of the pool, the model, its dtype.
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
        """
        Raises:
            InputError: the state is of other data, another tokenizer, template or model; says which.
        """
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
        content = {"identity": self.identity, "tokenizer": self.tokenizer, "stages": self.stages}
        write_json(folder / "stages.json", content)

    def in_progress(self) -> np.ndarray:
        """Indices of the samples of a stage that is decided, or being decided, and not among `stages` yet."""
        return np.flatnonzero(self.decided == len(self.stages))

    def samples_with(self, values: np.ndarray) -> np.ndarray:
        """Indices of the samples with a token whose value in `values` (M,) is not NaN."""
        filled = np.flatnonzero(np.diff(self.pool.offsets))  # reduceat gives an empty sample the next one's token
        return filled[np.logical_or.reduceat(~np.isnan(values), self.pool.offsets[filled])]

    def scored_tokens(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and weights of the scored tokens of these samples."""
        tokens = self.pool.tokens(samples)
        is_scored = ~np.isnan(self.scores[tokens])
        return self.scores[tokens][is_scored], self.weights[tokens][is_scored]

    def scored_stages(self) -> list[ScoredStage]:
        entries = enumerate(self.stages)
        return [
            self._stage(facts, np.flatnonzero(self.decided == entry)) for entry, facts in entries if facts["scorer"]
        ]

    def _stage(self, facts: dict[str, Any], samples: np.ndarray) -> ScoredStage:
        scores, _ = self.scored_tokens(samples)
        centre = facts["threshold"]
        if centre is None:
            centre = float(np.median(scores)) if len(scores) else 0.0
        reach = float(np.quantile(np.abs(scores - centre), 0.95)) if len(scores) else 0.0
        return ScoredStage(facts, samples, centre, reach)

    def examples(self, count: int, seed: int) -> list[tuple[int, ScoredStage]]:
        """`count` scored samples, each stage and source in turn, those of moderate length first."""
        draw, buckets, stages = random.Random(seed), defaultdict(list), self.scored_stages()
        lengths, sources = np.diff(self.pool.offsets), self.pool.samples["source"][:]
        scored = set(self.samples_with(self.scores).tolist())
        for number, stage in enumerate(stages):
            for index in (sample for sample in stage.samples.tolist() if sample in scored):
                rank = (lengths[index] not in MODERATE, draw.random(), index)
                buckets[number, sources[index]].append((*rank, stage))
        turns = zip_longest(*(sorted(buckets[key], key=lambda choice: choice[:3]) for key in sorted(buckets)))
        in_turn = [choice[2:] for turn in turns for choice in turn if choice]
        return sorted(in_turn[:count], key=lambda choice: choice[0])


def read_cleaning(run: str) -> RunTokens:
    """Read the folder `run`/cleaning; its arrays are memory-mapped.

    Raises:
        InputError: a file is missing, or scores and weights do not fit the samples.
    """
    from datasets import load_from_disk

    folder = Path(run) / "cleaning"
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise InputError(f"{run} is no token-cleaning run: {folder} lacks {', '.join(missing)}; give the run's folder")
    record = read_json(folder / "stages.json", {"identity", "tokenizer", "stages"}, AGAIN)
    try:
        pool = TokenPool.of(load_from_disk(str(folder / "samples")), record["identity"])
    except Exception as error:  # of datasets and pyarrow: an open list
        raise InputError(f"{folder / 'samples'} is damaged ({type(error).__name__}: {error}): {AGAIN}") from error
    if pool.identity != record["identity"]:
        raise InputError(f"{folder / 'samples'} holds other tokens than stages.json is of: {AGAIN}")
    shapes = {"scores": len(pool), "weights": len(pool), "decided": len(pool.samples)}
    arrays = {name: read_array(folder / f"{name}.npy", (shapes[name],), AGAIN) for name in ARRAYS}
    return RunTokens(pool, record["identity"], record["tokenizer"], **arrays, stages=record["stages"])


def read_masks(folder: Path, identity: Mapping[str, str], tokens: int) -> np.ndarray:
    """(M,) weights of an earlier run's folder `cleaning`, NaN where it never came.

    Raises:
        InputError: nothing is there, or it was made for other data, another tokenizer, template or model; says which.
    """
    paths = folder / "stages.json", folder / "weights.npy"
    if not all(path.is_file() for path in paths):
        raise InputError(
            f"cleaning.masks {folder}: no stages.json and weights.npy there; give a run's folder RUN/cleaning"
        )
    record = read_json(paths[0], {"identity"}, AGAIN)
    refuse_changed(record["identity"], identity, f"cleaning.masks {folder}")
    return read_array(paths[1], (tokens,), AGAIN)
