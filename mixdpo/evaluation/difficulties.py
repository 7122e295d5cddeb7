"""What AlpacaEval's length control needs beside the verdicts: difficulties of instructions, and gamed baselines."""

import csv
from collections.abc import Sequence

import numpy as np

from mixdpo.errors import InputError
from mixdpo.evaluation.length_control import GamedBaselines
from mixdpo.storage.files import read_text

GAMED = ("preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


_HUB = "AlpacaEval's is in the data set tatsu-lab/alpaca_eval on the Hugging Face hub"


def read_difficulties(path: str, indices: Sequence[int]) -> np.ndarray:
    """(N,) of these prompts.

    Raises:
        InputError: the file cannot be read, lacks one of them, or has two for one.
    """
    found: dict[float, float] = {}
    for number, row in enumerate(_numbers(path, ("index", "instruction_difficulty")), 2):
        if found.setdefault(row["index"], row["instruction_difficulty"]) != row["instruction_difficulty"]:
            raise InputError(f"{path}, line {number}: index {row['index']:g} has another difficulty above: keep one")
    if lacking := [index for index in indices if index not in found]:
        raise InputError(
            f"{path} has no difficulty for {len(lacking)} of the {len(indices)} judged prompts (first: index "
            f"{lacking[0]}): give the file of these instructions; {_HUB}"
        )
    return np.array([found[index] for index in indices])


def read_gamed(path: str) -> GamedBaselines:
    """Rows without a preference are left out, as AlpacaEval does."""
    rows = [row for row in _numbers(path, GAMED) if not np.isnan(row["preference"])]
    columns = [np.array([row[name] for row in rows]) for name in GAMED]
    if not rows or not ((columns[0] >= 0) & (columns[0] <= 1)).all() or not set(columns[3]) <= {0, 1}:
        raise InputError(
            f"{path}: each preference should be from 0 to 1 and not_gamed_baseline True or False, on at least one row; "
            f"{_HUB}"
        )
    return GamedBaselines(*columns)


def _numbers(path: str, names: Sequence[str]) -> list[dict[str, float]]:
    """Columns of a CSV file as numbers: True is 1, an empty preference NaN. A first column without a name is `index`.

    Raises:
        InputError: the file cannot be read, lacks a column, or a value is no finite number.
    """
    header, *rows = list(csv.reader(read_text(path).removeprefix("\ufeff").splitlines())) or [[]]
    header = ["index", *header[1:]] if header[:1] == [""] else header
    if lacking := [name for name in names if name not in header]:
        raise InputError(f"{path} lacks the column {', '.join(lacking)}; it has {', '.join(header)}. {_HUB}")
    words = {"True": 1.0, "False": 0.0}
    found = []
    for number, row in enumerate(rows, 2):
        cells = dict(zip(header, row, strict=False))
        try:
            values = {name: words[cell] if (cell := cells[name]) in words else float(cell or "nan") for name in names}
        except (KeyError, ValueError):
            raise InputError(f"{path}, line {number}: {', '.join(names)} should be numbers, not {cells}") from None
        if any(not np.isfinite(value) for name, value in values.items() if name != "preference"):
            raise InputError(f"{path}, line {number}: a number is missing or not finite ({cells})")
        found.append(values)
    return found
