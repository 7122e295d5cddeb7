"""Prompts and responses as the official benchmarks write them, and the tasks that need no judge.

A form is a class that a config names by its class path. Called with (number, row), a form gives a `Prompt`;
`row(asked, name)` goes into a file with `suffix`; a task also has `score(prompt, text)`.
"""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.data.messages import checked_text
from mixdpo.data.sources import file_rows
from mixdpo.errors import InputError, located
from mixdpo.storage.files import Row

if TYPE_CHECKING:  # a judge reads responses, and needs no transformers
    from mixdpo.evaluation.generation import Response


class Prompt(NamedTuple):
    """One prompt of a benchmark.

    Attributes:
        key: the prompt's id in the benchmark.
        turns: the user's messages; the model responds to each message before the next one is asked.
        row: the row that the prompt was read from.
        category: of the benchmark; a temperature may depend on it.
    """

    key: str
    turns: tuple[str, ...]
    row: Row
    category: str = ""


class PromptResponses(NamedTuple):
    """A prompt and its responses, one for each turn."""

    prompt: Prompt
    responses: "tuple[Response, ...]"


class AlpacaEval:
    """AlpacaEval: reads `instruction` (and `dataset`), writes a file for alpaca_eval's `--model_outputs`."""

    suffix = ".json"

    def __call__(self, number: int, row: Row) -> Prompt:
        return Prompt(str(number), (_text(row, "instruction"),), row)

    def row(self, asked: PromptResponses, name: str) -> Row:
        prompt = {"dataset": asked.prompt.row.get("dataset", "unknown"), "instruction": asked.prompt.turns[0]}
        return prompt | _columns(asked, name)


class ArenaHard:
    """Arena-Hard-Auto, v0.1 or v2.0: reads its question.jsonl (`uid`, `prompt`, `category`), writes a model_answer
    file. Its style control reads more columns: add these with Arena-Hard's own add_markdown_info.py.
    """

    suffix = ".jsonl"

    def __call__(self, number: int, row: Row) -> Prompt:
        return Prompt(_text(row, "uid"), (_text(row, "prompt"),), row, str(row.get("category", "")))

    def row(self, asked: PromptResponses, name: str) -> Row:
        (question,), (response,) = asked.prompt.turns, asked.responses
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": {"answer": response.text}}]
        metadata = {"token_len": response.tokens, "ended": response.ended}
        row = {"uid": asked.prompt.key, "messages": chat, "metadata": metadata}
        return row | _signed(asked, name, "ans_id", "model")


class MTBench:
    """MT-Bench: reads FastChat's question.jsonl (`question_id`, `category`, `turns`) or the rows of the hub's
    HuggingFaceH4/mt_bench_prompts (`prompt_id`, `category`, `prompt`), writes a model_answer file."""

    suffix = ".jsonl"

    def __call__(self, number: int, row: Row) -> Prompt:
        key, turns = ("question_id", "turns") if "turns" in row else ("prompt_id", "prompt")
        if type(row.get(key)) is not int or not isinstance(row.get(turns), list) or not row[turns]:
            raise InputError(f"{key!r} should be a whole number and {turns!r} a list of texts, the user's turns")
        texts = tuple(checked_text(text, turns) for text in row[turns])
        return Prompt(str(row[key]), texts, row, str(row.get("category", "")))

    def row(self, asked: PromptResponses, name: str) -> Row:
        columns = {key: [getattr(each, key) for each in asked.responses] for key in ("text", "tokens", "ended")}
        choices = [{"index": 0, "turns": columns.pop("text")}]
        row = {"question_id": int(asked.prompt.key), "choices": choices, "generate_params": columns}
        return row | _signed(asked, name, "answer_id", "model_id")


def _signed(asked: PromptResponses, name: str, id_column: str, model_column: str) -> dict[str, Any]:
    """Columns of the official tools beside a response: the model, the time, and a unique id."""
    content = json.dumps([name, asked.prompt.key, [response.text for response in asked.responses]])
    id_ = hashlib.sha256(content.encode()).hexdigest()[:22]
    return {id_column: id_, model_column: name, "tstamp": time.time()}


def _columns(asked: PromptResponses, name: str) -> dict[str, Any]:
    response = asked.responses[0]
    return {"output": response.text, "generator": name, "tokens": response.tokens, "ended": response.ended}


class Task:
    """Each prompt's row with its response and gold score. No new column is named `answer`, which GSM8K has."""

    suffix = ".json"

    def row(self: Any, asked: PromptResponses, name: str) -> Row:
        return asked.prompt.row | _columns(asked, name) | {"score": self.score(asked.prompt, asked.responses[0].text)}


class Constraints(Task):
    """The built-in task: `prompt` and `constraints`; the score is the share of constraints that hold."""

    def __call__(self, number: int, row: Row) -> Prompt:
        prompt = Prompt(str(row.get("prompt_id", number)), (_text(row, "prompt"),), row, str(row.get("part", "")))
        self.score(prompt, "")  # refuses a row that could not be scored, before anything is generated
        return prompt

    def score(self, prompt: Prompt, text: str) -> float:
        return ConstraintScorer()(prompt.row, [text])[0]


@dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K: `question` and `answer`, which ends in `#### number`. The score is 1 if the number of the response, the
    first one behind ####, as lm-eval's strict match has it, or else the last one, is equal.

    Args:
        request: text behind the question, which tells a chat model the form of the number.
    """

    request: str = "Reason step by step, and end with a line: #### and the number."

    def __call__(self, number: int, row: Row) -> Prompt:
        if not _MARKED.search(_text(row, "answer")):
            raise InputError(f"'answer' should end in #### and a number, not {row['answer'][-40:]!r}")
        turn = "\n".join(part for part in (_text(row, "question"), self.request) if part)
        return Prompt(str(row.get("id", number)), (turn,), row)

    def score(self, prompt: Prompt, text: str) -> float:
        return float(_answer(text) == _answer(prompt.row["answer"]))


_NUMBER = r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+"


_MARKED = re.compile(rf"(?<!#)####\s*\$?\s*({_NUMBER})")


def _answer(text: str) -> float | None:
    numbers = _MARKED.findall(text) or re.findall(_NUMBER, text)[::-1]
    return float(numbers[0].replace(",", "")) if numbers else None


def _text(row: Row, column: str) -> str:
    if not (text := checked_text(row.get(column), column)).strip():
        raise InputError(f"{column!r} is blank: leave the row out")
    return text


_EXPECTED = "Give AlpacaEval's format: a JSON list of objects with instruction, output and generator"


def read_responses(path: str | Path) -> list[Row]:
    """Rows of a file in AlpacaEval's format: the responses of one model.

    Raises:
        InputError: there is no such file, a row is malformed, or the responses are of several models.
    """
    rows: list[Row] = []
    for number, row in file_rows(Path(path)):
        with located(f"{path}, row {number}", f" {_EXPECTED}"):
            for column in ("instruction", "output", "generator"):
                checked_text(row.get(column), column)
            for column, kind in (("tokens", int), ("ended", bool)):
                if (value := row.get(column)) is not None and type(value) is not kind:
                    raise InputError(f"{column!r} should be {kind.__name__} or left out, not {value!r:.80}.")
            rows.append(row)
            if row["generator"] != (first := rows[0]["generator"]):
                raise InputError(f"the generator is {row['generator']!r}, in row 1 {first!r}: give one model's.")
    if not rows:
        raise InputError(f"{path} holds no responses. {_EXPECTED}")
    return rows
