"""A row -> checked messages; which keys they may have; which prompts count as the same."""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from mixdpo.errors import InputError
from mixdpo.storage.identity import hash63

Message = dict[str, Any]
"""`role`, `content` and, of an assistant's message whose tokens do not weigh 1 in the loss of SFT, `weight` (float)."""


_ROLE, _CONTENT, _FROM, _VALUE = (rf"""(?=.*['"]{key}['"]\s*:)""" for key in ("role", "content", "from", "value"))
MESSAGES_AS_TEXT = re.compile(rf"(?s)\s*(?:array\()?\[\s*\{{(?:{_ROLE}{_CONTENT}|{_FROM}{_VALUE})")
"""The start of a list of messages in JSON, or as Python or numpy prints one."""


SHOWN_KEYS = ("name", "tool_call_id")  # a chat template may show them
MARKS = ("weight", "train", "loss")  # keys by which trainers say how much a message is trained on
KNOWN_KEYS = {"role", "content", *SHOWN_KEYS, *MARKS, "id", "message_id", "timestamp", "created_at", "date", "index"}


def prompt_texts(prompt: str | Sequence[Message]) -> list[str]:
    """Texts of the messages without surrounding white space. Two prompts with the same texts are the same prompt."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [text.strip() for text in texts]


def split_by_prompt(prompts: Iterable[Any], fraction: float, seed: int) -> tuple[list[int], list[int]]:
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
        raise InputError(f"data.validation {fraction} leaves {sizes}: change the fraction")
    return sides


def doubts_about_directions(pairs: Any) -> list[str]:
    """A warning where A over B and B over A occur for one prompt, among pairs of `read_pairs`."""
    columns = map(prompt_texts, pairs["prompt"]), pairs["chosen"], pairs["rejected"]
    keys = [tuple(hash63(json.dumps(text)) for text in texts) for texts in zip(*columns, strict=True)]
    known = set(keys)
    count = sum((prompt, rejected, chosen) in known for prompt, chosen, rejected in keys)
    said = f"{count:,} of {len(pairs):,} pairs occur in both directions, A over B and B over A for one prompt"
    return [f"{said}: keep one direction"] if count else []


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
            raise InputError(f"{column!r} holds {' and '.join(lost)}, not read: put it in 'content' or remove the key.")
    return [_checked(message, column) for message in value]


def unweighted(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _checked(message: dict[str, Any], column: str) -> Message:
    """A message with the `weight` that its marks give.

    Raises:
        InputError: a text is none, a mark has an impossible value, marks contradict each other, or a message of another
            role than the assistant is marked to be trained on.
    """
    texts = {"role": checked_text(message["role"], f"{column}.role")}
    texts["content"] = checked_content(message["content"], f"{column}.content")
    texts |= {key: checked_text(message[key], f"{column}.{key}") for key in SHOWN_KEYS if something(message.get(key))}
    marks = {key: message[key] for key in MARKS if message.get(key) is not None}
    is_weight = {key: key == "weight" and isinstance(mark, int | float) for key, mark in marks.items()}
    valid = [mark in (0, 1) or (is_weight[key] and 1e-6 <= mark <= 1e6) for key, mark in marks.items()]
    is_response, says = texts["role"] == "assistant", {bool(mark) for mark in marks.values()}
    if not all(valid) or len(says) > 1 or (True in says and not is_response):
        rule = "mark only the assistant's, by weight (0, or 1e-6 to 1e6), or by train or loss (true or false)"
        raise InputError(f"{column!r} has a message of role {texts['role']!r} marked {marks!r:.80}: {rule}.")
    weight = float(marks.get("weight", all(marks.values())))
    return texts | {"weight": weight} if weight != 1 and is_response else texts


def something(value: Any, repeated: Collection[str] = ()) -> bool:
    """Whether a value says something: it is not null, NaN or empty, also as text, and no text that is `repeated`."""
    if isinstance(value, str):
        return value.strip() not in {"", "[]", "{}", "nan", "None", *repeated}
    return value == value and value not in (None, [], {})


def checked_content(value: Any, column: str) -> str:
    if MESSAGES_AS_TEXT.match(checked_text(value, column)):
        raise InputError(f"{column!r} is a list of messages saved as text: {value!r:.80}. Save the data as .jsonl.")
    return value


def is_blank(text: str) -> bool:
    """Whether the text shows nothing: white space, and characters without a width such as U+200B."""
    return all(each.isspace() or unicodedata.category(each) in ("Cf", "Cc", "Mn") for each in text)


def without_prompt(row: dict[str, Any], *columns: str) -> tuple[dict[str, Any], str]:
    """The row without nulls, and without the text of its prompt at the beginning of its completions.

    Args:
        columns: the completions. Nothing is cut unless all of them begin with the whole text of `prompt`: a single
            response may repeat a question of its own accord, and a prompt of one word begins many a response.

    Returns:
        The row, and what to count: "prompt_repeated", "prompt_repeated_by_one" (not cut) or "".
    """
    row = without_nulls(row)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or len(prompt.split()) < 2:
        return row, ""
    repeats = [isinstance(row.get(column), str) and row[column].startswith(prompt) for column in columns]
    if not all(repeats):
        return row, "prompt_repeated_by_one" if any(repeats) else ""
    return row | {column: row[column].removeprefix(prompt) for column in columns}, "prompt_repeated"


def checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column!r} should be text, not {value!r:.80}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{column!r} holds half a surrogate pair at character {error.start + 1}: remove it.") from None
    return value


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Null counts as absent: a table, and JSON made of one, has every column in every row."""
    return {column: value for column, value in row.items() if value is not None}


def prompts_of(rows: Any) -> Iterable[Any]:
    """The messages before the first response of each row. Rows with the same prompt land on one side of the split."""
    if "prompt" in rows.column_names:
        return rows["prompt"]
    # one at a time: the rows may exceed memory
    return (messages[: [m["role"] for m in messages].index("assistant")] for messages in rows["messages"])


def refuse_shared_prompts(train: Any, held_out: Any, source: str) -> None:
    """Refuse held-out prompts that are trained on: a metric on such prompts would mean nothing."""
    known = {hash63(str(prompt_texts(prompt))) for prompt in prompts_of(train)}
    if shared := [i for i, prompt in enumerate(prompts_of(held_out)) if hash63(str(prompt_texts(prompt))) in known]:
        share = f"{len(shared)} of {len(held_out)} held-out rows of {source}"
        first = f"have a prompt that is trained on (first: {held_out[shared[0]]['place']})"
        raise InputError(f"{share} {first}: give another data.validation")
