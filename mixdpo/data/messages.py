"""A row -> checked messages; which keys they may have; which prompts count as the same."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from mixdpo.errors import InputError
from mixdpo.storage.identity import hash63

Message = dict[str, str]


_ROLE, _CONTENT, _FROM, _VALUE = (rf"""(?=.*['"]{key}['"]\s*:)""" for key in ("role", "content", "from", "value"))
MESSAGES_AS_TEXT = re.compile(rf"(?s)\s*(?:array\()?\[\s*\{{(?:{_ROLE}{_CONTENT}|{_FROM}{_VALUE})")
"""The start of a list of messages in JSON, or as Python or numpy prints one."""


SHOWN_KEYS = ("name", "tool_call_id")  # a chat template may show them
HARMLESS_KEYS = ("role", "content", *SHOWN_KEYS, "id", "message_id", "timestamp", "created_at", "date", "index")
KNOWN_KEYS = {*HARMLESS_KEYS, "weight", "train", "loss"}


def prompt_texts(prompt: str | Sequence[Message]) -> list[str]:
    """Texts of the messages without surrounding white space. Two prompts with the same texts are the same prompt."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [text.strip() for text in texts]


def split_by_prompt(
    prompts: Iterable[str | Sequence[Message]], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices for (training, validation); all pairs of one prompt land on one side.

    The side is a hash of (prompt, seed) alone, so adding rows moves no other row; `fraction` is met on average.

    Args:
        prompts: texts or message lists.
        fraction: share of the prompts for validation, 0 to 1; 0 leaves validation empty.
        seed: of the split.

    Raises:
        InputError: training is left empty, or validation although the fraction is not 0.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(prompts):
        share = hash63(json.dumps([seed, prompt_texts(prompt)])) / 2**63
        sides[share < fraction].append(index)
    if not sides[0] or (fraction and not sides[1]):
        sizes = f"{len(sides[0])} rows for training and {len(sides[1])} for validation"
        raise InputError(f"data.validation {fraction} leaves {sizes}: change the fraction or the seed.")
    return sides


def parse_messages(row: dict[str, Any], column: str, role: str | None = "assistant") -> list[Message]:
    """The column as messages; a plain string becomes one message of `role`, unless `role` is None.

    A message has `role`, `content` and those of `SHOWN_KEYS` that say something.

    Raises:
        InputError: the value is neither, a text is a list of messages that a table saved as text, or a message has an
            unknown key that says something.
    """
    value = row.get(column)
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": checked_content(value, column)}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{column!r} should be {'text or ' if role else ''}a list of messages, not {value!r:.80}.")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{column!r} holds {message!r:.80}; a message has the keys 'role' and 'content'.")
        if lost := [str(key) for key, held in message.items() if key not in KNOWN_KEYS and something(held)]:
            keys = " and ".join(lost)
            raise InputError(f"{column!r} holds {keys}, which is not read: put it in 'content' or remove the key.")
    return [_message(message, column) for message in value]


def _message(given: dict[str, Any], column: str) -> Message:
    message = {"role": checked_text(given["role"], f"{column}.role")}
    message["content"] = checked_content(given["content"], f"{column}.content")
    shown = [key for key in SHOWN_KEYS if something(given.get(key))]
    return message | {key: checked_text(given[key], f"{column}.{key}") for key in shown}


def something(value: Any, repeated: Collection[str] = ()) -> bool:
    """Whether a value says something: it is not null, NaN or empty, also as text, and no text that is `repeated`."""
    if isinstance(value, str):
        return value.strip() not in {"", "[]", "{}", "nan", "None", *repeated}
    return value == value and value not in (None, [], {})


def checked_content(value: Any, column: str) -> str:
    if MESSAGES_AS_TEXT.match(checked_text(value, column)):
        raise InputError(f"{column!r} is a list of messages saved as text: {value!r:.80}. Save the data as .jsonl.")
    return value


def checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column!r} should be text, not {value!r:.80}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{column!r} holds half a surrogate pair at character {error.start + 1}: remove it.") from None
    return value
