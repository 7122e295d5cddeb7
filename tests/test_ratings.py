"""The margin of a row, from one column, from two or from the scores of a reward model."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.data.ratings import KNOWN_COLUMNS, REWARD_MODEL_COLUMNS, find_margin_columns, row_margin
from mixdpo.errors import InputError

finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("columns", KNOWN_COLUMNS)
def test_known_columns_are_found(columns):
    assert find_margin_columns(["prompt", "chosen", *columns]) == columns


def test_half_a_score_pair_is_not_enough():
    with pytest.raises(InputError, match=r"no column to take the margin from.*score_chosen and score_rejected"):
        find_margin_columns(["prompt", "chosen_rating"])


@pytest.mark.parametrize(
    ("named", "expected"), [(None, 1.0), ("gap", 3.0), (["gap"], 3.0), (["score_chosen", "score_rejected"], 5.0)]
)
def test_margin_wins_over_scores_and_named_columns_over_both(named, expected):
    row = {"score_chosen": 7.0, "score_rejected": 2.0, "margin": 1.0, "gap": 3.0}
    assert row_margin(row, find_margin_columns(row, named)) == expected


@pytest.mark.parametrize(
    ("named", "message"),
    [("gapp", "no margin column gapp"), (["a", "b", "c"], "one column or"), ([], "one column")],
)
def test_bad_names_are_refused(named, message):
    with pytest.raises(InputError, match=message):
        find_margin_columns(["gap"], named)


@given(finite, finite)
def test_difference_is_chosen_minus_rejected_and_strings_are_parsed(chosen, rejected):
    columns = ("score_chosen", "score_rejected")
    assert row_margin({"score_chosen": chosen, "score_rejected": rejected}, columns) == chosen - rejected
    assert row_margin({"score_chosen": repr(chosen), "score_rejected": f" {rejected!r} "}, columns) == chosen - rejected


@pytest.mark.parametrize(
    "value", ["high", "", None, math.nan, math.inf, "nan", "-inf", True, [1.0], 10**400, Decimal("NaN")]
)
def test_a_value_that_is_no_finite_number_is_refused(value):
    with pytest.raises(InputError, match="'margin' should be a finite number"):
        row_margin({"margin": value}, ("margin",))


def test_decimals_are_numbers():
    assert row_margin({"margin": Decimal("1.5")}, ("margin",)) == 1.5


def test_an_absent_column_and_a_difference_that_overflows_are_refused():
    with pytest.raises(InputError, match="'bad' is missing"):
        row_margin({"good": 1.0}, ("good", "bad"))
    with pytest.raises(InputError, match="good - bad"):
        row_margin({"good": 1e308, "bad": -1e308}, ("good", "bad"))


def reward_model_row(chosen="b", rejected="c", scores=(0.1, 0.5, 0.2)):
    return {
        "chosen": chosen,
        "rejected": rejected,
        "all_generated_responses": ["a", "b", "c"],
        "all_rm_scores": list(scores),
    }


def test_reward_model_scores_are_matched_by_text_or_last_message():
    row = reward_model_row()
    assert find_margin_columns(row) == find_margin_columns(row, "all_rm_scores") == REWARD_MODEL_COLUMNS
    assert row_margin(row, REWARD_MODEL_COLUMNS) == pytest.approx(0.3)  # b 0.5 - c 0.2
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert row_margin(reward_model_row(chosen=turns), REWARD_MODEL_COLUMNS) == pytest.approx(0.3)


def test_a_response_generated_twice_counts_as_best_when_chosen_and_worst_when_rejected():
    row = reward_model_row() | {"all_generated_responses": ["b", "b", "c", "c"], "all_rm_scores": [0.4, 0.5, 0.2, 0.1]}
    assert row_margin(row, REWARD_MODEL_COLUMNS) == pytest.approx(0.4)  # 0.5 - 0.1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (reward_model_row(rejected="z"), "rejected text is none of its 3"),
        (reward_model_row(scores=(0.1, 0.5)), "two lists of one length"),
        (reward_model_row(scores=(0.1, None, 0.2)), "finite number"),
    ],
)
def test_reward_model_faults(row, message):
    with pytest.raises(InputError, match=message):
        row_margin(row, REWARD_MODEL_COLUMNS)
