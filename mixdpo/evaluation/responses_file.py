"""Responses as they come, prompt by prompt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixdpo.evaluation.formats import Prompt, PromptResponses
from mixdpo.evaluation.generation import Response
from mixdpo.storage.store import Store, read_store

NOUN, REMEDY = "responses", "remove it, or give another --name"


class ResponsesFile(Store):
    def __init__(self, path: str | Path, head: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """A file to go on with, or a new one.

        Args:
            path: FILE.responses.sqlite.
            head: all that the responses depend on, in JSON's types.
            prompts: the prompts to respond to; their keys differ.

        Raises:
            InputError: the file holds other responses or something else, or another process is writing to the file.
        """
        super().__init__(path, head, noun=NOUN, remedy=REMEDY)
        self.prompts = {prompt.key: prompt for prompt in prompts}
        self.rows = {key: tuple(Response(**row) for row in json.loads(value)) for key, value in self.items().items()}

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for key, prompt in self.prompts.items() if key not in self.rows]

    @property
    def answered(self) -> list[PromptResponses]:
        """In the order of the prompts."""
        return [PromptResponses(prompt, self.rows[key]) for key, prompt in self.prompts.items() if key in self.rows]

    def keep(self, answered: Sequence[PromptResponses]) -> None:
        self.add({a.prompt.key: json.dumps([vars(response) for response in a.responses]).encode() for a in answered})
        self.rows |= {a.prompt.key: a.responses for a in answered}


def head_of_responses(path: str | Path) -> dict[str, Any]:
    """
    Raises:
        InputError: as for a ResponsesFile.
    """
    return read_store(path, NOUN, REMEDY)[0]
