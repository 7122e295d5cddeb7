"""Read and validate preference pairs: any source, any of the four row forms in, one table of pairs out."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdpo import margins, sources
from mixdpo.errors import InputError
from mixdpo.sources import Source, open_source

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]


@dataclass(frozen=True)
class Pairs:
    """The usable pairs of one source.

    `dataset` has the columns pair_id (int64, >= 0), prompt (messages, the last one the user's), chosen and rejected
    (str), margin (float64) and row (int64, from 1: the line of a json-lines file, else the record).
    `dropped` counts rows kept out by cause: "empty_prompt", "empty_completion", "identical" (whitespace aside).
    """

    dataset: "Dataset"
    dropped: dict[str, int]
    source: str


def read_pairs(
    source: str, *, split: str = "train", margin: str | Sequence[str] | None = None, limit: int | None = None
) -> Pairs:
    """Read preference pairs from a hub id, a local folder or file, or the built-in task `constraints`.

    Args:
        source: hub id; folder of data files or from `save_to_disk`; .parquet, .json, .jsonl, .csv (the last three also
            with .gz); or `constraints`.
        split: split of a hub data set or folder; a single file has only `train`.
        margin: column that holds the margin, or [chosen_column, rejected_column]; without it, known names are tried.
        limit: stop after this many usable pairs.

    Raises:
        InputError: the source cannot be read, or a row is malformed, scoreless or repeats a pair_id.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit should be at least 1 or absent, not {limit}.")
    opened = open_source(source, split)
    table = _build_table(opened, margin, limit)
    causes = table["drop"]
    kept = [index for index, cause in enumerate(causes) if not cause]
    dropped = dict(Counter(cause for cause in causes if cause))
    if not kept:
        raise InputError(f"{opened.name} has no usable pair ({len(causes)} rows read, kept out: {dropped}).")
    table = table.remove_columns("drop")
    return Pairs(table.select(kept, keep_in_memory=True) if dropped else table, dropped, opened.name)


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
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        share = _hash63(json.dumps([seed, [text.strip() for text in texts]])) / 2**63
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
    chosen, rejected = _conversation(row, "chosen"), _conversation(row, "rejected")
    if "prompt" not in row:
        if isinstance(row["chosen"], str):
            raise InputError(
                "there is no 'prompt', and 'chosen' is one string. Give a 'prompt' column, or message lists "
                "[{'role': …, 'content': …}, …] in 'chosen' and 'rejected' (dialogues as in hh-rlhf must be cut first)."
            )
        prompt = _shared_messages(chosen, rejected)
    elif isinstance(row["prompt"], str):
        text = _text(row["prompt"], "prompt")
        prompt = _shared_messages(chosen, rejected) or [{"role": "user", "content": text}]
        if text.strip() not in (message["content"].strip() for message in prompt):
            raise InputError("'prompt' is no message of the conversation that 'chosen' and 'rejected' share.")
    else:
        prompt = _conversation(row, "prompt")
    if not prompt or prompt[-1]["role"] != "user":
        raise InputError("the prompt, which chosen and rejected must share, should end in a message of role 'user'.")
    return prompt, _completion(chosen, prompt, "chosen"), _completion(rejected, prompt, "rejected")


def _conversation(row: dict[str, Any], column: str) -> list[Message]:
    """The column as messages; a plain string is one message of the assistant."""
    if column not in row:
        raise InputError(f"the column {column!r} is missing.")
    value = row[column]
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text(value, column)}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{column!r} should be text or a list of messages, not {value!r}.")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{column!r} holds {message!r:.80}; a message has the keys 'role' and 'content'.")
    return [{key: _text(message[key], f"{column}.{key}") for key in ("role", "content")} for message in value]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column!r} should be text, not {value!r:.80}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{column!r} holds half a surrogate pair at character {error.start + 1}.") from None
    return value


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


# Table.


def _build_table(source: Source, margin: str | Sequence[str] | None, limit: int | None) -> "Dataset":
    """All rows as a memory-mapped table; what is to be kept out is marked in `drop`, so a cached table counts it too.

    The cache key holds the content of the data and of the code that reads it.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    text, number = Value("string"), Value("int64")
    features = Features(
        {"pair_id": number, "prompt": [{"role": text, "content": text}], "chosen": text, "rejected": text}
        | {"margin": Value("float64"), "row": number, "drop": text}
    )
    code = [Path(module).read_text("utf-8") for module in (__file__, sources.__file__, margins.__file__)]
    spec = margin if margin is None or isinstance(margin, str) else list(margin)
    fingerprint = hashlib.sha256(json.dumps([source.name, source.key, spec, limit, code]).encode()).hexdigest()[:32]
    try:
        return Dataset.from_generator(
            lambda: _table_rows(source, margin, limit), features=features, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def _table_rows(source: Source, margin: str | Sequence[str] | None, limit: int | None) -> Iterator[dict[str, Any]]:
    columns: margins.MarginColumns | None = None
    rows_of_ids: dict[int, int] = {}
    usable = 0
    for number, row in source.rows:
        try:
            columns = columns or margins.find_margin_columns(row, margin)
            record = _record(row, columns, rows_of_ids)
        except InputError as error:
            raise InputError(f"{source.name}, row {number}: {error} Columns present: {', '.join(row)}.") from error
        rows_of_ids[record["pair_id"]] = number
        yield record | {"row": number}
        usable += not record["drop"]
        if usable == limit:
            return
    if columns is None:
        raise InputError(f"{source.name} holds no rows.")


def _record(row: dict[str, Any], columns: margins.MarginColumns, rows_of_ids: dict[int, int]) -> dict[str, Any]:
    prompt, chosen, rejected = parse_row(row)
    pair_id = _pair_id(row, json.dumps([prompt, chosen, rejected]), rows_of_ids)
    drop = _why_unusable(prompt, chosen, rejected)
    # A row that is kept out needs no score.
    margin = math.nan if drop else margins.row_margin(row, columns)
    pair = {"pair_id": pair_id, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | {"margin": margin, "drop": drop}


def _why_unusable(prompt: list[Message], chosen: str, rejected: str) -> str:
    """Why the row is kept out; empty when it is not."""
    if not prompt[-1]["content"].strip():
        return "empty_prompt"
    if not chosen.strip() or not rejected.strip():
        return "empty_completion"
    return "identical" if chosen.strip() == rejected.strip() else ""


def _pair_id(row: dict[str, Any], content: str, rows_of_ids: dict[int, int]) -> int:
    """Hash of the row's pair_id; without one, of its content, where a repeated row gets the next free number."""
    if "pair_id" not in row:
        repeat = 0
        while (pair_id := _hash63(f"{content} {repeat}")) in rows_of_ids:
            repeat += 1
        return pair_id
    name = row["pair_id"]
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise InputError(f"'pair_id' should be text or a whole number, not {name!r}.")
    pair_id = _hash63(_text(str(name), "pair_id"))
    if pair_id in rows_of_ids:
        raise InputError(f"pair_id {name!r} was already given by row {rows_of_ids[pair_id]}; each pair needs its own.")
    return pair_id


def _hash63(text: str) -> int:
    """First 8 bytes of sha256, shifted into a non-negative int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
