"""Summary of a selection, and how well it finds planted noise: every number by hand, AUC against a count of pairs."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from noise import detection

from mixdpo.errors import InputError
from mixdpo.token_cleaning.summary import summarise

# Samples of 4, 0, 2 and 2 tokens; the third keeps nothing, the second has nothing to keep.
WEIGHTS = np.array([1, 0, 0.5, 1, 0, 0, 1, 0], dtype=np.float32)
SCORES = np.array([4, -2, 1, 3, -1, 0, 2, -3], dtype=np.float32)
PLANTED = np.array([0, 1, 1, 0, 1, 0, 0, 0])


def test_by_hand():
    summary = summarise(WEIGHTS, SCORES, np.array([0, 4, 4, 6, 8]), ["a", "b", "a", "c"], 1.0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary == {
        **{"tokens": 8, "kept_tokens": 4, "kept_share": 3.5 / 8, "threshold": 1.0},
        **{"samples": 4, "samples_keeping_nothing": 2, "mean_abs_score": 2.0},
        "by_source": {
            "a": {"tokens": 6, "kept_share": 2.5 / 6},
            "b": {"tokens": 0, "kept_share": None},
            "c": {"tokens": 2, "kept_share": 0.5},
        },
    }


def test_noise_by_hand():
    assert detection(WEIGHTS, SCORES, PLANTED) == {
        "share": 3 / 8,
        "auc": 11 / 15,  # planted -2 1 -1 against 4 3 0 2 -3: 3 + 3 + 2 + 3 + 0 clean ones above
        "precision": 2 / 4,
        "recall": 2 / 3,
        "kept_noise_rate": 0.5 / 3.5,
    }


def test_tokens_without_scores_count_but_have_no_score():
    scores, planted, offsets = np.array([np.nan, 1.0, np.nan, -3.0]), np.array([1, 1, 0, 0]), np.array([0, 4])
    summary = summarise(np.ones(4), scores, offsets, ["a"])
    assert (summary["kept_share"], summary["mean_abs_score"]) == (1.0, 2.0)
    assert detection(np.ones(4), scores, planted)["auc"] == 0.0  # -3 (clean) is below 1 (planted)
    assert summarise(np.ones(4), np.full(4, np.nan), offsets, ["a"])["mean_abs_score"] is None
    noise = detection(np.ones(4), np.full(4, np.nan), planted)
    assert noise["auc"] is None and noise["kept_noise_rate"] == 0.5


def test_nothing_kept_nothing_planted_nothing_there():
    noise = detection(np.zeros(2), np.ones(2), np.zeros(2))
    assert noise == {"share": 0.0, "auc": None, "precision": 0.0, "recall": None, "kept_noise_rate": None}
    assert detection(np.zeros(0), np.zeros(0), np.zeros(0))["share"] is None
    summary = summarise(np.zeros(0), np.zeros(0), np.array([0]), [])
    assert summary["kept_share"] is None and summary["by_source"] == {}


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40))
def test_auc_counts_pairs(tokens):
    scores, planted = map(np.array, zip(*tokens, strict=True))
    auc = detection(np.ones(len(tokens)), scores, planted)["auc"]
    pairs = [(c > n) + (c == n) / 2 for c, other in tokens if not other for n, noise in tokens if noise]
    assert auc == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_the_bound(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    bound_term = import_module("planted_noise").bound_term
    assert bound_term(100_000) == pytest.approx(0.009362, abs=1e-6)  # √(2 · ln 80 / 10⁵), ln 80 = 4.382027
    assert bound_term(8, delta=4 / math.e) == 0.5  # √(2 · 1 / 8)
    with pytest.raises(InputError, match="kept"):
        bound_term(0)
