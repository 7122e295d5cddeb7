"""Read and validate preference pairs: any source, any of the four row forms in, one table of pairs out."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixdpo import margins
from mixdpo.errors import InputError
from mixdpo.tables import Table, checked_text, hash63, read_table, row_id, without_nulls

Message = dict[str, str]
LIST_AS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*['"](role['"]\s*:\s*['"](user|assistant|system)['"]\s*,\s*['"]content|"""
    r"""content['"]\s*:.*['"]role['"]\s*:\s*['"](user|assistant|system)['"]\s*\})""",
    re.DOTALL,
)
IGNORED = ("system", "history")  # columns that other trainers put before the prompt
UNRENDERED = ("tool_calls", "reasoning_content")  # parts of a message beside its content


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


def prompt_texts(prompt: str | Sequence[Message]) -> list[str]:
    """What makes two prompts the same one: the texts of the messages, without the white space around them."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [text.strip() for text in texts]


def split_by_prompt(prompts: Any, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for (training, validation); all pairs of one prompt land on one side.

    The side is a hash of (prompt, seed) alone, so adding rows moves no other row; `fraction` is met on average.

    Args:
        prompts: texts or message lists, or a data set with a `prompt` column.
        fraction: share of the prompts for validation, 0 to 1; 0 leaves validation empty.
        seed: another seed, another split.

    Raises:
        InputError: the fraction is out of range, or leaves training empty, or (when not 0) validation.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the validation fraction should be at least 0 and below 1, not {fraction}.")
    if hasattr(prompts, "column_names"):
        prompts = prompts["prompt"]
    sides: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(prompts):
        share = hash63(json.dumps([seed, prompt_texts(prompt)])) / 2**63
        sides[share < fraction].append(index)
    if not sides[0] or (fraction and not sides[1]):
        raise InputError(
            f"a validation fraction of {fraction} splits {sum(map(len, sides))} pairs into {len(sides[0])} for "
            f"training and {len(sides[1])} for validation: change the fraction or the seed, or give more prompts."
        )
    return sides


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


def parse_messages(row: dict[str, Any], column: str) -> list[Message]:
    """The column as messages; a plain string is one message of the assistant."""
    if column not in row:
        raise InputError(f"the column {column!r} is missing or null.")
    value = row[column]
    if isinstance(value, str):
        return [{"role": "assistant", "content": plain_text(value, column)}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{column!r} should be text or a list of messages, not {value!r:.80}.")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{column!r} holds {message!r:.80}; a message has the keys 'role' and 'content'.")
        if lost := [key for key in UNRENDERED if message.get(key)]:
            raise InputError(
                f"a message of {column!r} has {' and '.join(lost)}, and only 'content' is read: put it in there, or "
                "leave the row out."
            )
    return [{key: checked_text(message[key], f"{column}.{key}") for key in ("role", "content")} for message in value]


def plain_text(value: Any, column: str) -> str:
    """
    Raises:
        InputError: it is no text, or the text is what a table wrote of a list of messages.
    """
    text = checked_text(value, column)
    if LIST_AS_TEXT.match(text):
        raise InputError(
            f"{column!r} is a list of messages that was saved as text: {text!r:.80}. Save the data as .jsonl or "
            ".parquet, in which a list stays one."
        )
    return text


def refuse_ignored(row: dict[str, Any], messages: list[Message]) -> None:
    """
    Raises:
        InputError: a column that is not read says what no message says. What tables write for nothing is nothing.
    """
    said = ["", "[]", "nan", "None", *(message["content"].strip() for message in messages)]
    for column in IGNORED:
        value = row.get(column)
        if value and not (isinstance(value, str) and value.strip() in said):
            raise InputError(
                f"the column {column!r} is not read, and here it holds {value!r:.80}: put it into the prompt, as "
                "messages with roles, or remove the column."
            )


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
            "role 'assistant'. Cut the conversation at the first answer that differs."
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
