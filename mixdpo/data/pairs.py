"""Read and validate preference pairs: any source, any of the four row forms in, one table of pairs out."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixdpo.data import ratings as margins
from mixdpo.data.messages import Message, parse_messages, plain_text, refuse_ignored
from mixdpo.data.table import Table, read_table, row_id, without_nulls
from mixdpo.errors import InputError


def read_pairs(
    source: str,
    *,
    split: str = "train",
    margin: str | Sequence[str] | None = None,
    margin_needed: bool = True,
    limit: int | None = None,
) -> Table:
    """Read preference pairs from a hub id, a local folder or file, or the built-in task `constraints`.

    Args:
        source: hub id; folder of data files or from `save_to_disk`; .parquet, .json, .jsonl, .csv (the last three also
            with .gz); or `constraints`.
        split: split of a hub data set or folder; a single file has only `train`.
        margin: column that holds the margin, or [chosen_column, rejected_column]; without it, known names are tried.
            () takes none: all margins are NaN, to be put in later.
        margin_needed: whether data in which no known name is found is refused; else its margins are NaN.
        limit: stop after this many usable pairs.

    Returns:
        Columns pair_id (int64, >= 0), prompt (messages, the last one the user's), chosen and rejected (str), margin
        (float64) and row; causes "empty_prompt", "empty_completion", "identical" (whitespace aside).

    Raises:
        InputError: the source cannot be read, or a row is malformed, scoreless or repeats a pair_id.
    """
    from datasets import Value

    margin_columns: margins.MarginColumns | None = () if margin == () else None

    def parse(row: dict[str, Any], rows_of_ids: dict[int, int]) -> dict[str, Any]:
        nonlocal margin_columns
        if margin_columns is None:
            margin_columns = margins.find_margin_columns(row, margin, margin_needed)
        return _record(row, margin_columns, rows_of_ids)

    code = [Path(module).read_text("utf-8") for module in (__file__, margins.__file__)]
    spec = margin if margin is None or isinstance(margin, str) else list(margin)
    text = Value("string")
    columns = {"pair_id": Value("int64"), "prompt": [{"role": text, "content": text}], "chosen": text}
    columns |= {"rejected": text, "margin": Value("float64")}
    return read_table(source, split, limit, "pair", parse, columns, key=[spec, margin_needed, *code])


# Rows: four forms -> one.


def parse_row(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    """Prompt messages, chosen and rejected text of a row in standard, conversational, implicit-prompt or mixed form.

    Mixed is UltraFeedback's: a `prompt` string, and conversations that repeat it. A prompt that the completions repeat
    appears once.
    """
    chosen, rejected = parse_messages(row, "chosen"), parse_messages(row, "rejected")
    if "prompt" not in row:
        if isinstance(row["chosen"], str):
            raise InputError(
                "there is no 'prompt', or it is null, and 'chosen' is one string. Give a 'prompt' column, or message "
                "lists [{'role': …, 'content': …}, …] in 'chosen' and 'rejected' (dialogues as in hh-rlhf must be cut "
                "first)."
            )
        prompt = _shared_messages(chosen, rejected)
    elif isinstance(row["prompt"], str):
        text = plain_text(row["prompt"], "prompt")
        prompt = _shared_messages(chosen, rejected) or [{"role": "user", "content": text}]
        if text.strip() not in (message["content"].strip() for message in prompt):
            raise InputError("'prompt' is no message of the conversation that 'chosen' and 'rejected' share.")
    else:
        prompt = parse_messages(row, "prompt")
    if not prompt or prompt[-1]["role"] != "user":
        raise InputError("the prompt, which chosen and rejected must share, should end in a message of role 'user'.")
    refuse_ignored(row, prompt)
    return prompt, _completion(chosen, prompt, "chosen"), _completion(rejected, prompt, "rejected")


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Longest common prefix of two conversations, short of the last message of each."""
    shared = []
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared.append(one)
    return shared


def _completion(conversation: list[Message], prompt: list[Message], column: str) -> str:
    rest = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in rest)
        raise InputError(
            f"{column!r} has the messages ({roles}) after the shared prompt of {len(prompt)}; it should have one, of "
            "role 'assistant'. Cut the conversation at the first response that differs."
        )
    return rest[0]["content"]


def _record(row: dict[str, Any], columns: margins.MarginColumns, rows_of_ids: dict[int, int]) -> dict[str, Any]:
    present = without_nulls(row)  # but a margin of null is no margin that is absent
    prompt, chosen, rejected = parse_row(present)
    pair_id = row_id(present, "pair_id", json.dumps([prompt, chosen, rejected]), rows_of_ids)
    drop = _why_unusable(prompt, chosen, rejected)
    # A row that is kept out needs no score.
    margin = math.nan if drop or not columns else margins.row_margin(row, columns)
    pair = {"pair_id": pair_id, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | {"margin": margin, "drop": drop}


def _why_unusable(prompt: list[Message], chosen: str, rejected: str) -> str:
    """Why the row is kept out; empty when it is not."""
    if not prompt[-1]["content"].strip():
        return "empty_prompt"
    if not chosen.strip() or not rejected.strip():
        return "empty_completion"
    return "identical" if chosen.strip() == rejected.strip() else ""
