"""The kinds of constraint, and the check of each: a pure, strict test of a text that a program can decide.

Phrasings and allowed combinations are in constraints.json.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of constraint.

    Args:
        check: (stripped text with at least one word, **params) -> whether the constraint holds.
        phrasings: ways to ask for the constraint; `{name}` stands for a parameter.
        aspects: what the constraint fixes in a response; two kinds that share an aspect never come together.
        choices: the values that prompts draw each parameter from.
        weight: how often prompts ask for this kind, relative to others; low where a small model hardly succeeds.
        trained: whether training prompts use this kind; the other kinds measure transfer to kinds never seen.
    """

    check: Callable[..., bool]
    phrasings: Sequence[str]
    aspects: Sequence[str]
    choices: Mapping[str, Sequence[Any]] = {}
    weight: int = 1
    trained: bool = True


def words(text: str) -> list[str]:
    """Pieces between white space that hold a letter or a digit: a lone dash is no word, "well-known" is one."""
    return [piece for piece in text.split() if any(character.isalnum() for character in piece)]


def occurrences(text: str, word: str) -> int:
    """How often `word` stands in `text` as a whole word, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def is_json_object(text: str) -> bool:
    """Whether the whole text is a JSON object with at least one key."""
    try:
        value = json.loads(text, parse_constant=int)  # int refuses NaN and Infinity, which are no JSON
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def is_sentences(text: str, n: int) -> bool:
    """Whether the text has exactly `n` sentence ends, the last one at the end of the text.

    A sentence ends in `.`, `!` or `?` (or several, or closing marks after them) before a space or the text's end.
    """
    ends = re.findall(r"[.!?]+[\"')\]]*(?=\s|$)", text)
    return len(ends) == n and re.search(r"[.!?][\"')\]]*$", text) is not None


def is_numbered_list(text: str, n: int) -> bool:
    """Whether the lines that begin with "<number>." or "<number>)" are numbered 1 to n, in order."""
    numbers = re.findall(r"^[ \t]*(\d+)[.)][ \t]+\S", text, re.MULTILINE)
    return numbers == [str(number) for number in range(1, n + 1)]


CHECKS: dict[str, Callable[..., bool]] = {
    "max_words": lambda text, n: len(words(text)) <= n,
    "min_words": lambda text, n: len(words(text)) >= n,
    "lowercase": lambda text: any(map(str.isalpha, text)) and text == text.lower(),
    "uppercase": lambda text: any(map(str.isalpha, text)) and text == text.upper(),
    "no_commas": lambda text: "," not in text,
    # lines that begin with `-`, `*` or `•`, a space and something more
    "bullets": lambda text, n: len(re.findall(r"^[ \t]*[-*•][ \t]+\S", text, re.MULTILINE)) == n,
    "include_word": lambda text, word: occurrences(text, word) > 0,
    "avoid_word": lambda text, word: occurrences(text, word) == 0,
    # as whole words: "Well" does not start "Wellness"
    "starts_with": lambda text, phrase: re.match(re.escape(phrase) + r"(?![^\W_])", text) is not None,
    "ends_with": lambda text, phrase: text.endswith(phrase),
    "one_sentence": lambda text: "\n" not in text and is_sentences(text, 1),
    "two_sentences": lambda text: is_sentences(text, 2),
    "ends_question": lambda text: text.endswith("?"),
    "has_number": lambda text: re.search(r"\d", text) is not None,
    "no_digits": lambda text: re.search(r"\d", text) is None,
    # in straight double quotes, with no others inside
    "quoted": lambda text: re.fullmatch(r'"[^"]*[^"\s][^"]*"', text) is not None,
    "json_object": is_json_object,
    "numbered_list": is_numbered_list,
    "parentheses": lambda text: re.search(r"\([^()]*\w[^()]*\)", text) is not None,
    "ends_exclamation": lambda text: text.endswith("!"),
    "repeat_word": lambda text, word, n: occurrences(text, word) >= n,
    "titled": lambda text: re.match(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None,
}


TASK: dict[str, Any] = json.loads((files("mixdpo") / "constraints" / "constraints.json").read_text("utf-8"))
"""Requests, subjects, and all fields of each `Kind` but the check. The order of the kinds decides the drawn prompts."""


KINDS = {name: Kind(CHECKS[name], **row) for name, row in TASK["kinds"].items()}
