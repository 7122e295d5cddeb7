"""Checks of a text that a program can decide: each function is a pure, strict test or count."""

import json
import re


def words(text: str) -> list[str]:
    """Pieces between white space that hold a letter or a digit: a lone dash is no word, "well-known" is one."""
    return [piece for piece in text.split() if any(character.isalnum() for character in piece)]


def occurrences(text: str, word: str) -> int:
    """How often `word` stands in `text` as a whole word, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def is_json_object(text: str) -> bool:
    """Whether the whole text is a JSON object with at least one key."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")  # but Python would read it

    try:
        value = json.loads(text, parse_constant=refuse)
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
