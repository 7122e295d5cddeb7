"""Scorers: values by hand, roles, and random scores that belong to the token."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.losses import BetaDPO
from mixdpo.storage.identity import described
from mixdpo.token_cleaning import scorers
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss, Loss, Probability, Random, TokenStatistics, is_online

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
def test_by_hand(scorer, roles, scores):
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
