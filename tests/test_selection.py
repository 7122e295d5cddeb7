"""Selection: equal to a stable sort per group, for every scope, with ties, least counts and tokens kept always."""

import math
import tracemalloc
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.losses import BetaDPO
from mixdpo.storage.identity import described
from mixdpo.token_cleaning import scorers
from mixdpo.token_cleaning import selection as selection_module
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss, Probability, Random, TokenStatistics, is_online
from mixdpo.token_cleaning.selection import Selection, _best, select

FEW_SCORES = st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0])  # few values: ties everywhere
SCOPES = st.sampled_from(["global", "sample", "batch"])
THRESHOLDS = st.sampled_from([-2.0, 0.0, 0.5, 9.0])
RULES = st.fixed_dictionaries({"keep_ratio": st.floats(0.01, 1)}) | st.fixed_dictionaries({"threshold": THRESHOLDS})
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
    batches = [[t for n, s in enumerate(samples) if batch[n] == b for t in s] for b in set(batch.tolist())]
    groups = {"global": [range(len(scores))], "sample": samples, "batch": batches}[selection.scope]

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


LN2 = math.log(2)
LOSSES = {
    "base": torch.tensor([3.0, 1.0, 2.0, 2.0, 0.5]),
    "cleaning_reference": torch.tensor([1.0, 2.0, 2.0, 1.0, 0.5]),
    "policy": torch.tensor([0.0, LN2, 5.0, 5.0, 1.0]),
}


def statistics(losses=LOSSES, sample=(4, 4, 4, 9, 7), token=(0, 1, 2, 3, 4)):
    return TokenStatistics(losses, torch.tensor(sample), torch.tensor(token))


BY_HAND = [
    (ExcessLoss(), ("base", "cleaning_reference"), [2.0, -1.0, 0.0, 1.0, 0.0]),
    (ExcessLoss("policy", "cleaning_reference"), ("policy", "cleaning_reference"), [-1.0, LN2 - 2, 3.0, 4.0, 0.5]),
    # sample 4 has 2, -1 and 0; samples 9 and 7 have one token each
    (ExcessLoss(normalise=True), ("base", "cleaning_reference"), [1.0, 0.0, 1 / 3, 0.0, 0.0]),
    (ExcessLoss("cleaning_reference", "policy"), ("cleaning_reference", "policy"), [1.0, 2 - LN2, -3.0, -4.0, -0.5]),
    (Loss(), ("policy",), [0.0, LN2, 5.0, 5.0, 1.0]),
    (Loss("base"), ("base",), [3.0, 1.0, 2.0, 2.0, 0.5]),
    (Probability(), ("policy",), [1.0, 0.5, math.exp(-5), math.exp(-5), math.exp(-1)]),
]


@pytest.mark.parametrize(("scorer", "roles", "scores"), BY_HAND)
def test_scores_by_hand(scorer, roles, scores):
    assert scorer.roles == roles and is_online(scorer) == ("policy" in roles)
    losses = {role: LOSSES[role] for role in roles}  # a role that is not named would be a KeyError
    torch.testing.assert_close(scorer(statistics(losses)), torch.tensor(scores))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-20, 20)), min_size=1, max_size=30))
def test_normalised_per_sample_as_a_loop_does(tokens):
    sample, worse = zip(*tokens, strict=True)
    losses = {"base": torch.tensor(worse) / 4, "cleaning_reference": torch.zeros(len(tokens))}
    scores = ExcessLoss(normalise=True)(statistics(losses, sample, range(len(tokens)))).tolist()
    for (name, value), score in zip(tokens, scores, strict=True):
        own = [other for its, other in tokens if its == name]
        width = max(own) - min(own)
        assert score == pytest.approx((value - min(own)) / width if width else 0.0)


def test_what_a_scorer_is_called_in_every_process():
    class Own:
        roles = ("base",)

        def __init__(self, power, function=len):
            self.power, self.function = power, function

    name = f"{Own.__qualname__}({{'power': 2, 'function': <function "
    assert described(Own(2, lambda: 0)).startswith(name) and " at 0x" not in described(Own(2, lambda: 0))
    for scorer in (ExcessLoss(normalise=True), Loss("base"), Random(3)):
        assert described(scorer) == repr(scorer)
    assert described(Cleaning().scorer) == "ExcessLoss(worse='base', better='cleaning_reference', normalise=False)"
    assert described(BetaDPO(beta=0.2)) == "BetaDPO(beta=0.2, sensitivity=0.6)"


def test_a_tokens_random_score_depends_on_its_number_and_the_seed_only():
    def scores(*tokens, seed=3):
        return Random(seed)(TokenStatistics({}, torch.zeros(len(tokens)), torch.tensor(tokens, dtype=torch.long)))

    assert scores(7, 0, 12_345).tolist() == [scores(token).item() for token in (7, 0, 12_345)]
    assert scores(7).item() != scores(7, seed=4).item() and len(scores()) == 0


def test_what_is_measured_and_what_the_data_holds():
    """A scorer is called with its own statistics in its order; needs alone make a scorer read the policy."""
    Column, Entropy = scorers.Column, scorers.Entropy
    measured = TokenStatistics({}, torch.zeros(3), torch.arange(3), [torch.tensor([0.0, 1.5, 3.0])])
    assert Entropy()(measured).tolist() == [0.0, 0.5, 1.0]
    assert Entropy(top=None, scale=1.0, power=2.0)(measured).tolist() == [0.0, 2.25, 9.0]
    assert [Entropy(top).needs[0].keywords["top"] for top in (20, None)] == [20, None]
    assert described(Entropy()) == "Entropy(top=20, scale=3.0, power=1.0)"  # the same in every process
    of_data = {"column": torch.tensor([0.5, -1.0])}
    assert Column("quality")(TokenStatistics(of_data, torch.zeros(2), torch.arange(2))).tolist() == [0.5, -1.0]
    assert is_online(Entropy()) and not is_online(Column("quality"))
    assert is_online(SimpleNamespace(roles=(), needs=[len])) and not is_online(SimpleNamespace(roles=("base",)))
