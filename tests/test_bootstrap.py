"""Bootstrap intervals: against plain loops, and where they are known."""

import numpy as np
import pytest

from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import Interval, paired_bootstrap, two_way_bootstrap

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
    for before, after in (([1, 2], [1]), ([], []), ([1], [float("nan")])):
        with pytest.raises(InputError):
            paired_bootstrap(before, after)
    for wrong in ([1.0, 2.0], [[]], [[float("nan")]]):
        with pytest.raises(InputError, match="need a table of finite values"):
            two_way_bootstrap(wrong)
