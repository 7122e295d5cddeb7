"""Routes: which pairs are hard, in which order, in which stages; by margins and pair ids alone."""

import json
import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdpo.errors import InputError
from mixdpo.routing.route import RANDOM_ORDERS, Assignment, EasyAction, HardAction, Order, Routing
from mixdpo.routing.schedules import Constant, Cosine, StagedCosine, StepPlan, learning_rate_mass

FEW_MARGINS = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.5])  # few values: ties everywhere
PAIR_IDS = st.integers(-(2**63), 2**63 - 1)
fast = settings(max_examples=60)


def plan_route(margins, pair_ids, *, seed=0, **options):
    return Routing(**options).plan(margins, pair_ids, seed=seed)


@st.composite
def pairs(draw, margin=FEW_MARGINS, unique_margins=False):
    margins = draw(st.lists(margin, min_size=1, max_size=40, unique=unique_margins))
    ids = draw(st.lists(PAIR_IDS, min_size=len(margins), max_size=len(margins), unique=True))
    return np.array(margins), np.array(ids, dtype=np.int64)


thresholds = st.sampled_from([-2.0, 0.0, 0.25, 0.5, 1.0, 9.0])
options = st.fixed_dictionaries({"hard_fraction": st.floats(0, 1)}) | st.fixed_dictionaries({"threshold": thresholds})


def test_the_threshold_is_strict():
    margins = np.array([0.5, 0.0, 0.49, 1.0, -2.0, 0.5])
    route = plan_route(margins, np.arange(6), threshold=0.5)
    assert route.is_hard.tolist() == [False, True, True, False, True, False]
    assert route.is_hard.dtype == bool and route.threshold == 0.5


@pytest.mark.parametrize("order", ["easy_to_hard", "shuffled"])
def test_another_seed_is_another_plan(order):
    def plan(seed):
        route = plan_route(np.repeat([0.0, 1.0], 32), np.arange(64), hard_fraction=0.25, order=order, seed=seed)
        return route.order.tolist(), route.is_hard.tolist(), route.fingerprint()

    assert all(same != different for same, different in zip(plan(3), plan(4), strict=True))


@given(pairs(st.floats(-1e6, 1e6), unique_margins=True), st.floats(0, 1))
@fast
def test_without_a_split_tie_the_threshold_repeats_the_cut(data, fraction):
    margins, ids = data
    route = plan_route(margins, ids, hard_fraction=fraction)
    assert (margins < route.threshold).tolist() == route.is_hard.tolist()
    if not route.is_hard.all():
        assert route.threshold == margins[~route.is_hard].min()


def test_summary_by_hand():
    route = plan_route(np.array([4.0, 1.0, 0.0, 1.0, 2.0]), np.arange(5), hard_fraction=0.4)
    summary = json.loads(json.dumps(route.summary(), allow_nan=False))
    quantiles = summary.pop("margin_quantiles")
    assert [quantiles[q] for q in ("0%", "25%", "50%", "75%", "100%")] == [0.0, 1.0, 1.0, 2.0, 4.0]
    by_route = summary.pop("margins_every_5%")
    assert {kind: quantiles[::10] for kind, quantiles in by_route.items()} == {"easy": [1, 2, 4], "hard": [0, 0.5, 1]}
    expected = {"pairs": 5, "hard": 2, "hard_fraction": 0.4, "threshold": 1.0, "trained": 5, "coverage": 1, "sft": 2}
    expected |= {"ties_at_threshold": 2, "hard_at_threshold": 1, "order": "easy_to_hard", "assignment": "margin"}
    assert summary == expected | {"hard_action": "sft", "easy_action": "preference"}


def test_the_fingerprint_tells_routes_orders_and_actions_apart():
    margins, ids = np.arange(10.0), np.arange(10)
    others = [{"threshold": 4.0}, {"threshold": 3.0, "order": "shuffled"}]
    actions = [(action, 1.0 if action == "blend" else None) for action in get_args(HardAction)]
    others += [{"threshold": 3.0, "hard_action": action, "blend_width": width} for action, width in actions]
    routes = [plan_route(margins, ids, **option).fingerprint() for option in others]
    routes.append(plan_route(margins[::-1].copy(), ids, threshold=3.0).fingerprint())
    assert len(set(routes)) == len(routes)
    assert routes[2] == plan_route(margins, ids, threshold=3.0, hard_action="sft").fingerprint()


def test_threshold_and_fraction_stand_alone():
    """12 % of the pairs are hard if neither is given, also where both are null."""
    assert Routing() == Routing(threshold=None, hard_fraction=None) == Routing(hard_fraction=0.12)
    assert Routing(threshold=1.0) == Routing(threshold=1.0, hard_fraction=None)
    margins, ids = np.arange(50.0), np.arange(50)
    assert Routing(threshold=9.5).plan(margins, ids).is_hard.sum() == 10
    assert Routing().plan(margins, ids).is_hard.sum() == 6


def routings(**fixed):
    """Any `Routing` but blends (`test_blend.py`) and those that train nothing."""
    kinds = {"order": Order, "assignment": Assignment, "hard_action": HardAction, "easy_action": EasyAction}
    free = {name: st.sampled_from([value for value in get_args(k) if value != "blend"]) for name, k in kinds.items()}
    free["buckets"] = st.integers(2, 5)
    chosen = st.fixed_dictionaries(free | {name: st.just(value) for name, value in fixed.items()})
    return st.builds(lambda size, rest: size | rest, options, chosen).filter(
        lambda o: not o["hard_action"] == o["easy_action"] == "drop"
    )


def planned(margins, ids, **option):
    """The route, or None where the routing rightly says that there is too little to train."""
    try:
        return plan_route(margins, ids, **option)
    except InputError as error:
        all_of_them = {"order": "shuffled", "hard_action": "sft", "easy_action": "preference"}
        is_hard = plan_route(margins, ids, **option | all_of_them).is_hard
        hard, easy = is_hard.sum(), (~is_hard).sum()
        trained = hard * (option["hard_action"] != "drop") + easy * (option["easy_action"] != "drop")
        assert trained < (option["buckets"] if option["order"] in ("bucketed", "paced") else 1), error
        return None


@given(pairs(), routings(), st.integers(0, 5), st.booleans())
@fast
def test_every_plan_is_a_partition_with_exact_counts(data, option, seed, reshuffle):
    margins, ids = data
    option["reshuffle"] = reshuffle and option["order"] in RANDOM_ORDERS
    if (route := planned(margins, ids, seed=seed, **option)) is None:
        return
    below = (margins < option.get("threshold", 0)).sum()
    assert route.is_hard.sum() == (below if "threshold" in option else round(option["hard_fraction"] * len(ids)))
    trained = np.full(len(ids), True)
    trained[route.is_hard] = option["hard_action"] != "drop"
    trained[~route.is_hard] &= option["easy_action"] != "drop"
    for epoch in (0, 7):
        order, known = sorted(route.epoch_order(epoch).tolist()), np.flatnonzero(trained).tolist()
        assert order == known or (option["order"] == "paced" and len(order) == len(known) and {*order} <= {*known})
        assert route.epoch_order(epoch).dtype == np.int64
        assert np.array_equal(route.epoch_order(epoch), route.order) or option["reshuffle"]
    by_sft = option["hard_action"] in ("sft", "sft_rejected", "sft_both")
    assert route.is_sft.tolist() == (route.is_hard & by_sft).tolist()
    assert route.is_hard.shape == route.margins.shape == margins.shape and route.stages.shape == route.order.shape
    assert route.stages[0] == 0 and set(np.diff(route.stages)) <= {0, 1}
    assert json.loads(json.dumps(summary := route.summary(), allow_nan=False)) == summary
    assert summary["trained"] == len({*route.order.tolist()}) == summary["coverage"] * len(route.order)


@given(pairs(), routings(), st.integers(0, 5), st.randoms(use_true_random=False))
@fast
def test_no_plan_depends_on_the_rows_and_one_seed_is_one_plan(data, option, seed, random):
    margins, ids = data
    rows = list(range(len(ids)))
    random.shuffle(rows)
    option["reshuffle"] = option["order"] in RANDOM_ORDERS
    if (first := planned(margins, ids, seed=seed, **option)) is None:
        return
    second = plan_route(margins[rows], ids[rows], seed=seed, **option)
    for epoch in (0, 1, 5):
        assert ids[first.epoch_order(epoch)].tolist() == ids[rows][second.epoch_order(epoch)].tolist()
    assert set(ids[first.is_hard]) == set(ids[rows][second.is_hard])
    assert first.stages.tolist() == second.stages.tolist() and first.threshold == second.threshold
    assert plan_route(margins, ids, seed=seed, **option).fingerprint() == first.fingerprint()


@given(pairs(), options, st.sampled_from(get_args(Assignment)), st.integers(0, 5))
@fast
def test_sorted_orders_are_monotone(data, option, assignment, seed):
    margins, ids = data
    option = option | {"assignment": assignment}

    def margins_by(order, of=None):
        route = plan_route(margins, ids, order=order, seed=seed, **option)
        kept = route.order if of is None else route.order[route.is_hard[route.order] == of]
        return margins[kept], route.is_hard[route.order]

    assert (np.diff(margins_by("easy_to_hard")[0]) <= 0).all()
    assert (np.diff(margins_by("hard_to_easy")[0]) >= 0).all()
    for order in ("preference_first", "sft_first", "interleaved"):
        for of in (True, False):
            assert (np.diff(margins_by(order, of)[0]) <= 0).all()
    flags = sorted(margins_by("easy_to_hard")[1].tolist())
    assert margins_by("preference_first")[1].tolist() == flags
    assert margins_by("sft_first")[1].tolist() == flags[::-1]
    if assignment == "margin":
        for order, turned in (("easy_to_hard", flags), ("hard_to_easy", flags[::-1])):
            route = plan_route(margins, ids, order=order, seed=seed, **option)
            assert route.is_hard[route.order].tolist() == turned
            assert route.stages.tolist() == [int(flag != turned[0]) for flag in turned]


@given(pairs(), st.floats(0, 1), st.integers(0, 5))
@fast
def test_any_window_of_interleaved_has_its_share_of_hard_pairs(data, fraction, seed):
    """⌊wH/N⌋ or ⌈wH/N⌉ in each window of w pairs: never one pair off the expectation."""
    margins, ids = data
    route = plan_route(margins, ids, hard_fraction=fraction, order="interleaved", seed=seed)
    hard, count = route.is_hard[route.order], len(ids)
    before = np.concatenate([[0], np.cumsum(hard)])
    for width in range(1, count + 1):
        found = before[width:] - before[:-width]
        assert (np.abs(found * count - width * hard.sum()) < count).all()
    assert route.stages.tolist() == [0] * count


@given(pairs(), st.integers(2, 6), st.booleans())
@fast
def test_buckets_are_quantiles_and_keep_their_pairs_when_reshuffled(data, buckets, reshuffle):
    margins, ids = data
    option = {"hard_fraction": 0.3, "order": "bucketed", "buckets": buckets, "reshuffle": reshuffle}
    if len(ids) < buckets:
        with pytest.raises(InputError, match="needs"):
            plan_route(margins, ids, **option)
        return
    route = plan_route(margins, ids, **option)
    sizes = np.bincount(route.stages, minlength=buckets)
    assert len(sizes) == buckets and sizes.max() - sizes.min() <= 1
    for epoch in (0, 1, 2):
        order = route.epoch_order(epoch)
        for bucket in range(1, buckets):
            assert margins[order[route.stages == bucket]].max() <= margins[order[route.stages == bucket - 1]].min()
            assert set(order[route.stages == bucket]) == set(route.order[route.stages == bucket])


@given(pairs(), st.integers(1, 5), st.integers(0, 5), st.booleans())
@fast
def test_paced_draws_only_from_the_open_ranks_of_its_stage(data, buckets, seed, reshuffle):
    """Place k of a stage's n holds one of its pairs whose rank, the share of easier ones, is at most c."""
    margins, ids = data
    if len(ids) < buckets:
        return
    easy_to_hard = plan_route(margins, ids, hard_fraction=0.3, seed=seed).order.tolist()
    option = {"hard_fraction": 0.3, "buckets": buckets, "seed": seed}
    route = plan_route(margins, ids, order="paced", reshuffle=reshuffle, **option)
    assert route.stages.tolist() == plan_route(margins, ids, order="bucketed", **option).stages.tolist()
    for epoch in (0, 1, 3):
        drawn, start = route.epoch_order(epoch).tolist(), 0
        for size in np.bincount(route.stages).tolist():
            for k in range(size):
                competence = math.sqrt((1 - 0.01**2) * k / size + 0.01**2)
                stage = easy_to_hard[start : start + size]
                assert drawn[start + k] in [pair for i, pair in enumerate(stage) if i / size <= competence + 1e-12]
            start += size


def test_paced_draws_evenly_and_reports_its_coverage():
    """Of 6 pairs place k opens ⌊6 c⌋ + 1: 1, 3, 4, 5, 5, 6. Of 3,000 draws each of n has 3,000 / n ± 5 sd."""
    routes = [plan_route(-np.arange(6.0), np.arange(6), order="paced", buckets=1, seed=seed) for seed in range(3000)]
    for k, is_open in enumerate((1, 3, 4, 5, 5, 6)):
        drawn, share = Counter(int(route.order[k]) for route in routes), 1 / is_open
        assert sorted(drawn) == list(range(is_open))
        assert all(abs(n - 3000 * share) <= 5 * math.sqrt(3000 * share * (1 - share)) for n in drawn.values()), drawn
    coverage = {route.summary()["coverage"] for route in routes}
    assert coverage == {len({*route.order.tolist()}) / 6 for route in routes} and min(coverage) < 0.5 < max(coverage)


def test_reshuffling_draws_each_epoch_anew():
    margins, ids = np.repeat([0.0, 1.0], 32), np.arange(64)
    for order in RANDOM_ORDERS:
        fixed = plan_route(margins, ids, hard_fraction=0.25, order=order, seed=1)
        anew = plan_route(margins, ids, hard_fraction=0.25, order=order, seed=1, reshuffle=True)
        assert anew.order.tolist() == fixed.order.tolist()
        assert len({tuple(anew.epoch_order(epoch).tolist()) for epoch in range(5)}) == 5
        assert {tuple(fixed.epoch_order(epoch).tolist()) for epoch in range(5)} == {tuple(fixed.order.tolist())}
        assert anew.fingerprint() != fixed.fingerprint()


@pytest.mark.parametrize("assignment", ["random", "margin"])
def test_random_assignment_is_random(assignment):
    """And so is the split of ties. Each of 40 tied pairs should be hard in a quarter of 200 seeds; 20 to 80 is 4.9
    standard deviations wide. And no shuffle may repeat the draw: 10 hard places of 40 lie on average in the middle."""
    option = {"hard_fraction": 0.25, "assignment": assignment, "order": "shuffled"}
    routes = [plan_route(np.zeros(40), np.arange(40), seed=seed, **option) for seed in range(200)]
    counts = sum(route.is_hard.astype(int) for route in routes)
    assert counts.sum() == 2000 and counts.min() >= 20 and counts.max() <= 80
    places = [np.flatnonzero(route.is_hard[route.order]) for route in routes]
    # one place has a standard deviation of 11.5, the mean of 200 × 10 of them .26
    assert np.mean(places) == pytest.approx(19.5, abs=1.5)


def test_inverted_takes_the_largest_margins_and_keeps_the_threshold():
    for option in ({"threshold": 3.0}, {"hard_fraction": 0.3}):
        route = plan_route(np.arange(10.0), np.arange(10), assignment="inverted", **option)
        assert np.flatnonzero(route.is_hard).tolist() == [7, 8, 9]
        assert route.threshold == 3.0  # what validation reports stays comparable


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
