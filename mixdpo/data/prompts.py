"""Rows of prompts, read and checked."""

from itertools import islice

from mixdpo.data.columns import COLUMNS, PROMPT, settle_columns
from mixdpo.data.messages import checked_text, is_blank, parse_messages
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError, located
from mixdpo.storage.files import Row


def read_prompts(source: str, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Prompt rows of a data file. `heldout` names the held-out prompts of the task `constraints`; `builtin` makes
    `limit` new prompts of that task (default 1000).

    Raises:
        InputError: the file is missing or empty, or a row has no `prompt` or a blank one.
    """
    if source == "builtin":
        from mixdpo.constraints.prompts import training_prompts

        return training_prompts(limit or 1000, seed)
    rows = []
    for _, place, row in islice(open_source(source, "train").rows, limit):
        with located(f"{source}, {place}"):
            messages = parse_messages(row, "prompt", "user")
            # a scorer may read any column that is no part of the prompt
            settle_columns(row, [name for name in row if COLUMNS.get(name) != PROMPT], messages)
            checked_text(row.get("part", ""), "part")
            if messages[-1]["role"] != "user" or is_blank(messages[-1]["content"]):
                raise InputError("'prompt' should be text or messages that end with role 'user', and not be blank.")
        rows.append(row)
    if not rows:
        raise InputError(f"{source!r} holds no prompts: give a file with prompts")
    return rows
