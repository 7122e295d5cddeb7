"""Read and check SFT samples: any source, any of the three row forms in, one table of conversations out."""

from typing import Any

from mixdpo.data.columns import settle_columns
from mixdpo.data.messages import Message, checked_content, checked_text, parse_messages
from mixdpo.data.table import Table, read_table, row_id, without_nulls
from mixdpo.errors import InputError

FORMS = (("messages",), ("prompt", "completion"), ("instruction", "output"))


def read_samples(source: str, *, split: str = "train", limit: int | None = None) -> Table:
    """Read SFT samples from a hub id or a local folder or file.

    A row is `messages` (cut after the last response), `prompt` and `completion` (each text or messages), or Alpaca's
    `instruction`, `input` (may be absent) and `output`. The sample's id is a hash of `sample_id`, `id` or its content.

    Args:
        source: hub id; folder of data files; .parquet, .json, .jsonl, .csv (the last three also
            with .gz).
        split: split of a hub data set or folder; a single file has only `train`.
        limit: stop after this many usable samples.

    Returns:
        Columns sample_id (int64, >= 0), messages (the last one the assistant's), source (str, "" where the row names
        none) and row; causes "empty_prompt", "empty_completion" (every response blank).

    Raises:
        InputError: the source cannot be read, no sample is usable, or a row is malformed or repeats an id.
    """
    columns = {"sample_id": "int64", "messages": "messages", "source": "string"}
    return read_table(source, split, limit, "sample", _record, columns)


def parse_sample(row: dict[str, Any]) -> list[Message]:
    """The messages of a row in any of the three forms, up to its last response."""
    forms = [form for form in FORMS if row.keys() >= set(form)]
    if len(forms) != 1:
        names = ", or ".join(" and ".join(form) for form in FORMS)
        raise InputError(
            f"the columns fit {len(forms)} forms of a sample: give the columns of one, {names}. Null counts as absent."
        )
    if "messages" in forms[0]:
        messages = parse_messages(row, "messages", None)
    elif "prompt" in forms[0]:
        prompt, completion = parse_messages(row, "prompt", "user"), parse_messages(row, "completion", "assistant")
        if completion[0]["role"] != "assistant" or any(message["role"] == "assistant" for message in prompt):
            raise InputError(
                "'completion' should begin with role 'assistant', and 'prompt' lack it: correct or give 'messages'."
            )
        messages = prompt + completion
    else:
        texts = {column: checked_content(row.get(column, ""), column) for column in ("instruction", "input", "output")}
        question = texts["instruction"] + (f"\n\n{texts['input']}" if texts["input"].strip() else "")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not responses:
        raise InputError(f"no message has the role 'assistant': {[message['role'] for message in messages]}.")
    return messages[: responses[-1] + 1]


def _record(row: dict[str, Any], rows_of_ids: dict[int, int]) -> dict[str, Any]:
    row = without_nulls(row)
    messages = parse_sample(row)
    form = next(form for form in FORMS if row.keys() >= set(form))
    read = (*form, *(("input",) if "instruction" in form else ()), "sample_id", "id", "source")
    settled = settle_columns(row, read, messages)
    id_column = "id" if "id" in row and "sample_id" not in row else "sample_id"
    content = [messages, settled["context"]] if settled["context"] else messages
    sample = {"sample_id": row_id(row, id_column, content, rows_of_ids), "messages": messages, **settled}
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    drop = "" if any(m["content"].strip() for m in messages if m["role"] == "assistant") else "empty_completion"
    if messages[0]["role"] == "assistant" or not question.strip():
        drop = "empty_prompt"
    return sample | {"source": checked_text(row.get("source", ""), "source"), "drop": drop}
