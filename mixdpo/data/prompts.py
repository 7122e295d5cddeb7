"""Rows of prompts, read and checked."""

from itertools import islice

from mixdpo.data.messages import checked_text, parse_messages, refuse_ignored
from mixdpo.data.sources import open_source
from mixdpo.errors import InputError
from mixdpo.storage.files import Row


def read_prompts(source: str, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Prompt rows of a .jsonl file; for `heldout` those held out of the task `constraints`, for `builtin` as many new
    ones of it as `limit` says (default 1000).

    Raises:
        InputError: no such file, no rows, or a row without a non-empty `prompt`.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: need at least 1")
    if source == "builtin":
        from mixdpo.constraints.prompts import training_prompts

        return training_prompts(limit or 1000, seed)
    rows = []
    for number, row in islice(open_source(source, "train").rows, limit):
        try:
            messages = parse_messages(row, "prompt", "user")
            refuse_ignored(row, messages)
            checked_text(row.get("part", ""), "part")
            if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
                raise InputError(
                    "'prompt' should be a text, or messages that end in one of role 'user', and not blank."
                )
        except InputError as error:
            raise InputError(f"{source}, row {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise InputError(f"prompts {source!r}: the file is empty; give one with prompts")
    return rows
