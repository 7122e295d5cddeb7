"""Learning-rate schedules: promises of each, and the numbers that are published of cosine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.routing.schedules import Constant, Cosine, StagedCosine, StepPlan, learning_rate_mass

STEPS = 382  # 61,135 pairs in steps of 160
SCHEDULES = [Constant, Cosine, StagedCosine]


def hard_tail(fraction, steps=STEPS):
    """Share of hard pairs per step when the last `fraction` of all pairs is hard; one step may be mixed."""
    hard_steps = fraction * steps
    return np.array([min(1.0, max(0.0, hard_steps - (steps - 1 - step))) for step in range(steps)])


def sft_mass(schedule, plan):
    return learning_rate_mass(schedule(plan), plan.sft_share)["lr_mass/sft"]


@pytest.mark.parametrize(
    ("fraction", "published", "tolerance"), [(0.121, 0.0036, 0.0003), (0.25, 0.032, 0.002), (0.5, 0.22, 0.005)]
)
def test_cosine_starves_the_tail_as_published(fraction, published, tolerance):
    """The tolerance covers the rounding of the text and the freedom of half a step in where a cosine is sampled."""
    assert sft_mass(Cosine(warmup=0.1), StepPlan(hard_tail(fraction))) == pytest.approx(published, abs=tolerance)


def test_the_tail_of_cosine_averages_one_and_a_half_percent_by_default():
    plan = StepPlan(hard_tail(46 / STEPS))
    assert Cosine()(plan)[336:].mean() == pytest.approx(0.015, abs=0.001)
    for schedule in SCHEDULES:
        assert np.array_equal(schedule()(plan), schedule(warmup=0.1)(plan))


def test_staged_cosine_and_constant_give_sft_its_share_of_the_steps():
    plan = StepPlan(hard_tail(46 / STEPS), stage_starts=(0, 336))
    assert sft_mass(StagedCosine(warmup=0.1), plan) == pytest.approx(46 / STEPS, abs=0.01)
    assert sft_mass(Constant(warmup=0.0), plan) == pytest.approx(46 / STEPS, abs=1e-9)
    assert sft_mass(Constant(warmup=0.1), plan) == pytest.approx(46 / (STEPS - 19), abs=0.001)  # warm-up loses half


@pytest.mark.parametrize("schedule", [Constant(warmup=0.1), Cosine(warmup=0.1)])
def test_warm_up_rises_linearly(schedule):
    rise = schedule(StepPlan(np.zeros(100)))[:10]
    assert np.diff(rise) == pytest.approx(np.full(9, rise[1] - rise[0]))
    assert rise[1] - rise[0] == pytest.approx(0.1, abs=0.011) and 0 <= rise[0] <= 0.1 + 1e-9


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
def test_cosine_decays_to_its_floor(floor):
    """Half-way down, cos(π/2) = 0 leaves floor + (1 − floor) / 2; one step there is π/2/344 = 0.005."""
    multipliers = Cosine(warmup=0.1, floor=floor)(StepPlan(np.zeros(STEPS)))
    decay = multipliers[39:]
    assert (np.diff(decay) <= 1e-12).all() and decay.min() >= floor - 1e-12
    assert (decay[0], decay[-1]) == pytest.approx((1.0, floor), abs=1e-3)
    assert multipliers[38 + 344 // 2] == pytest.approx(floor + (1 - floor) / 2, abs=0.006)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_stage_is_a_cosine_of_its_own(floor):
    plan = StepPlan(np.zeros(90), stage_starts=(0, 30, 40))
    alone = [Cosine(0.1, floor)(StepPlan(np.zeros(steps))) for steps in (30, 10, 50)]
    assert StagedCosine(0.1, floor)(plan) == pytest.approx(np.concatenate(alone))


@given(st.data())
@settings(max_examples=60)
def test_every_schedule_keeps_its_promises(data):
    shares = np.array(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=60)))
    later = data.draw(st.sets(st.integers(1, max(1, len(shares) - 1)), max_size=4))
    starts = (0, *sorted(start for start in later if start < len(shares)))
    plan = StepPlan(shares, stage_starts=starts)
    warmup, floor = data.draw(st.floats(0, 0.99)), data.draw(st.floats(0, 1))
    for schedule in (Constant(warmup), Cosine(warmup, floor), StagedCosine(warmup, floor)):
        multipliers = schedule(plan)
        assert multipliers.shape == shares.shape and multipliers.sum() > 0
        assert ((multipliers >= 0) & (multipliers <= 1)).all()
        mass = learning_rate_mass(multipliers, shares)
        assert set(mass) == {"lr_mass/preference", "lr_mass/sft"}
        assert sum(mass.values()) == pytest.approx(1)
        assert all(-1e-12 <= value <= 1 + 1e-12 for value in mass.values())


def test_mass_by_hand():
    """SFT gets .5·.5 + .5·1 = .75 of 1 + .5 + .5 = 2."""
    mass = learning_rate_mass(np.array([1.0, 0.5, 0.5]), np.array([0.0, 0.5, 1.0]))
    assert mass == {"lr_mass/preference": 0.625, "lr_mass/sft": 0.375}


def test_epochs_one_after_the_other():
    """The epoch's stages begin anew; an epoch of one stage adds none; what lies beyond the end is cut."""
    staged = [StepPlan(np.array([0.0, 1.0]), (0, 1)), StepPlan(np.array([0.5, 0.5]), (0, 1))]
    plan = StepPlan.of_epochs(staged, 4)
    assert (plan.sft_share.tolist(), plan.stage_starts) == ([0.0, 1.0, 0.5, 0.5], (0, 1, 2, 3))
    assert StepPlan.of_epochs(staged, 3).stage_starts == (0, 1, 2)
    assert StepPlan.of_epochs([StepPlan(np.zeros(3))] * 2, 5).stage_starts == (0,)
