"""Summary of a selection: every number by hand, AUC against a count of pairs, nothing but JSON."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.errors import InputError
from mixdpo.token_cleaning.selection import Kept
from mixdpo.token_cleaning.summary import summarise


def summary(*arguments, **options):
    facts = summarise(*arguments, **options)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    return facts


def test_by_hand():
    """Samples of 4, 0, 2 and 2 tokens; the third keeps nothing, the second has nothing to keep."""
    weights = np.array([1, 0, 0.5, 1, 0, 0, 1, 0], dtype=np.float32)
    scores = np.array([4, -2, 1, 3, -1, 0, 2, -3], dtype=np.float32)
    kept = Kept(weights > 0, 1.0, 2, 1)
    planted = np.array([0, 1, 1, 0, 1, 0, 0, 0])
    facts = summary(weights, scores, np.array([0, 4, 4, 6, 8]), ["a", "b", "a", "c"], kept, planted)
    assert facts == {
        **{"tokens": 8, "kept_tokens": 4, "kept_share": 3.5 / 8, "threshold": 1.0, "ties": 2, "ties_kept": 1},
        **{"samples": 4, "samples_keeping_nothing": 2, "mean_abs_score": 2.0},
        "by_source": {
            "a": {"tokens": 6, "kept_share": 2.5 / 6},
            "b": {"tokens": 0, "kept_share": None},
            "c": {"tokens": 2, "kept_share": 0.5},
        },
        # tenths: 0 2 5 7 | 0 5 | 0 5
        "by_position": [2 / 3, None, 0.0, None, None, 0.5 / 3, None, 1.0, None, None],
        "planted": {
            "share": 3 / 8,
            "auc": 11 / 15,  # planted -2 1 -1 against 4 3 0 2 -3: 3 + 3 + 2 + 3 + 0 clean ones above
            "precision": 2 / 4,
            "recall": 2 / 3,
            "kept_noise_rate": 0.5 / 3.5,
        },
    }


def test_a_long_response_fills_every_tenth():
    facts = summary(np.repeat([1, 0], [30, 70]), np.zeros(100), np.array([0, 100]), ["a"])
    assert facts["by_position"] == [1.0] * 3 + [0.0] * 7
    assert facts["threshold"] is facts["ties"] is facts["ties_kept"] is None and "planted" not in facts


def test_tokens_without_scores_count_but_have_no_score():
    scores, planted = np.array([np.nan, 1.0, np.nan, -3.0]), np.array([1, 1, 0, 0])
    facts = summary(np.ones(4), scores, np.array([0, 4]), ["a"], planted=planted)
    assert (facts["kept_share"], facts["mean_abs_score"]) == (1.0, 2.0)
    assert facts["planted"]["auc"] == 0.0  # -3 (clean) is below 1 (planted)
    facts = summary(np.ones(4), np.full(4, np.nan), np.array([0, 4]), ["a"], planted=planted)
    assert facts["mean_abs_score"] is facts["planted"]["auc"] is None
    assert facts["planted"]["kept_noise_rate"] == 0.5


def test_nothing_kept_nothing_planted_nothing_there():
    facts = summary(np.zeros(2), np.ones(2), np.array([0, 2]), ["a"], planted=np.zeros(2))
    assert facts["planted"] == {"share": 0.0, "auc": None, "precision": 0.0, "recall": None, "kept_noise_rate": None}
    facts = summary(np.zeros(0), np.zeros(0), np.array([0]), [], planted=np.zeros(0))
    assert facts["kept_share"] is facts["planted"]["share"] is None and facts["by_source"] == {}


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40))
def test_auc_counts_pairs(tokens):
    scores, planted = map(np.array, zip(*tokens, strict=True))
    facts = summary(np.ones(len(tokens)), scores, np.array([0, len(tokens)]), ["a"], planted=planted)
    pairs = [(c > n) + (c == n) / 2 for c, other in tokens if not other for n, noise in tokens if noise]
    assert facts["planted"]["auc"] == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_the_bound(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    bound_term = import_module("planted_noise").bound_term
    assert bound_term(100_000) == pytest.approx(0.009362, abs=1e-6)  # √(2 · ln 80 / 10⁵), ln 80 = 4.382027
    assert bound_term(8, delta=4 / math.e) == 0.5  # √(2 · 1 / 8)
    with pytest.raises(InputError, match="kept"):
        bound_term(0)
