"""The kinds of constraint: how each is asked for, when it holds, and what it goes together with."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixdpo.constraints.checks import (
    count_bullets,
    is_json_object,
    is_numbered_list,
    is_one_sentence,
    is_quoted,
    is_two_sentences,
    occurrences,
    starts_with,
    words,
)


@dataclass(frozen=True)
class Kind:
    """A kind of constraint.

    Args:
        check: (stripped text with at least one word, **params) -> whether the constraint holds.
        phrasings: ways to ask for it; `{name}` stands for a parameter.
        aspects: what of an answer it fixes; two kinds that share an aspect are never asked for together.
        choices: the values that prompts draw each parameter from.
        weight: how often prompts ask for it, relative to others; low where a small model hardly ever succeeds.
        trained: whether training prompts use it; the others measure transfer to kinds never seen.
    """

    check: Callable[..., bool]
    phrasings: tuple[str, ...]
    aspects: frozenset[str]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    weight: int = 1
    trained: bool = True


def _kind(
    check: Callable[..., bool], *phrasings: str, fixes: str, weight: int = 1, trained: bool = True, **choices: tuple
) -> Kind:
    return Kind(check, phrasings, frozenset(fixes.split()), choices, weight, trained)


_INCLUDED = ("bright", "quiet", "simple", "gentle", "often", "small", "today", "golden", "together", "patience")
_FORBIDDEN = ("the", "and", "very", "of", "it")  # common enough to be in the way; in no phrase asked for below
_OPENINGS = ("Sometimes", "Imagine", "I think", "Yes", "Well", "People", "There")
_ENDINGS = ("Stay curious.", "Good luck.", "Just saying.", "Enjoy!", "Trust me.", "More soon.")

KINDS: dict[str, Kind] = {
    "max_words": _kind(
        lambda text, n: len(words(text)) <= n,
        "Use at most {n} words.",
        "Keep it to {n} words or fewer.",
        "Do not exceed {n} words.",
        fixes="length",
        weight=4,
        n=(8, 10, 12, 15, 20, 25),
    ),
    "min_words": _kind(
        lambda text, n: len(words(text)) >= n,
        "Use at least {n} words.",
        "Write {n} words or more.",
        fixes="length",
        weight=3,
        n=(15, 20, 25, 30),
    ),
    "lowercase": _kind(
        lambda text: any(map(str.isalpha, text)) and text == text.lower(),
        "Write in all lowercase letters.",
        "Do not use capital letters.",
        "Use only lowercase.",
        fixes="case",
    ),
    "uppercase": _kind(
        lambda text: any(map(str.isalpha, text)) and text == text.upper(),
        "Write in ALL CAPS.",
        "Use only capital letters.",
        "Your whole answer must be in uppercase.",
        fixes="case",
    ),
    "no_commas": _kind(
        lambda text: "," not in text,
        "Do not use commas.",
        "Avoid commas.",
        "Use no commas at all.",
        fixes="commas",
        weight=4,
    ),
    "bullets": _kind(
        lambda text, n: count_bullets(text) == n,
        "Answer with exactly {n} bullet points.",
        "Give exactly {n} bullet points, each on a line that starts with a dash.",
        fixes="form start end",
        n=(2, 3, 4),
    ),
    "include_word": _kind(
        lambda text, word: occurrences(text, word) > 0,
        'Include the word "{word}".',
        'Use the word "{word}".',
        'The word "{word}" must appear.',
        fixes="word",
        weight=4,
        word=_INCLUDED,
    ),
    "avoid_word": _kind(
        lambda text, word: occurrences(text, word) == 0,
        'Do not use the word "{word}".',
        'Avoid the word "{word}".',
        'Never say "{word}".',
        fixes="avoided",
        weight=3,
        word=_FORBIDDEN,
    ),
    "starts_with": _kind(
        starts_with,
        'Start with "{phrase}".',
        'Begin your answer with "{phrase}".',
        fixes="start case",
        phrase=_OPENINGS,
    ),
    "ends_with": _kind(
        lambda text, phrase: text.endswith(phrase),
        'End with "{phrase}"',
        'Finish your answer with "{phrase}"',
        fixes="end case sentences",
        phrase=_ENDINGS,
    ),
    "one_sentence": _kind(
        is_one_sentence,
        "Answer in exactly one sentence.",
        "Write a single sentence.",
        "Use one sentence only.",
        fixes="form sentences",
        weight=3,
    ),
    "two_sentences": _kind(
        is_two_sentences,
        "Answer in exactly two sentences.",
        "Write two short sentences.",
        fixes="form sentences",
        weight=2,
    ),
    "ends_question": _kind(
        lambda text: text.endswith("?"),
        "End with a question mark.",
        "Your answer must end with a question.",
        "Finish with a question.",
        fixes="end",
        weight=2,
    ),
    "has_number": _kind(
        lambda text: re.search(r"\d", text) is not None,
        "Include a number in digits.",
        "Mention at least one number, written in digits.",
        fixes="digits",
        weight=3,
    ),
    "no_digits": _kind(
        lambda text: re.search(r"\d", text) is None, "Do not use any digits.", "Use no digits.", fixes="digits"
    ),
    "quoted": _kind(
        is_quoted,
        "Put your whole answer in double quotes.",
        "Wrap the entire answer in double quotation marks.",
        fixes="start end form",
    ),
    "json_object": _kind(
        is_json_object,
        "Answer with a JSON object only.",
        'Reply in JSON, as an object with the key "answer".',
        fixes="form start end case commas sentences",
    ),
    "numbered_list": _kind(
        is_numbered_list,
        "Answer with a numbered list of exactly {n} items.",
        "Give {n} items numbered from 1 to {n}.",
        fixes="form start end digits",
        weight=3,
        n=(2, 3, 4),
    ),
    "parentheses": _kind(
        lambda text: re.search(r"\([^()]*\w[^()]*\)", text) is not None,
        "Put a remark in parentheses.",
        "Include something in (parentheses).",
        fixes="brackets",
        trained=False,
    ),
    "ends_exclamation": _kind(
        lambda text: text.endswith("!"),
        "End with an exclamation mark.",
        "The last character must be an exclamation mark.",
        fixes="end",
        trained=False,
    ),
    "repeat_word": _kind(
        lambda text, word, n: occurrences(text, word) >= n,
        'Use the word "{word}" at least {n} times.',
        'The word "{word}" must appear {n} times or more.',
        fixes="word",
        trained=False,
        word=_INCLUDED,
        n=(2, 3),
    ),
    "titled": _kind(
        lambda text: re.match(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None,
        "Start with a title in double angle brackets, such as <<title>>.",
        "Put a title in <<double angle brackets>> first.",
        fixes="start form",
        trained=False,
    ),
}
