"""What a token-cleaning run left in its folder, and its cleaned labels as a data set that any trainer can use."""

import json
import random
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdpo.errors import InputError
from mixdpo.files import write_json, written_whole
from mixdpo.samples import TokenPool

if TYPE_CHECKING:
    from datasets import Dataset

MODERATE = range(30, 301)  # response tokens of a sample that is pleasant to read
FILES = ("samples", "scores.npy", "weights.npy", "decided.npy", "stages.json")
IGNORED = -100  # the label that cross-entropy skips


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


@dataclass(frozen=True)
class CleaningRun:
    """The N samples of a run and what became of their M eligible tokens: those in `spans`, sample after sample.

    Attributes:
        samples: columns sample_id, source, row, input_ids, spans ([start0, end0, start1, …]), truncated, maybe planted.
        scores: (M,) float32, memory-mapped; NaN where a token was not scored.
        weights: (M,) float32, memory-mapped; 0 cut, NaN where training did not come.
        decided: (N,) int16, memory-mapped; the entry of stages.json that decided a sample's tokens last, -1 none.
        offsets: (N + 1,) int64; the tokens of sample n are offsets[n] to offsets[n + 1].
        record: stages.json.
    """

    samples: "Dataset"
    scores: np.ndarray
    weights: np.ndarray
    decided: np.ndarray
    offsets: np.ndarray
    record: dict[str, Any]

    def samples_with(self, values: np.ndarray) -> np.ndarray:
        """Indices of the samples with a token whose value in `values` (M,) is not NaN."""
        bounds = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return np.flatnonzero([not np.isnan(values[start:end]).all() for start, end in bounds])

    def scored_tokens(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and weights of the scored tokens of these samples."""
        ranges = [np.arange(*self.offsets[[sample, sample + 1]]) for sample in samples]
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *ranges])
        is_scored = ~np.isnan(self.scores[tokens])
        return self.scores[tokens][is_scored], self.weights[tokens][is_scored]

    def scored_stages(self) -> list[ScoredStage]:
        entries = enumerate(self.record["stages"])
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
        lengths, sources = np.diff(self.offsets), self.samples["source"][:]
        scored = set(self.samples_with(self.scores).tolist())
        for number, stage in enumerate(stages):
            for index in (sample for sample in stage.samples.tolist() if sample in scored):
                rank = (lengths[index] not in MODERATE, draw.random(), index)
                buckets[number, sources[index]].append((*rank, stage))
        turns = zip_longest(*(sorted(buckets[key], key=lambda choice: choice[:3]) for key in sorted(buckets)))
        in_turn = [choice[2:] for turn in turns for choice in turn if choice]
        return sorted(in_turn[:count], key=lambda choice: choice[0])


def read_cleaning(run: str) -> CleaningRun:
    """Read the folder `run`/cleaning.

    Raises:
        InputError: a file is missing, or scores and weights do not fit the samples.
    """
    from datasets import load_from_disk

    folder = Path(run) / "cleaning"
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise InputError(f"{run} is no token-cleaning run: {folder} lacks {', '.join(missing)}; give the run's folder")
    samples = load_from_disk(str(folder / "samples"))
    record = json.loads((folder / "stages.json").read_text("utf-8"))
    offsets = TokenPool.of(samples, record["identity"]).offsets
    arrays = [np.load(folder / name, mmap_mode="r") for name in FILES[1:4]]
    for name, values in zip(FILES[1:3], arrays[:2], strict=True):
        if values.shape != (offsets[-1],):
            raise InputError(
                f"{folder / name} has the shape {values.shape}, but the {len(samples)} samples beside it have "
                f"{offsets[-1]} eligible tokens: the files are of different runs, so run the cleaning again"
            )
    return CleaningRun(samples, *arrays, offsets, record)


def export_labels(run: str, out: str, overwrite: bool = False) -> None:
    """Write a run's cleaned labels as a data set for any trainer that takes input_ids and labels.

    Columns: sample_id, source, input_ids, labels (the token where its weight is above 0; else -100: prompt, cut tokens,
    tokens that training never reached), weights (of each of the input_ids; 0 wherever the label is -100). Samples that
    training never reached are left out. identity.json in the same folder says what the labels depend on.

    Args:
        run: folder of a run with token cleaning.
        out: folder to write; read it with datasets.load_from_disk.
        overwrite: replace `out` if it is such a folder.

    Raises:
        InputError: `run` has no cleaning, `out` exists, or training reached no sample.
    """
    target = Path(out)
    if target.exists() and not (overwrite and (target / "identity.json").is_file()):
        raise InputError(f"{out} exists: give another folder, or --overwrite true where it holds exported labels")
    cleaning = read_cleaning(run)
    reached = cleaning.samples_with(cleaning.weights)
    if not len(reached):
        raise InputError(f"{run}: training has reached none of the {len(cleaning.samples)} samples: nothing to export")
    left_out = len(cleaning.samples) - len(reached)
    counts = {"samples": len(reached), "left_out": left_out, "labels": int((cleaning.weights > 0).sum())}
    about = {name: cleaning.record[name] for name in ("identity", "tokenizer")} | {"run": str(run)} | counts
    with written_whole(target) as unfinished, tempfile.TemporaryDirectory(prefix=".map-", dir=target.parent) as cache:
        _labelled(cleaning, reached, f"{cache}/map.arrow").save_to_disk(str(unfinished))
        write_json(unfinished / "identity.json", about)
    print(
        f"wrote {out}: {len(reached)} samples, {counts['labels']} of {cleaning.offsets[-1]} response tokens have a "
        f"label; left out {left_out} samples that training never reached"
    )


def _labelled(cleaning: CleaningRun, reached: np.ndarray, cache_file: str) -> "Dataset":
    """On disk from the first row on: memory holds one batch."""
    from datasets import Features, Value

    number, columns = Value("int64"), {"sample_id", "source", "input_ids"}
    lists = {"input_ids": [Value("int32")], "labels": [number], "weights": [Value("float32")]}
    return cleaning.samples.select(reached, keep_in_memory=True).map(
        partial(_label, weights=cleaning.weights, starts=cleaning.offsets[reached]),
        with_indices=True,
        remove_columns=[name for name in cleaning.samples.column_names if name not in columns],
        features=Features({"sample_id": number, "source": Value("string")} | lists),
        cache_file_name=cache_file,
        new_fingerprint="labels",  # it would hash, so read, all weights; and the file is never looked for again
        desc="Labels",
    )


def _label(row: dict[str, Any], index: int, weights: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    ids = np.array(row["input_ids"])
    spread, start = np.zeros(len(ids), dtype=np.float32), starts[index]
    for first, end in zip(row["spans"][::2], row["spans"][1::2], strict=True):
        spread[first:end] = weights[start : start + end - first]
        start += end - first
    spread[~(spread > 0)] = 0  # NaN: never reached
    return {"labels": np.where(spread > 0, ids, IGNORED), "weights": spread}
