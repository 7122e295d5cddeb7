"""Prompts and answers as the official benchmarks write them, and the tasks that need no judge.

A form is a small frozen dataclass that a config names by its class path: called with (number, row) it gives a `Prompt`;
`suffix` and `rows(answered, name)` are what is written; a task also has `score(prompt, text)`.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.errors import InputError
from mixdpo.evaluation.generation import Response

Row = Mapping[str, Any]


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark.

    Args:
        key: its id there.
        turns: what the user says, turn by turn; the model answers each before the next is asked.
        row: the row that it was read from.
        category: of the benchmark; a temperature may depend on it.
    """

    key: str
    turns: tuple[str, ...]
    row: Row = field(repr=False)
    category: str = ""


@dataclass(frozen=True)
class Answered:
    """A prompt and its answers, one for each turn."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class AlpacaEval:
    """AlpacaEval: `instruction` (and `dataset`) in; what its `--model_outputs` takes out.

    Attributes:
        suffix: of the file that is written.
    """

    suffix = ".json"

    def __call__(self, number: int, row: Row) -> Prompt:
        return Prompt(str(number), (_text(row, "instruction"),), row)

    def rows(self, answered: Sequence[Answered], name: str) -> Rows:
        return [
            {
                "dataset": a.prompt.row.get("dataset", "unknown"),
                "instruction": a.prompt.turns[0],
                "output": a.responses[0].text,
                "generator": name,
                "tokens": a.responses[0].tokens,
                "ended": a.responses[0].ended,
            }
            for a in answered
        ]


@dataclass(frozen=True)
class ArenaHard:
    """Arena-Hard-Auto, v0.1 or v2.0: its question.jsonl (`uid`, `prompt`, `category`) in, a model_answer file out.

    What its style control reads beside `token_len` comes from its own add_markdown_info.py.
    """

    suffix = ".jsonl"

    def __call__(self, number: int, row: Row) -> Prompt:
        return Prompt(_text(row, "uid"), (_text(row, "prompt"),), row, str(row.get("category", "")))

    def rows(self, answered: Sequence[Answered], name: str) -> Rows:
        return [
            {
                "uid": a.prompt.key,
                "ans_id": _response_id(name, a),
                "model": name,
                "messages": [
                    {"role": "user", "content": a.prompt.turns[0]},
                    {"role": "assistant", "content": {"answer": a.responses[0].text}},
                ],
                "tstamp": time.time(),
                "metadata": {"token_len": a.responses[0].tokens, "ended": a.responses[0].ended},
            }
            for a in answered
        ]


@dataclass(frozen=True)
class MTBench:
    """MT-Bench: FastChat's question.jsonl (`question_id`, `category`, `turns`), or the rows of the hub's
    HuggingFaceH4/mt_bench_prompts (`prompt_id`, `category`, `prompt`), in; a model_answer file out."""

    suffix = ".jsonl"

    def __call__(self, number: int, row: Row) -> Prompt:
        key, turns = ("question_id", "turns") if "turns" in row else ("prompt_id", "prompt")
        if type(row.get(key)) is not int:
            raise InputError(f"{key!r} should be a whole number, not {row.get(key)!r}")
        said = row.get(turns)
        if not isinstance(said, list) or not said or not all(isinstance(turn, str) and turn.strip() for turn in said):
            raise InputError(f"{turns!r} should be a list of texts, the user's turns, not {said!r:.80}")
        return Prompt(str(row[key]), tuple(said), row, str(row.get("category", "")))

    def rows(self, answered: Sequence[Answered], name: str) -> Rows:
        ordered = sorted(answered, key=lambda a: int(a.prompt.key))
        return [
            {
                "question_id": int(a.prompt.key),
                "answer_id": _response_id(name, a),
                "model_id": name,
                "choices": [{"index": 0, "turns": [response.text for response in a.responses]}],
                "tstamp": time.time(),
                "generate_params": {
                    "tokens": [response.tokens for response in a.responses],
                    "ended": [response.ended for response in a.responses],
                },
            }
            for a in ordered
        ]


SCORED = ("generator", "output", "tokens", "ended", "score")
"""What `scored_rows` adds to a prompt's row; not `answer`, which is a column of GSM8K."""


def scored_rows(task: Any, answered: Sequence[Answered], name: str) -> Rows:
    """Each prompt's row with its answer and gold score."""
    return [
        {
            **a.prompt.row,
            "generator": name,
            "output": a.responses[0].text,
            "tokens": a.responses[0].tokens,
            "ended": a.responses[0].ended,
            "score": task.score(a.prompt, a.responses[0].text),
        }
        for a in answered
    ]


@dataclass(frozen=True)
class Constraints:
    """The built-in task: `prompt` and `constraints`; the score is the share of constraints that hold."""

    suffix = ".json"
    rows = scored_rows

    def __call__(self, number: int, row: Row) -> Prompt:
        prompt = Prompt(str(row.get("prompt_id", number)), (_text(row, "prompt"),), row, str(row.get("part", "")))
        self.score(prompt, "")  # refuses a row that could not be scored, before anything is generated
        return prompt

    def score(self, prompt: Prompt, text: str) -> float:
        return ConstraintScorer()(prompt.row, [text])[0]


@dataclass(frozen=True)
class GSM8K:
    """GSM8K: `question` and `answer`, which ends in `#### number`; the score is 1 where the numbers are equal: of an
    answer the one behind ####, or else the last one.

    Args:
        request: follows the question; without one a chat model does not know the form of the answer.
    """

    request: str = "Reason step by step, and end with a line: #### and the number."
    suffix = ".json"
    rows = scored_rows

    def __call__(self, number: int, row: Row) -> Prompt:
        if _number_behind_marks(_text(row, "answer")) is None:
            raise InputError(f"'answer' should end in #### and a number, not {row['response'][-40:]!r}")
        turn = "\n".join(part for part in (_text(row, "question"), self.request) if part)
        return Prompt(str(row.get("id", number)), (turn,), row)

    def score(self, prompt: Prompt, text: str) -> float:
        found = _number_behind_marks(text)
        if found is None and (numbers := _NUMBER.findall(text)):
            found = _value(numbers[-1])
        return float(found == _number_behind_marks(prompt.row["answer"]))


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def _number_behind_marks(text: str) -> float | None:
    """The first one. Four marks also begin a heading of Markdown, such as "#### 1. First step": no answer, unless it is
    the last line."""
    for found in re.finditer(r"(?<!#)####\s*\$?\s*(" + _NUMBER.pattern + ")", text):
        rest = text[found.end() :]
        if not re.match(r"[.)][ \t]+\w", rest) or not rest.partition("\n")[2].strip():
            return _value(found[1])
    return None


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        found = f"{value!r:.60}" if column in row else f"a row with the columns {', '.join(row)}"
        raise InputError(f"{column!r} should be a text, not {found}")
    return value


def _response_id(name: str, answered: Answered) -> str:
    """The same for the same answer: the official tools want one that no other answer has."""
    said = json.dumps([name, answered.prompt.key, [response.text for response in answered.responses]])
    return hashlib.sha256(said.encode()).hexdigest()[:22]
