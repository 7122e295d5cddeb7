"""Read and check SFT samples: any source, any of the three row forms in, one table of conversations out."""

from typing import Any

from mixdpo.data.messages import Message, checked_text, parse_messages, plain_text, refuse_ignored
from mixdpo.data.table import Table, read_table, row_id, without_nulls
from mixdpo.errors import InputError

FORMS = ({"messages"}, {"prompt", "completion"}, {"instruction", "output"})


def read_samples(source: str, *, split: str = "train", limit: int | None = None) -> Table:
    """Read SFT samples from a hub id or a local folder or file.

    A row is `messages` (cut after the last response), `prompt` and `completion` (each text or messages), or Alpaca's
    `instruction`, `input` (may be absent) and `output`. Its id is taken from `sample_id` or `id`, else its content.

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
    forms = [form for form in FORMS if form <= row.keys()]
    if len(forms) != 1:
        raise InputError(
            f"the columns fit {len(forms)} forms of a sample and should fit one: 'messages', or 'prompt' and "
            "'completion', or 'instruction' and 'output' (with 'input' or without); null counts as absent."
        )
    if "messages" in forms[0]:
        if isinstance(row["messages"], str):
            raise InputError(f"'messages' should be a list of messages, not text: {row['messages']!r:.80}.")
        messages = parse_messages(row, "messages")
    elif "prompt" in forms[0]:
        messages = _prompt(row) + _completion(row)
    else:
        messages = _alpaca(row)
    responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not responses:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"no message has the role 'assistant' (there are: {roles}), so there is nothing to learn.")
    refuse_ignored(row, messages)
    return messages[: responses[-1] + 1]


def _prompt(row: dict[str, Any]) -> list[Message]:
    if isinstance(row["prompt"], str):
        return [{"role": "user", "content": plain_text(row["prompt"], "prompt")}]
    prompt = parse_messages(row, "prompt")
    if any(message["role"] == "assistant" for message in prompt):
        raise InputError(
            "'prompt' holds a response, and every response is trained on: give the conversation as 'messages' if that "
            "is meant, or leave the earlier turns out."
        )
    return prompt


def _completion(row: dict[str, Any]) -> list[Message]:
    completion = parse_messages(row, "completion")
    if completion[0]["role"] != "assistant":
        raise InputError(f"'completion' should begin with role 'assistant', not {completion[0]['role']!r}.")
    return completion


def _alpaca(row: dict[str, Any]) -> list[Message]:
    question, context = checked_text(row["instruction"], "instruction"), checked_text(row.get("input", ""), "input")
    if context.strip():
        question += f"\n\n{context}"
    response = checked_text(row["output"], "output")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def _record(row: dict[str, Any], rows_of_ids: dict[int, int]) -> dict[str, Any]:
    row = without_nulls(row)
    messages = parse_sample(row)
    id_column = "id" if "id" in row and "sample_id" not in row else "sample_id"
    return {
        "sample_id": row_id(row, id_column, messages, rows_of_ids),
        "messages": messages,
        "source": checked_text(row.get("source", ""), "source"),
        "drop": _why_unusable(messages),
    }


def _why_unusable(messages: list[Message]) -> str:
    """Why the row is kept out; empty when it is not."""
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    if messages[0]["role"] == "assistant" or not question.strip():
        return "empty_prompt"
    responses = [message["content"] for message in messages if message["role"] == "assistant"]
    return "" if any(response.strip() for response in responses) else "empty_completion"
