"""Margins from the scores in a data set: chosen minus rejected, one float per pair.

The margin decides which pairs are hard, so a missing or unreadable score is an error, never a default.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from mixdpo.errors import InputError

MarginColumns = tuple[str, ...]
"""One column that holds the margin, or two: chosen and rejected score, or `REWARD_MODEL_COLUMNS`."""
REWARD_MODEL_COLUMNS: MarginColumns = ("all_rm_scores", "all_generated_responses")
KNOWN_COLUMNS: tuple[MarginColumns, ...] = (
    ("margin",),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
    REWARD_MODEL_COLUMNS,
)


def find_margin_columns(
    columns: Iterable[str], named: str | Sequence[str] | None = None, needed: bool = True
) -> MarginColumns:
    """Columns to take the margin from: those `named`, else the first entry of `KNOWN_COLUMNS` that is present.

    Args:
        columns: the columns of the data.
        named: one column that holds the margin, or two names, [chosen_column, rejected_column].
        needed: whether data without a known column is refused; if not, the result is ().

    Raises:
        InputError: more than two columns are named, or no known column is present although one is needed. The reader
            adds file, row and the columns that are present.
    """
    if named is None:
        known = next((known for known in KNOWN_COLUMNS if set(known) <= set(columns)), ())
        if known or not needed:
            return known
        listed = "; ".join(map(" and ".join, KNOWN_COLUMNS))
        ways = "Name yours (data.margin), compute margins (run.py predict) or train without (configs/controls/dpo.yaml)"
        raise InputError(f"no column to take the margin from. Known: {listed}. {ways}.")
    names = (named,) if isinstance(named, str) else tuple(named)
    names = REWARD_MODEL_COLUMNS if names == REWARD_MODEL_COLUMNS[:1] else names
    if len(names) not in (1, 2) or len(set(names)) < len(names):
        raise InputError(f"data.margin takes one column or [chosen_column, rejected_column], not {list(names)}.")
    return names


def row_margin(row: dict[str, Any], columns: MarginColumns) -> float:
    """Margin of one row: the column itself, or score of the chosen minus score of the rejected response.

    Raises:
        InputError: a column is absent or its value is no finite number; the reader adds file and row.
    """
    values = [row.get(column) for column in columns]
    if columns == REWARD_MODEL_COLUMNS:
        # a response that was generated twice can carry two scores: the best chosen and the worst rejected one count
        return max(_scores_of(row, "chosen", *values)) - min(_scores_of(row, "rejected", *values))
    numbers = [_number(value, column) for value, column in zip(values, columns, strict=True)]
    return numbers[0] if len(numbers) == 1 else _number(numbers[0] - numbers[1], " - ".join(columns))


def doubts_about_margins(margins: Any) -> list[str]:
    """A warning where margins, an array (n,), are negative; NaN where there are none."""
    share = (margins < 0).mean()
    said = f"{share * len(margins):,.0f} of {len(margins):,} margins ({share:.0%}) are negative"
    ways = "correct or remove them, or exchange columns that are swapped (data.margin [CHOSEN, REJECTED])"
    return [f"{said} and contradict their label; they count as the hardest: {ways}"] if share else []


def row_weight(row: dict[str, Any], column: str) -> float:
    """Weight of one row in the loss.

    Raises:
        InputError: the column is absent, or its value is no weight; the reader adds file and row.
    """
    weight = _parsed(row.get(column))
    if not (weight == 0 or 1e-6 <= weight <= 1e6):
        says = f"0 or a number from 1e-6 to 1e6, not {row[column]!r:.80}" if column in row else "in each row"
        raise InputError(f"the column {column!r} (data.weight) should be {says}: correct it, or leave the row out.")
    return weight


def _parsed(value: Any) -> float:
    """A float, or NaN where there is none. Strings are parsed, because csv has only strings. A bool is no number."""
    with suppress(TypeError, ValueError, OverflowError):
        return math.nan if isinstance(value, bool) else float(value)
    return math.nan


def _number(value: Any, column: str) -> float:
    if not math.isfinite(number := _parsed(value)):
        raise InputError(f"the margin's column {column!r} should be a finite number, not {value!r:.80}.")
    return number


def _scores_of(row: dict[str, Any], side: str, scores: Any, responses: Any) -> list[float]:
    """The reward model's scores of the chosen or the rejected text, matched by text among all responses."""
    if not isinstance(scores, list) or not isinstance(responses, list) or len(scores) != len(responses):
        raise InputError(f"{' and '.join(REWARD_MODEL_COLUMNS)} should be two lists of the same length.")
    text = row[side] if isinstance(row[side], str) else row[side][-1]["content"]  # `parse_row` has checked it
    own = [score for score, response in zip(scores, responses, strict=True) if response == text]
    if not own:
        raise InputError(f"the {side} text has no score: it is none of the {len(responses)} all_generated_responses.")
    return [_number(score, "all_rm_scores") for score in own]
