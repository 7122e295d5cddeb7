"""Win rates: by hand, against plain loops, and against what AlpacaEval published."""

import csv
import math
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from scipy.special import expit, logit

from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import Interval, paired_bootstrap, two_way_bootstrap
from mixdpo.evaluation.win_rate import (
    read_difficulties,
    read_gamed,
    resampled_length_controlled,
    resampled_win_rates,
    standard_error_of_mean,
)
from mixdpo.signals.compare_margins import spearman

LENGTH_CONTROL = SHARED / "lc"


def comparisons(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random prompts with lengths that matter to the preference."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(1, 3000, size=(2, count))
    difficulty = rng.normal(size=count)
    logits = (ours - theirs) / 2000 + 0.7 * difficulty + rng.normal(size=count)
    return {"preferences": expit(logits), "len_model": ours, "len_baseline": theirs, "difficulty": difficulty}


def win_rates(preferences: Any) -> tuple[float, float]:
    """Win rate and discrete win rate."""
    raw, discrete = resampled_win_rates(preferences, samples=2)
    return raw.mean, discrete.mean


def length_controlled(*columns: Any, **more: Any) -> tuple[float, np.ndarray]:
    """Win rate, and the weights of length, difficulty and bias, of all prompts."""
    weights, rate = resampled_length_controlled(*columns, **more, samples=2)
    return rate.mean, weights


def gamed_baselines(count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    not_gamed = (np.arange(count) % 5 == 4).astype(float)
    return np.column_stack([rng.uniform(size=count), *rng.normal(size=(2, count)), not_gamed])


def test_win_rates_by_hand() -> None:
    preferences = [0.0, 0.2, 0.5, 0.9]
    assert win_rates(preferences) == pytest.approx((40, 37.5))  # a win and half a draw of four
    # squares of the deviations: 0.16 + 0.04 + 0.01 + 0.25 = 0.46; std = √(0.46 / 3); √4 = 2
    assert standard_error_of_mean(preferences) == pytest.approx(50 * math.sqrt(0.46 / 3))
    # a draw is one half up to rounding
    outcomes = {0.5 + 1e-9: 100, 0.5 - 1e-9: 0, 0.5: 50, (0.3 + (1 - 0.3)) / 2: 50, 0.5 - 2**-54: 50}
    assert {p: win_rates([p] * 2)[1] for p in outcomes} == outcomes


def test_two_groups_of_lengths_by_hand() -> None:
    # Δ = ±d, twice each: std = d · √(4/3), so tanh(±t) with t = √¾. With two weights and two groups the fit meets each
    # group's mean: a·t + c = logit ⅘ and -a·t + c = logit ½, so c = ½ · logit ⅘ = ln 2, and σ(ln 2) = ⅔.
    rate, weights = length_controlled([0.7, 0.9, 0.4, 0.6], [100, 300, 500, 700], [150, 350, 450, 650])
    assert rate == pytest.approx(200 / 3)
    assert weights == pytest.approx([math.log(2) / math.tanh(math.sqrt(0.75)), math.log(2)])
    # equal lengths but one pair that cancels: the rate at Δ = 0 is then close to the mean preference's
    rate, weights = length_controlled([0.8, 0.8, 0.8, 0.8], [10, 10, 11, 10], [10, 10, 10, 11])
    assert rate == pytest.approx(80) and weights == pytest.approx([0, logit(0.8)], abs=1e-6)


@pytest.mark.parametrize("with_difficulty", [True, False])
@pytest.mark.parametrize("gamed", [0, 30])
def test_against_a_plain_loop(with_difficulty: bool, gamed: int) -> None:
    data = comparisons(40) | ({} if with_difficulty else {"difficulty": None})
    extra = gamed_baselines(gamed) if gamed else None
    delta = data["len_baseline"] - data["len_model"]
    expected = plain_length_controlled(data["preferences"], delta, data["difficulty"], extra)
    assert length_controlled(**data, gamed=extra)[0] == pytest.approx(expected, abs=1e-5)


def plain_length_controlled(preferences: Any, deltas: Any, difficulty: Any, gamed: np.ndarray | None) -> float:
    """Newton's method in plain loops: an independent reading of the formula."""
    spread, terms = stdev(deltas.tolist()), [0.0] * len(deltas) if difficulty is None else difficulty.tolist()
    rows = [(math.tanh(d / spread), b, 1.0, p, 1.0) for d, b, p in zip(deltas, terms, preferences, strict=True)]
    if gamed is not None:
        theirs = gamed.tolist()  # a row that is not gamed weighs as the model's
        rows += [(math.tanh(d), 0.0 if difficulty is None else b, n, p, 1.0 if n else 0.1) for p, d, b, n in theirs]
    weights = [0.0, 0.0, 0.0]
    for _ in range(30):
        slope, curve = [0.0] * 3, [[1e-12 * (i == j) for j in range(3)] for i in range(3)]
        for *x, p, weight in rows:
            mean = 1 / (1 + math.exp(-sum(w * v for w, v in zip(weights, x, strict=True))))
            for i in range(3):
                slope[i] += weight * (p - mean) * x[i]
                for j in range(3):
                    curve[i][j] += weight * mean * (1 - mean) * x[i] * x[j]
        weights = [w + step for w, step in zip(weights, np.linalg.solve(curve, slope).tolist(), strict=True)]
    return 100 * fmean(1 / (1 + math.exp(-weights[1] * b - weights[2])) for b in terms)


def test_each_resample_is_a_fit_of_its_own() -> None:
    data, gamed = comparisons(25), gamed_baselines(10)
    _, estimate = resampled_length_controlled(**data, gamed=gamed, samples=5, seed=2)
    rng = np.random.default_rng(2)
    for value in estimate.resamples:
        rows = rng.integers(25, size=25)
        drawn = {name: column[rows] for name, column in data.items()}
        assert value == pytest.approx(length_controlled(**drawn, gamed=gamed)[0], abs=1e-4)


def test_a_paired_difference_keeps_prompts_together() -> None:
    one = comparisons(40)
    other = one | {"preferences": np.clip(one["preferences"] - 0.1, 0, 1)}
    a, b = (resampled_win_rates(each["preferences"], samples=500)[0] for each in (one, other))
    expected = paired_bootstrap(100 * other["preferences"], 100 * one["preferences"], samples=500)
    assert ((a - b).mean, (a - b).low, (a - b).high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert (a - b).standard_error < 0.2 * a.standard_error  # what the prompts differ in cancels
    same = resampled_length_controlled(**one, samples=5)[1] - resampled_length_controlled(**one, samples=5)[1]
    assert (same.mean, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("wanted", [{}, {"difficulty": None}])
def test_one_side_has_no_finite_fit(wanted: dict[str, Any]) -> None:
    data = {**comparisons(20), **wanted}
    for preferences in (np.ones(20), np.zeros(20), (data["len_model"] > data["len_baseline"]).astype(float)):
        with pytest.raises(InputError, match=r"no finite solution.*report the win rate alone"):
            length_controlled(**{**data, "preferences": preferences})
    # one soft label on the other side of a limit is enough for length, not for the bias
    hard = np.where(np.arange(20) % 3, 1.0, 0.0)
    assert 0 < length_controlled(**{**data, "preferences": hard})[0] < 100
    with pytest.raises(InputError, match="no finite solution"):
        length_controlled(**{**data, "preferences": np.ones(20)}, gamed=gamed_baselines(4))


def test_what_no_fit_can_use() -> None:
    for columns, message in (
        (([0.4, 0.6, 0.7], [10, 20, 30], [15, 25, 35]), "differ by the same number of characters: report the win"),
        (([0.4, 0.6, 0.7], [10, 20, 30], [15, 20, 35], [1.0, 1.0, 1.0]), r"cannot be told apart.*difficulty out"),
    ):
        with pytest.raises(InputError, match=message):
            length_controlled(*columns)


@pytest.fixture(scope="module")
def leaderboard() -> dict[str, dict[str, float]]:
    """{check model: its row of the published leaderboard}."""
    with (LENGTH_CONTROL / "published_leaderboard.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lc_role"] == "check"]
    names = ("win_rate", "discrete_win_rate", "standard_error", "length_controlled_winrate")
    return {row["model"]: {name: float(row[name]) for name in names} for row in rows}


@pytest.fixture(scope="module")
def annotations() -> dict[str, np.ndarray]:
    """{model: (4, 805) index, preference in [0, 1], characters of the model and of the baseline}."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    with (LENGTH_CONTROL / "annotations.csv").open() as file:
        for row in csv.DictReader(file):
            values = int(row["index"]), float(row["preference"]) - 1, int(row["len_model"]), int(row["len_ref"])
            rows.setdefault(row["model"], []).append(values)
    return {model: np.array(each).T for model, each in rows.items()}


@pytest.mark.shared
def test_published_win_rates_are_met_exactly(leaderboard, annotations) -> None:
    assert len(leaderboard) == 13
    for model, (_, preferences, *_) in annotations.items():
        rates = [*win_rates(preferences), standard_error_of_mean(preferences)]
        assert rates == pytest.approx(list(leaderboard[model].values())[:3], rel=0, abs=1e-9), model


@pytest.mark.shared
def test_published_length_controlled_win_rates_are_met(leaderboard, annotations) -> None:
    """With the gamed rows, and not without them."""
    gamed = read_gamed(str(LENGTH_CONTROL / "df_gamed_reconstructed.csv"))
    path = str(LENGTH_CONTROL / "instruction_difficulty_reconstructed.csv")
    rates: dict[str, list[float]] = {}
    for model, (index, *columns) in annotations.items():
        difficulty = read_difficulties(path, index.astype(int).tolist())
        rates[model] = [length_controlled(*columns, difficulty, extra)[0] for extra in (gamed, None)]
    ours = np.array([rates[model] for model in leaderboard])
    published = np.array([row["length_controlled_winrate"] for row in leaderboard.values()])
    errors = np.abs(ours - published[:, None])
    assert errors[:, 0].max() <= 0.75 and errors[:, 0].mean() <= 0.3, errors
    assert spearman(ours[:, 0], published) >= 0.97
    assert errors[:, 1].mean() == pytest.approx(2.3, abs=0.1)
    assert errors[list(leaderboard).index("gpt4_gamed"), 1] == pytest.approx(15, abs=0.5)


DRAW = np.random.default_rng(3)


def ends(interval: Interval) -> tuple[float, float, float]:
    return interval.low, interval.mean, interval.high


def assert_like_a_loop(interval: Interval, values: np.ndarray, means: list[float]) -> None:
    low, middle, high = ends(interval)
    assert middle == pytest.approx(values.mean())
    # the quantile of 6000 resamples has a standard error of 2 % of the width
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.08 * (high - low))


def test_both_against_a_loop() -> None:
    before, gain = DRAW.uniform(size=40), DRAW.normal(0.2, 0.5, 40)
    means = [sum(gain[i] for i in DRAW.integers(40, size=40)) / 40 for _ in range(6000)]
    assert_like_a_loop(paired_bootstrap(before, before + gain), gain, means)
    values = DRAW.normal(0.2, 1.0, (3, 1)) + DRAW.normal(0, 0.5, (1, 20)) + DRAW.normal(0, 0.3, (3, 20))
    means = []
    for _ in range(6000):
        seeds, prompts = DRAW.integers(3, size=3), DRAW.integers(20, size=20)
        means.append(sum(values[s, p] for s in seeds for p in prompts) / 60)
    assert_like_a_loop(two_way_bootstrap(values, samples=20_000), values, means)


def test_known_intervals() -> None:
    # every item gains exactly 0.5: no spread is left, whatever the items' own spread
    assert ends(paired_bootstrap(np.arange(1000), np.arange(1000) + 0.5)) == (0.5, 0.5, 0.5)
    # both sides are resampled; of two seeds the means are 0, ½, 1 with chances ¼, ½, ¼
    assert ends(two_way_bootstrap([[0.0] * 50, [1.0] * 50])) == (0.0, 0.5, 1.0)
    assert ends(two_way_bootstrap([[0.0, 1.0]] * 40)) == (0.0, 0.5, 1.0)
    assert two_way_bootstrap([[1.0, 2.0]] * 2) == two_way_bootstrap([[1.0, 2.0]] * 2)
    assert f"{Interval(0.5, -0.25, 1):+.1f}" == "+0.5 [-0.2, +1.0]"


def test_p_is_the_level_whose_interval_just_leaves_0_out() -> None:
    for shift in (-0.4, -0.1, 0.0, 0.2, 0.35):
        found = paired_bootstrap(np.zeros(30), np.random.default_rng(8).normal(0, 1, 30) + shift)
        for level in (0.9 * found.p(), min(1.0, 1.1 * found.p())):
            low, high = np.quantile(found.resamples, [level / 2, 1 - level / 2])
            assert (low <= 0 <= high) == (level < found.p() or found.p() == 1), shift
    sure = paired_bootstrap(np.zeros(9), np.ones(9), samples=99)
    assert sure.p() == 2 / 100 and paired_bootstrap(np.ones(9), np.ones(9)).p() == 1


def test_what_they_refuse() -> None:
    for wrong in ([1.0, 2.0], [[]], [[float("nan")]]):
        with pytest.raises(InputError, match="need a table of finite values"):
            two_way_bootstrap(wrong)
