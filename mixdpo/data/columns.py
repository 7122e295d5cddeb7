"""Columns beside the texts of a row: handed to the chat template, refused, or named once."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from mixdpo.data.messages import Message, checked_text, something, without_nulls
from mixdpo.data.ratings import KNOWN_COLUMNS
from mixdpo.errors import InputError, check_one_of, nearest

SHOWN: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}  # columns that the chat template gets
PROMPT = "put its text into a message, or remove the column"
LOSS = "mark responses by 'weight', 'train' or 'loss' in their messages instead, and remove the column"
COLUMNS = {
    **dict.fromkeys(("system", "system_prompt", "history", "input", "document", "documents"), PROMPT),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), PROMPT),
    **dict.fromkeys(("label", "kto_tag"), "keep the rows that are to be imitated, and remove the column"),
    **dict.fromkeys(("labels", "input_ids", "completion_mask", "assistant_masks", "loss_mask"), LOSS),
    **dict.fromkeys(("weight", "weights", "sample_weight"), f"{LOSS} (or, for pairs, name it by data.weight)"),
    **dict.fromkeys(("chosen_weight", "rejected_weight"), LOSS),
}
"""Columns that other trainers give a meaning, and what to do. A form may read one, as Alpaca's reads `input`."""

FORMS: dict[str, list[tuple[str, ...]]] = {"pair": [("prompt", "chosen", "rejected")]}
FORMS["sample"] = [("messages",), ("prompt", "completion"), ("instruction", "output", "input")]
"""Columns that a row must have, of one of these forms; `input` may be absent."""
OPTIONAL = {"pair": ("pair_id", *chain(*KNOWN_COLUMNS)), "sample": ("sample_id", "id", "source")}
ALIKE = {"prompt": "instruction question query input user", "messages": "conversations conversation chat dialogue"}
ALIKE |= {"chosen": "better preferred accepted winner", "rejected": "worse dispreferred loser"}
ALIKE |= {"completion": "response answer output", "output": "response answer completion"}
"""Words in other people's names for these columns, the likeliest first."""


def our_columns(columns: Mapping[str, str] | None, noun: str) -> dict[str, str]:
    """`data.columns`, checked: our name -> the file's.

    Raises:
        InputError: a name is not ours.
    """
    for name in (columns := dict(columns or {})):
        check_one_of("data.columns: a name before a colon", name, (*chain(*FORMS[noun]), *OPTIONAL[noun], *SHOWN))
    return columns


def renamed(rows: Iterator[Any], columns: Mapping[str, str], source: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Rows under our names. What the file has under such a name itself becomes "file's NAME".

    Raises:
        InputError: the first row lacks a column that `columns` names.
    """
    for index, (number, place, row) in enumerate(rows):
        if index == 0 and (absent := [name for name in columns.values() if name not in row]):
            present = f"columns present: {', '.join(row)}{nearest(absent[0], row)}"
            raise InputError(f"{source}, {place}: data.columns names {absent[0]!r}, which is not there; {present}")
        kept = {f"file's {n}" if n in columns else n: value for n, value in row.items() if n not in columns.values()}
        yield number, place, kept | {name: row[other] for name, other in columns.items() if other in row}


def suggestion(row: dict[str, Any], noun: str) -> str:
    """The end of an error about a row that lacks columns of its form: the option that names others, or nothing."""
    present = {*row, "input"} | ({"prompt"} if isinstance(row.get("chosen"), list) else set())  # or the chats share it
    lacking = [[name for name in form if name not in present] for form in FORMS[noun]]
    if [] in lacking:
        return ""
    texts = [name for name, value in row.items() if isinstance(value, str | list)]
    found = {ours: [t for word in words.split() for t in texts if word in t.lower()] for ours, words in ALIKE.items()}
    likeliest = max(lacking, key=lambda names: sum(1 if found.get(name) else -1 for name in names))
    named = ", ".join(f"{name}: {[*found.get(name, ()), 'COLUMN'][0]}" for name in likeliest)
    return f" If columns have other names here: --data.columns '{{{named}}}'"


def template_values(row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template gets beside the messages: `tools`, and the values of `chat_template_kwargs`.

    Raises:
        InputError: a column is of another type, or both give `tools`.
    """
    tools, values = (_parsed(row.get(column), column, kind) for column, kind in SHOWN.items())
    if tools and "tools" in values:
        raise InputError("'tools' and 'chat_template_kwargs' both give tools: remove one.")
    return values | ({"tools": tools} if tools else {})


def _parsed(value: Any, column: str, kind: Any) -> Any:
    """The value, or what its JSON text says. Null counts as absent in it too: a table has every key in every row."""
    if not something(value):
        return kind()
    try:
        value = json.loads(value if isinstance(value, str) else json.dumps(value), object_hook=without_nulls)
        checked_text(json.dumps(value, ensure_ascii=False), column)
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, kind) or (kind is list and not all(isinstance(each, dict) for each in value)):
        form = "a list of schemas" if kind is list else "a mapping"
        raise InputError(f"{column!r} should be {form}, or the JSON text of one.")
    return value


def settle_columns(row: dict[str, Any], read: Collection[str], messages: Sequence[Message]) -> dict[str, str]:
    """What a record keeps of the columns that its form does not read.

    Returns:
        `context`: JSON of `values`, those of `template_values`, and of `keys`, a mapping for each message of its keys
        beside role and content; each only if not empty, and "" for neither.
        `unread`: JSON list of the columns that say something and are not read.

    Raises:
        InputError: a column of `COLUMNS` says something that no message repeats.
    """
    texts = {message["content"].strip() for message in messages}
    unread = [name for name, value in row.items() if name not in {*read, *SHOWN} and something(value, texts)]
    if name := next((name for name in unread if name in COLUMNS), None):
        raise InputError(f"the column {name!r} is not read ({row[name]!r:.80}): {COLUMNS[name]}.")
    keys = [{key: text for key, text in message.items() if key not in ("role", "content")} for message in messages]
    values = template_values(row)
    context = ({"values": values} if values else {}) | ({"keys": keys} if any(keys) else {})
    return {"context": json.dumps(context) if context else "", "unread": json.dumps(unread)}
