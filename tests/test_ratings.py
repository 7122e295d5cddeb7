"""The margin of a row, from one column, from two or from the scores of a reward model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.data.ratings import KNOWN_COLUMNS, REWARD_MODEL_COLUMNS, find_margin_columns, row_margin

finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("columns", KNOWN_COLUMNS)
def test_known_columns_are_found(columns):
    assert find_margin_columns(["prompt", "chosen", *columns]) == columns


@pytest.mark.parametrize(
    ("named", "expected"), [(None, 1.0), ("gap", 3.0), (["gap"], 3.0), (["score_chosen", "score_rejected"], 5.0)]
)
def test_margin_wins_over_scores_and_named_columns_over_both(named, expected):
    row = {"score_chosen": 7.0, "score_rejected": 2.0, "margin": 1.0, "gap": 3.0}
    assert row_margin(row, find_margin_columns(row, named)) == expected


@given(finite, finite)
def test_difference_is_chosen_minus_rejected_and_strings_are_parsed(chosen, rejected):
    columns = ("score_chosen", "score_rejected")
    assert row_margin({"score_chosen": chosen, "score_rejected": rejected}, columns) == chosen - rejected
    assert row_margin({"score_chosen": repr(chosen), "score_rejected": f" {rejected!r} "}, columns) == chosen - rejected


def reward_model_row(chosen="b", rejected="c", scores=(0.1, 0.5, 0.2)):
    generated = {"all_generated_responses": ["a", "b", "c"], "all_rm_scores": list(scores)}
    return {"chosen": chosen, "rejected": rejected} | generated


def test_reward_model_scores_are_matched_by_text_or_last_message():
    row = reward_model_row()
    assert find_margin_columns(row) == find_margin_columns(row, "all_rm_scores") == REWARD_MODEL_COLUMNS
    assert row_margin(row, REWARD_MODEL_COLUMNS) == pytest.approx(0.3)  # b 0.5 - c 0.2
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert row_margin(reward_model_row(chosen=turns), REWARD_MODEL_COLUMNS) == pytest.approx(0.3)


def test_a_response_generated_twice_counts_as_best_when_chosen_and_worst_when_rejected():
    row = reward_model_row() | {"all_generated_responses": ["b", "b", "c", "c"], "all_rm_scores": [0.4, 0.5, 0.2, 0.1]}
    assert row_margin(row, REWARD_MODEL_COLUMNS) == pytest.approx(0.4)  # 0.5 - 0.1
