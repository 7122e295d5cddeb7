"""Answers as they come: a header that says what they depend on, then a line for each prompt, on disk at once."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixdpo.errors import InputError
from mixdpo.evaluation.formats import Answered, Prompt
from mixdpo.evaluation.generation import Generation
from mixdpo.files import written_whole

FORMAT = "mixdpo answers 1"


class AnswersFile:
    def __init__(self, path: str | Path, header: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """A file to go on with, or a new one.

        Args:
            path: FILE.answers.jsonl.
            header: all that the answers depend on, in JSON's types.
            prompts: what is to be answered; their keys differ.

        Raises:
            InputError: there is a file of other answers, or of something else.
        """
        self.path, self.prompts = Path(path), {prompt.key: prompt for prompt in prompts}
        self.header = {"format": FORMAT, **header}
        self.answers: dict[str, tuple[Generation, ...]] = {}
        if self.path.exists():
            self._read()
        lines = [json.dumps(self.header), *(self._line(key) for key in self.answers)]
        with written_whole(self.path) as partial:  # without the line that was being written when a process died
            partial.write_text("".join(f"{line}\n" for line in lines), "utf-8")

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for key, prompt in self.prompts.items() if key not in self.answers]

    @property
    def answered(self) -> list[Answered]:
        """In the order of the prompts."""
        return [Answered(prompt, self.answers[key]) for key, prompt in self.prompts.items() if key in self.answers]

    def append(self, answered: Sequence[Answered]) -> None:
        self.answers |= {a.prompt.key: a.answers for a in answered}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._line(a.prompt.key) + "\n" for a in answered))
            file.flush()
            os.fsync(file.fileno())

    def _line(self, key: str) -> str:
        return json.dumps({"key": key, "answers": [vars(answer) for answer in self.answers[key]]})

    def _read(self) -> None:
        try:
            header, *rows = map(json.loads, self.path.read_bytes().split(b"\n")[:-1])
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}")
            found = {row["key"]: tuple(Generation(**answer) for answer in row["answers"]) for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path} holds no answers of run.py predict, or is damaged ({type(error).__name__}: {error}): "
                "remove it, or give another --name"
            ) from None
        said = {name: (header.get(name), self.header.get(name)) for name in {**header, **self.header}}
        if changed := "; ".join(f"{name}: {old} there, {new} here" for name, (old, new) in said.items() if old != new):
            raise InputError(f"{self.path} holds other answers ({changed}): remove it, or give another --name")
        self.answers = found
