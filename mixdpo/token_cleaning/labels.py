"""A run's cleaned labels as a data set that any trainer can use."""

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdpo.batches.token_pool import turns
from mixdpo.errors import InputError
from mixdpo.storage.files import write_json, written_whole
from mixdpo.token_cleaning.run_tokens import RunTokens, read_cleaning

if TYPE_CHECKING:
    from datasets import Dataset


IGNORED = -100  # the label that cross-entropy skips


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
        raise InputError(
            f"{run}: training has reached none of the {len(cleaning.pool.samples)} samples: nothing to export"
        )
    left_out = len(cleaning.pool.samples) - len(reached)
    counts = {"samples": len(reached), "left_out": left_out, "labels": int((cleaning.weights > 0).sum())}
    about = {"identity": cleaning.identity, "tokenizer": cleaning.tokenizer, "run": str(run), **counts}
    with written_whole(target) as unfinished, tempfile.TemporaryDirectory(prefix=".map-", dir=target.parent) as cache:
        _labelled(cleaning, reached, f"{cache}/map.arrow").save_to_disk(str(unfinished))
        write_json(unfinished / "identity.json", about)
    print(
        f"wrote {out}: {len(reached)} samples, {counts['labels']} of {len(cleaning.pool)} response tokens have a "
        f"label; left out {left_out} samples that training never reached"
    )


def _labelled(cleaning: RunTokens, reached: np.ndarray, cache_file: str) -> "Dataset":
    """On disk from the first row on: memory holds one batch."""
    from datasets import Features, Value

    number, columns = Value("int64"), {"sample_id", "source", "input_ids"}
    lists = {"input_ids": [Value("int32")], "labels": [number], "weights": [Value("float32")]}
    return cleaning.pool.samples.select(reached, keep_in_memory=True).map(
        partial(_label, weights=cleaning.weights, starts=cleaning.pool.offsets[reached]),
        with_indices=True,
        remove_columns=[name for name in cleaning.pool.samples.column_names if name not in columns],
        features=Features({"sample_id": number, "source": Value("string")} | lists),
        cache_file_name=cache_file,
        new_fingerprint="labels",  # it would hash, so read, all weights; and the file is never looked for again
        desc="Labels",
    )


def _label(row: dict[str, Any], index: int, weights: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    ids = np.array(row["input_ids"])
    spread, start = np.zeros(len(ids), dtype=np.float32), starts[index]
    for first, end in turns(row["spans"]):
        spread[first:end] = weights[start : start + end - first]
        start += end - first
    spread[~(spread > 0)] = 0  # NaN: never reached
    return {"labels": np.where(spread > 0, ids, IGNORED), "weights": spread}
