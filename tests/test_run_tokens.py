"""Cleaned labels of a run as a data set: -100 where nothing is trained on, weights aligned with the tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value, load_from_disk

from mixdpo.__main__ import main
from mixdpo.batches.token_pool import TokenPool
from mixdpo.errors import InputError
from mixdpo.token_cleaning.run_tokens import RunTokens, export_labels, read_cleaning

NAN = float("nan")
SAMPLES = [
    {"source": "gsm", "row": 5, "input_ids": [6, 7, 8, 9, 3], "spans": [2, 5], "response_weights": [1]},
    {"source": "dolly", "row": 6, "input_ids": [6, 10, 11, 12], "spans": [1, 4], "response_weights": [1]},
    {"source": "gsm", "row": 9, "input_ids": [6, 13, 3, 7, 14, 15, 3], "spans": [1, 3, 4, 7]},
]  # the second is never reached, the third has two turns
SAMPLES[2]["response_weights"] = [1, 0.25]
WEIGHTS = [1, 0, 1, NAN, NAN, NAN, 0.5, 0, NAN, 2, 0]


def write_run(folder: Path, weights: list[float] = WEIGHTS) -> str:
    features = {"sample_id": Value("int64"), "source": Value("string"), "row": Value("int64")}
    features |= {name: [Value("int32")] for name in ("input_ids", "spans")}
    features |= {"response_weights": [Value("float32")]}
    rows = [sample | {"sample_id": 100 + n} for n, sample in enumerate(SAMPLES)]
    pool = TokenPool.of(Dataset.from_list(rows, features=Features(features)), {"data": "d1", "model": "m1"})
    run = RunTokens.undecided(pool, pool.identity, "any")
    run.weights = np.array(weights, dtype=np.float32)
    run.write_samples(folder / "cleaning")
    run.write(folder / "cleaning")
    return str(folder)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return write_run(tmp_path / "run")


def test_labels_by_hand(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "labels"
    assert main(["export-labels", run, str(out)]) == 0
    exported = load_from_disk(str(out))
    columns = {name: exported[name][:] for name in exported.column_names}
    assert columns == {
        "sample_id": [100, 102],
        "source": ["gsm", "gsm"],
        "input_ids": [[6, 7, 8, 9, 3], [6, 13, 3, 7, 14, 15, 3]],
        "labels": [[-100, -100, 8, -100, 3], [-100, 13, -100, -100, -100, 15, -100]],
        "weights": [[0, 0, 1, 0, 1], [0, 0.5, 0, 0, 0, 0.5, 0]],  # 2 × the data's 0.25
    }
    types = {name: feature.feature.dtype for name, feature in exported.features.items() if hasattr(feature, "feature")}
    assert types == {"input_ids": "int32", "labels": "int64", "weights": "float32"}
    origin = {"identity": read_cleaning(run).identity, "tokenizer": "any", "run": run}
    assert json.loads((out / "identity.json").read_text()) == origin
    printed = capsys.readouterr().out
    assert "2 samples, 4 of 11 response tokens have a label; left out 1 samples" in printed


def test_a_run_that_trained_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 3 samples"):
        export_labels(write_run(tmp_path / "run", [NAN] * 11), str(tmp_path / "labels"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_exists_is_never_replaced(run: str) -> None:
    with pytest.raises(InputError, match="exists"):
        export_labels(run, run)
