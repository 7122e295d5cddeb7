"""Output files in AlpacaEval's format, ours and the leaderboard's: a model's answers to instructions, and a baseline's.

A JSON list of objects with `instruction`, `output` and `generator`; ours also have `tokens` and `ended`.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixdpo.data.messages import checked_text
from mixdpo.errors import InputError
from mixdpo.storage.files import read_text


@dataclass(frozen=True)
class Output:
    """One response.

    Attributes:
        instruction: what was asked.
        text: the response.
        generator: name of the model.
        tokens: length of the response in tokens, the end token included; None where the file does not say.
        ended: whether the model ended by itself; None where the file does not say.
    """

    instruction: str
    text: str
    generator: str
    tokens: int | None = None
    ended: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """What a judge is asked about: two answers to one instruction; `index` is the position in the model's file."""

    index: int
    model: Output
    baseline: Output

    @property
    def instruction(self) -> str:
        return self.model.instruction


def read_outputs(path: str | Path) -> list[Output]:
    """The responses of one model.

    Raises:
        InputError: there is no such file, it is none of these, or the responses are of several models; names the row.
    """
    if not Path(path).is_file():
        raise InputError(f"no outputs file {path}: give a JSON list of objects with instruction, output and generator")
    try:
        rows = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): {_EXPECTED}") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} should hold a list of objects, and not an empty one: {_EXPECTED}")
    outputs = [_output(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    for number, output in enumerate(outputs, 1):
        if output.generator != outputs[0].generator:
            raise InputError(
                f"{path}, row {number}: the generator is {output.generator!r}, that of row 1 {outputs[0].generator!r}: "
                "give the responses of one model"
            )
    return outputs


_EXPECTED = "give a file in AlpacaEval's format (a JSON list of objects with instruction, output and generator)"


def _output(row: Any, where: str) -> Output:
    if not isinstance(row, dict):
        raise InputError(f"{where}: it should be an object, not {str(row)[:80]!r}; {_EXPECTED}")
    for name in ("instruction", "output", "generator"):
        try:
            checked_text(row.get(name), name)
        except InputError as error:
            raise InputError(f"{where}: {str(error).rstrip('.')}; {_EXPECTED}") from None
    tokens, ended = row.get("tokens"), row.get("ended")
    if tokens is not None and (type(tokens) is not int or tokens < 0):
        raise InputError(f"{where}: 'tokens' should be a number of tokens, not {str(tokens)[:80]!r}, or left out")
    if ended is not None and not isinstance(ended, bool):
        raise InputError(f"{where}: 'ended' should be true or false, not {str(ended)[:80]!r}, or left out")
    return Output(row["instruction"], row["output"], row["generator"], tokens, ended)


def match(model: Sequence[Output], baseline: Sequence[Output], source: str | Path) -> list[Comparison]:
    """Each of the model's answers with the baseline's to the same instruction, in the model's order.

    The k-th answer to an instruction belongs to the baseline's k-th. Instructions that only the baseline answers are
    left out.

    Args:
        source: the baseline's file, for the error.

    Raises:
        InputError: the baseline lacks an instruction; says how many, and the first.
    """
    responses: defaultdict[str, deque[Output]] = defaultdict(deque)
    for output in baseline:
        responses[output.instruction].append(output)
    found, lacking = [], []
    for index, output in enumerate(model):
        if there := responses[output.instruction]:
            found.append(Comparison(index, output, there.popleft()))
        else:
            lacking.append((index, output.instruction))
    if lacking:
        index, instruction = lacking[0]
        raise InputError(
            f"the baseline {source} lacks {len(lacking)} of the {len(model)} instructions (first: row {index + 1}, "
            f"{instruction[:200]!r}): give the responses of both models to the same instructions"
        )
    return found


def content_hash(comparisons: Sequence[Comparison]) -> str:
    """16 hex digits of the instructions and both answers to each, in their order."""
    texts = [[each.instruction, each.model.text, each.baseline.text] for each in comparisons]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
