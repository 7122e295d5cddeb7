"""Selection: equal to a stable sort per group, for every scope, with ties, least counts and tokens kept always."""

import tracemalloc
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.errors import InputError
from mixdpo.token_cleaning import selection as selection_module
from mixdpo.token_cleaning.selection import Selection, _best, select

FEW_SCORES = st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0])  # few values: ties everywhere
SCOPES = st.sampled_from(["global", "sample", "batch"])
RULES = st.one_of(
    st.builds(lambda ratio: {"keep_ratio": ratio}, st.floats(0.01, 1)),
    st.builds(lambda threshold: {"threshold": threshold}, st.sampled_from([-2.0, 0.0, 0.5, 9.0])),
)
fast = settings(max_examples=200)


@st.composite
def pools(draw):
    """scores, offsets, batch, always_keep of up to 8 samples of 0 to 9 tokens, batches in any order."""
    samples = draw(st.lists(st.lists(st.tuples(FEW_SCORES, st.booleans()), max_size=9), max_size=8))
    tokens = [token for sample in samples for token in sample]
    scores = np.array([score for score, _ in tokens], dtype=np.float32)
    always = draw(st.sampled_from([None, np.array([mark for _, mark in tokens], dtype=bool)]))
    batch = np.array([draw(st.integers(0, 2)) for _ in samples], dtype=np.int64)
    return scores, np.cumsum([0, *map(len, samples)]), batch, always


def kept_by_sorting(scores, offsets, batch, always, selection):
    """The rules by Python's stable sort: a set of token numbers."""
    samples = [range(start, end) for start, end in pairwise(offsets)]
    always = np.zeros(len(scores), dtype=bool) if always is None else always
    groups = {
        "global": [range(len(scores))],
        "sample": samples,
        "batch": [[t for n, s in enumerate(samples) if batch[n] == b for t in s] for b in set(batch.tolist())],
    }[selection.scope]

    def best(tokens):
        return sorted(tokens, key=lambda token: (not always[token], -scores[token]))

    kept = set(np.flatnonzero(always))
    if selection.threshold is not None:
        kept |= {token for token in range(len(scores)) if scores[token] > selection.threshold}
    else:
        for group in groups:
            kept |= set(best(group)[: round(selection.keep_ratio * len(group))])
    for sample in samples:
        kept |= set(best(sample)[: selection.min_keep])
    return kept


@given(pools(), RULES, SCOPES, st.integers(0, 4), st.sampled_from([np.float16, np.float32]))
@fast
def test_equal_to_a_stable_sort(pool, rule, scope, min_keep, precision):
    scores, offsets, batch, always = pool
    scores = scores.astype(precision)
    selection = Selection(**rule, scope=scope, min_keep=min_keep)
    mask, _ = select(scores, offsets, selection, batch=batch, always_keep=always)
    assert mask.dtype == bool and mask.shape == scores.shape
    assert set(np.flatnonzero(mask)) == kept_by_sorting(scores, offsets, batch, always, selection)


SCORES = np.array([3, 1, 1, 1, 0, 2, 1, 0, 0, -1], dtype=np.float32)
OFFSETS = np.array([0, 4, 5, 10])  # samples (3 1 1 1) (0) (2 1 0 0 -1)


@pytest.mark.parametrize(("options", "kept", "threshold"), [
    ({"keep_ratio": 0.4}, [0, 1, 2, 5], 1.0),
    ({"keep_ratio": 0.4, "min_keep": 1}, [0, 1, 2, 4, 5], 1.0),
    ({"keep_ratio": 0.25}, [0, 5], 2.0),  # round(2.5) is 2
    ({"keep_ratio": 0.04}, [], None),  # round(0.4) is 0
    ({"keep_ratio": 1.0}, list(range(10)), -1.0),
    ({"keep_ratio": 0.5, "scope": "sample"}, [0, 1, 5, 6], None),  # round(2), round(0.5), round(2.5)
    ({"keep_ratio": 0.5, "scope": "sample", "min_keep": 3}, [0, 1, 2, 4, 5, 6, 7], None),
    ({"keep_ratio": 0.5, "scope": "batch"}, [0, 1, 2, 5], None),  # samples 0 and 2: round(4.5); 1: round(0.5)
    ({"threshold": 1.0}, [0, 5], 1.0),
    ({"threshold": 0.0, "min_keep": 1}, [0, 1, 2, 3, 4, 5, 6], 0.0),
])  # fmt: skip
def test_by_hand(options, kept, threshold):
    mask, lowest = select(SCORES, OFFSETS, Selection(**options), batch=np.array([7, 2, 7]))
    assert (np.flatnonzero(mask).tolist(), lowest) == (kept, threshold)


def test_ratio_and_threshold_stand_alone():
    assert Selection() == Selection(keep_ratio=None, threshold=None) == Selection(keep_ratio=0.6)
    assert Selection(threshold=0.0) == Selection(keep_ratio=None, threshold=0.0)
    with pytest.raises(InputError, match=r"give keep_ratio or threshold, not both \(0.6 and 0.0\)"):
        Selection(keep_ratio=0.6, threshold=0.0)


# Scope global reads the scores piece by piece.
ANY_SCORES = st.floats(width=16, allow_nan=False, allow_infinity=False)
CLOSE = st.integers(-3, 3).map(lambda n: 1 + n * 2.0**-23)  # neighbours in float32: equal in all but the last bits


@given(
    st.sampled_from([FEW_SCORES, ANY_SCORES, CLOSE]).flatmap(
        lambda scores: st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=60)
    ),
    st.floats(0.01, 1), st.integers(0, 3), st.booleans(), st.sampled_from([1, 3, 7, 100]),
    st.sampled_from([np.float16, np.float32, np.float64]),
)  # fmt: skip
@fast
def test_streaming_is_exact(tokens, ratio, min_keep, marks, piece, precision):
    scores = np.array([score for score, _ in tokens], dtype=precision)
    always = np.array([mark for _, mark in tokens]) if marks else None
    offsets = np.array([0, len(scores) // 3, len(scores)])
    selection = Selection(ratio, min_keep=min_keep)
    with patch.object(selection_module, "PIECE", piece):
        mask, threshold = select(scores, offsets, selection, always_keep=always)
    assert set(np.flatnonzero(mask)) == kept_by_sorting(scores, offsets, np.zeros(2), always, selection)
    ranked = scores if always is None else np.where(always, np.inf, scores)
    count = max(round(ratio * len(scores)), np.count_nonzero(ranked == np.inf))
    lowest = min(ranked[_best(ranked, count)], default=np.inf) if count else np.inf
    assert threshold == (None if lowest == np.inf else lowest)


def test_memory_mapped_scores_are_never_held_whole(tmp_path):
    scores = np.round(np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32), 3)  # 300 of each score
    np.save(tmp_path / "scores.npy", scores)
    mapped, offsets = np.load(tmp_path / "scores.npy", mmap_mode="r"), np.arange(0, len(scores) + 1, 500)
    tracemalloc.start()
    mask, threshold = select(mapped, offsets, Selection(0.6, min_keep=1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    order = np.argsort(-scores, kind="stable")
    assert np.array_equal(np.flatnonzero(mask), np.sort(order[: round(0.6 * len(scores))]))
    assert threshold == scores[order[round(0.6 * len(scores)) - 1]]
    assert peak < mask.nbytes + 12e6  # and a copy of the scores alone would be 12 MB
