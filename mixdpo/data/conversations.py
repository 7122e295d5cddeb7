"""Read and check SFT samples: any source, any of the three row forms in, one table of conversations out."""

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

from mixdpo.data.columns import FORMS, settle_columns
from mixdpo.data.messages import checked_content, checked_text, is_blank, parse_messages, unweighted, without_prompt
from mixdpo.data.table import Table, read_table, row_id
from mixdpo.errors import InputError
from mixdpo.storage.identity import hash63

TrainOn = Literal["all", "last"]


def read_samples(
    source: Any, *, split: str = "train", limit: int | None = None, train_on: TrainOn = "all", one_each: bool = False
) -> Table:
    """Read SFT samples from a hub id or a local folder or file.

    A row is `messages` (cut after the last response), `prompt` and `completion` (each text or messages), or Alpaca's
    `instruction`, `input` (may be absent) and `output`. The sample's id is a hash of `sample_id`, `id` or its content.

    Args:
        source: hub id; folder of data files; .parquet, .json, .jsonl, .csv (the last three also
            with .gz); in Python also a list of rows or a `datasets.Dataset`; or a list of such sources; or an
            `Origin`, which names columns.
        split: split of a hub data set or folder, or a slice such as train[:9]; a single file has only `train`.
        limit: stop after this many usable rows.
        train_on: the last response of a row only, or all.
        one_each: make a sample of each trained response, with all messages before it. The first sample of a row keeps
            the row's id.

    Returns:
        Columns sample_id (int64, >= 0), messages (the last one the assistant's), response_weights (float32, one a
        response; 0 for a response that is not trained on), source (str, "" where the row names none) and row; causes
        "empty_prompt", "empty_completion" (every response blank), "no_trained_response"; noted "blank_responses", which
        have weight 0, and "prompt_repeated" (cut from the completion).

    Raises:
        InputError: the source cannot be read, no sample is usable, or a row is malformed or repeats an id.
    """
    options: dict[str, Any] = {"train_on": train_on, "one_each": one_each}
    columns = {"sample_id": "int64", "messages": "messages", "response_weights": "weights", "source": "string"}
    return read_table(source, split, limit, "sample", partial(_records, **options), columns, key=options)


def parse_sample(row: dict[str, Any]) -> tuple[tuple[str, ...], list[dict[str, Any]], list[int]]:
    """The form of a row, of the three, its messages up to its last response, and the places of the responses."""
    forms = [form for form in FORMS["sample"] if row.keys() >= {*form[:2]}]
    if len(forms) != 1:
        names = ", or ".join(" and ".join(form[:2]) for form in FORMS["sample"])
        raise InputError(f"the columns fit {len(forms)} forms of a sample: give those of one, {names}.")
    if "messages" in forms[0]:
        messages = parse_messages(row, "messages", None)
    elif "prompt" in forms[0]:
        prompt, completion = parse_messages(row, "prompt", "user"), parse_messages(row, "completion", "assistant")
        if completion[0]["role"] != "assistant" or any(message["role"] == "assistant" for message in prompt):
            raise InputError("'completion' should begin with role 'assistant', and 'prompt' lack it: give 'messages'.")
        messages = prompt + completion
    else:
        texts = {column: checked_content(row.get(column, ""), column) for column in ("instruction", "input", "output")}
        question = texts["instruction"] + (f"\n\n{texts['input']}" if texts["input"].strip() else "")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not responses:
        raise InputError(f"no message has the role 'assistant': {[message['role'] for message in messages]}.")
    return forms[0], messages[: responses[-1] + 1], responses


def _records(row: dict[str, Any], earlier: Collection[int], train_on: TrainOn, one_each: bool) -> list[dict[str, Any]]:
    row, repeated = without_prompt(row, "completion")
    form, messages, ends = parse_sample(row)
    blank = [is_blank(messages[end]["content"]) for end in ends]
    weights = [0.0 if empty else messages[end].get("weight", 1.0) for empty, end in zip(blank, ends, strict=True)]
    if train_on == "last":
        weights[:-1] = [0.0] * (len(ends) - 1)
    messages = unweighted(messages)
    settled = settle_columns(row, (*form, "sample_id", "id", "source"), messages)
    id_column = "id" if "id" in row and "sample_id" not in row else "sample_id"
    content = [messages, settled["context"]] if settled["context"] else messages
    sample = {"sample_id": row_id(row, id_column, content, earlier), "messages": messages, **settled}
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    drop = "empty_completion" if all(blank) else "" if any(weights) else "no_trained_response"
    if messages[0]["role"] == "assistant" or is_blank(question):
        drop = "empty_prompt"
    sample |= {"source": checked_text(row.get("source", ""), "source"), "drop": drop}
    sample |= {"response_weights": weights, "noted": {"blank_responses": sum(blank), repeated: 1}}
    if drop or not one_each:
        return [sample]
    trained = [k for k, weight in enumerate(weights) if weight]
    names = [{}, *({"sample_id": hash63(f"{sample['sample_id']} {k}"), "noted": {}} for k in trained[1:])]
    cuts = ({"messages": messages[: ends[k] + 1], "response_weights": [0.0] * k + [weights[k]]} for k in trained)
    return [sample | own | cut for own, cut in zip(names, cuts, strict=True)]
