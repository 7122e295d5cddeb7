"""Read and check preference pairs: any source, any of the four row forms in, one table of pairs out."""

import math
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

from mixdpo.data.columns import settle_columns
from mixdpo.data.messages import Message, is_blank, parse_messages, unweighted, without_prompt
from mixdpo.data.ratings import MarginColumns, find_margin_columns, row_margin, row_weight
from mixdpo.data.sources import Origin
from mixdpo.data.table import Table, read_table, row_id
from mixdpo.errors import InputError


def read_pairs(
    source: Any,
    *,
    split: str = "train",
    margin: str | Sequence[str] | None = None,
    margin_needed: bool = True,
    weight: str | None = None,
    limit: int | None = None,
) -> Table:
    """Read preference pairs from a hub id, a local folder or file, or the built-in task `constraints`.

    Args:
        source: hub id; folder of data files; .parquet, .json, .jsonl, .csv (the last three also
            with .gz); `constraints`; in Python also a list of rows or a `datasets.Dataset`; or a list of such sources;
            or an `Origin`, which names columns.
        split: split of a hub data set or folder, or a slice such as train[:9]; a single file has only `train`.
        margin: column that holds the margin, or [chosen_column, rejected_column]; without it, known names are tried.
            () reads no margin: all margins are NaN until a margins file replaces them.
        margin_needed: whether data without a known margin column is refused; if not, the margins are NaN.
        weight: column that holds the weight of a pair in the loss; without it there is no such weight.
        limit: stop after this many usable pairs.

    Returns:
        Columns pair_id (int64, >= 0), prompt (messages, the last one the user's), chosen and rejected (str),
        chosen_weight (float32, of the chosen response in SFT, 1 unless a mark in its message says otherwise), margin
        (float64), with `weight` pair_weight (float32, above 0), and row; causes "empty_prompt", "empty_completion",
        "identical" (whitespace aside), "weight_0"; noted "prompt_repeated" (cut from both responses),
        "prompt_repeated_by_one".

    Raises:
        InputError: the source cannot be read, or a row is malformed, scoreless or repeats a pair_id, or in more than a
            fifth of the pairs one response begins with the prompt, and the other does not.
    """
    margin_columns: MarginColumns | None = () if margin == () else None

    def parse(row: dict[str, Any], earlier: Collection[int]) -> list[dict[str, Any]]:
        nonlocal margin_columns
        if margin_columns is None:  # of the first row: a later row without them is refused
            margin_columns = find_margin_columns(row, margin, margin_needed)
        return [_record(row, margin_columns, weight, earlier)]

    columns = {"pair_id": "int64", "prompt": "messages", "chosen": "string", "rejected": "string"}
    columns |= {"chosen_weight": "float32", "margin": "float64"} | ({"pair_weight": "float32"} if weight else {})
    table = read_table(source, split, limit, "pair", parse, columns, key=[margin, margin_needed, weight])
    if (count := table.noted.get("prompt_repeated_by_one", 0)) > 0.2 * len(table.dataset):
        where = f"{source if isinstance(source, Origin) else Origin(source)}: in {count} of {len(table.dataset)} pairs"
        raise InputError(f"{where} one response begins with the prompt, one does not: take the prompt out of both.")
    return table


def parse_row(row: dict[str, Any]) -> tuple[list[Message], Message, Message, float]:
    """Prompt messages, chosen and rejected response, and the chosen response's weight in SFT.

    A row has standard, conversational, implicit-prompt or mixed form. Mixed is UltraFeedback's: a `prompt` string,
    and conversations that repeat it. A prompt that the responses repeat appears once.
    """
    sides = [parse_messages(row, column) for column in ("chosen", "rejected")]
    weight, other = (side[-1].get("weight", 1.0) for side in sides)  # no earlier message of a pair is trained on
    if not weight or other != 1:
        need = "a chosen one above 0 and a rejected one of 1: correct the marks, or leave the row out"
        raise InputError(f"marks give 'chosen' the weight {weight:g} and 'rejected' {other:g}; a pair needs {need}.")
    chosen, rejected = map(unweighted, sides)
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    prompt = unweighted(parse_messages(row, "prompt", "user")) if "prompt" in row else shared
    if shared and isinstance(row.get("prompt"), str):
        if prompt[0]["content"].strip() not in (message["content"].strip() for message in shared):
            raise InputError("'prompt' is no message that 'chosen' and 'rejected' share: correct it or leave it out.")
        prompt = shared
    if not prompt or prompt[-1]["role"] != "user":
        raise InputError("'prompt' (else what 'chosen' and 'rejected' share) should end with role 'user'.")
    return prompt, _response(chosen, prompt, "chosen"), _response(rejected, prompt, "rejected"), weight


def _response(conversation: list[Message], prompt: list[Message], column: str) -> Message:
    rest = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in rest)
        raise InputError(f"{column!r} has the roles ({roles}) after the prompt: leave one, of role 'assistant'.")
    return rest[0]


def _record(
    row: dict[str, Any], columns: MarginColumns, weight_column: str | None, earlier: Collection[int]
) -> dict[str, Any]:
    # a margin of null is refused, not absent: `row` keeps it
    present, repeated = without_prompt(row, "chosen", "rejected")
    prompt, *responses, weight = parse_row(present)
    chosen, rejected = (response["content"] for response in responses)
    weights = {"pair_weight": row_weight(row, weight_column)} if weight_column else {}
    empty = [is_blank(text) for text in (prompt[-1]["content"], chosen, rejected)]
    faults = {"empty_prompt": empty[0], "empty_completion": any(empty[1:])}
    faults |= {"identical": chosen.strip() == rejected.strip(), "weight_0": 0 in weights.values()}
    drop = next((name for name, is_so in faults.items() if is_so), "")
    pair: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_weight": weight}
    read = ("prompt", "chosen", "rejected", "pair_id", *columns, weight_column or "")
    pair |= settle_columns(present, read, [*prompt, *responses])
    content = [prompt, chosen, rejected, *filter(None, [pair["context"]])]
    pair |= {"pair_id": row_id(present, "pair_id", content, earlier), "drop": drop, "noted": {repeated: 1}}
    # a row that is kept out needs no score
    return pair | weights | {"margin": math.nan if drop or not columns else row_margin(row, columns)}
