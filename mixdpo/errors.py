"""The errors a user is meant to read: docs/troubleshooting.md says what to do about each."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what, where (file, row, option) and what to do."""


@contextmanager
def located(place: str, remedy: str = "") -> Iterator[None]:
    """An InputError inside the block begins with the place in the user's data, and ends with the remedy."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}{remedy}") from error


class NonFiniteError(ArithmeticError):
    """A loss or gradient became infinite or NaN: the message names step and rows, and the file that has the numbers."""


class Stopped(Exception):
    """A signal ended the run after a whole step. The last checkpoint holds this step.

    Args:
        signal: number of the signal. The exit status is 128 + this number, as for a process that the signal killed.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def nearest(word: str, names: Collection[str]) -> str:
    """The end of a message about an unknown word: "; did you mean 'NAME'?", or nothing if no name is close."""
    longer = sorted(name for name in names if word and name.startswith(word))
    close = get_close_matches(word, longer, 1) or get_close_matches(word, names, 1) or longer
    # a known name is wrong for another reason than its spelling
    return "" if not close or word in names else f"; did you mean {close[0]!r}?"


def check_one_of(what: str, value: Any, names: Collection[str]) -> None:
    """
    Raises:
        InputError: the value is none of the names. The message lists the names and the nearest one.
    """
    if value not in names:
        raise InputError(f"{what} must be one of {', '.join(names)}, not {value!r}{nearest(str(value), names)}")


def choose_one(given: Any, where: str, name: str, default: Any, other: str) -> None:
    """Two fields of a frozen dataclass exclude each other: where both are null, field `name` gets its default.

    Raises:
        InputError: both are given.
    """
    if None not in (values := (getattr(given, name), getattr(given, other))):
        remedy = f"type --{where} '{{{name}: null}}' or '{{{other}: null}}'"
        raise InputError(f"{where}: give {name} or {other}, not both ({values[0]} and {values[1]}): {remedy}")
    if values == (None, None):
        object.__setattr__(given, name, default)
