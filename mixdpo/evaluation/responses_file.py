"""Responses as they come: a header that says what they depend on, then a line for each prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixdpo.evaluation.formats import Answered, Prompt
from mixdpo.evaluation.generation import Response
from mixdpo.storage.lines_file import LineFormat, LinesWriter


def _parse(row: dict[str, Any], header: dict[str, Any]) -> tuple[str, tuple[Response, ...]]:
    return row["key"], tuple(Response(**response) for response in row["answers"])


RESPONSES = LineFormat(
    name="mixdpo answers 1",
    noun="responses file of run.py predict",
    rows="answers",
    header={},
    parse=_parse,
    remedy="remove it, or give another --name",
    other="remove it, or give another --name",
)


class ResponsesFile(LinesWriter):
    def __init__(self, path: str | Path, header: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """A file to go on with, or a new one.

        Args:
            path: FILE.responses.jsonl.
            header: all that the responses depend on, in JSON's types.
            prompts: what is to be answered; their keys differ.

        Raises:
            InputError: there is a file of other responses or of something else, or another process is writing to it.
        """
        super().__init__(path, RESPONSES, header)
        self.prompts = {prompt.key: prompt for prompt in prompts}

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for key, prompt in self.prompts.items() if key not in self.rows]

    @property
    def answered(self) -> list[Answered]:
        """In the order of the prompts."""
        return [Answered(prompt, self.rows[key]) for key, prompt in self.prompts.items() if key in self.rows]

    def keep(self, answered: Sequence[Answered]) -> None:
        self.append(*({"key": a.prompt.key, "answers": [vars(response) for response in a.responses]} for a in answered))
