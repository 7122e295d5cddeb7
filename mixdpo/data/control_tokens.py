"""Special tokens that stand in a text, such as <|im_end|> in a user's message: plain text, unless asked for."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mixdpo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def control_tokens(tokenizer: "Tokenizer", texts: Iterable[str]) -> set[str]:
    """The tokenizer's special tokens that the texts hold."""
    find = _pattern(tokenizer, len(tokenizer)).findall
    return {token for text in texts for token in find(text)}


@lru_cache(maxsize=8)
def _pattern(tokenizer: "Tokenizer", size: int) -> re.Pattern[str]:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def ids_as_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Token ids of a text in which nothing is a special token.

    Raises:
        InputError: the tokenizer makes a special token even of plain text.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if made := [token for token in control_tokens(tokenizer, [text]) if tokenizer.convert_tokens_to_ids(token) in ids]:
        raise InputError(_unavoidable(", ".join(made)))
    return ids


def chat_ids_as_text(
    tokenizer: "Tokenizer", messages: list[dict[str, str]], template: str, *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of messages through a template, in which only what the template writes becomes a special token.

    Raises:
        InputError: the tokenizer makes a special token even of plain text.
    """
    if tokenizer.chat_control_tokens is None:
        tokenizer.chat_control_tokens = []  # else <think> and the like, no special tokens, would be text as well
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(messages, **options, sanitize_control_tokens=True)["input_ids"]
    except ValueError as error:
        raise InputError(_unavoidable(str(error))) from error


def _unavoidable(what: str) -> str:
    return (
        f"the text holds a special token that this tokenizer cannot read as plain text ({what}): take it out of the "
        "text, or set data.special_tokens_in_text true"
    )
