"""The built-in preference task's gold score: the share of a prompt's constraints that a response satisfies.

A preference then needs no judge, and the gain from training is measured exactly. White space around a response is
ignored. A response without a letter or a digit satisfies nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixdpo.constraints.kinds import KINDS, words
from mixdpo.errors import InputError, check_one_of


@dataclass(frozen=True)
class Constraint:
    """One constraint of a prompt: the name of its kind and that kind's parameters.

    Raises:
        InputError: the kind is unknown, or the parameters have other names or types than the kind's.
    """

    kind: str
    params: Mapping[str, int | str]

    def __post_init__(self) -> None:
        check_one_of("a constraint's kind", self.kind, KINDS)
        types = {name: type(values[0]) for name, values in KINDS[self.kind].choices.items()}
        if not isinstance(self.params, Mapping) or {key: type(value) for key, value in self.params.items()} != types:
            wanted = {name: kind.__name__ for name, kind in types.items()}
            raise InputError(f"constraint {self.kind!r} takes the params {wanted}, not {self.params!r}")

    def holds(self, text: str) -> bool:
        """Whether `text` satisfies the constraint; text without a letter or a digit never does."""
        text = text.strip()
        return bool(words(text)) and KINDS[self.kind].check(text, **self.params)


class ConstraintScorer:
    """Scores responses by the share of satisfied constraints; each prompt row needs a `constraints` column."""

    def __call__(self, prompt_row: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
        """Scores of `texts`, from 0 to 1: responses to the one prompt of `prompt_row`.

        Raises:
            InputError: the row has no constraints, or malformed ones.
        """
        rows = prompt_row.get("constraints")
        if not isinstance(rows, list) or not rows:
            raise InputError("the prompt has no list of constraints: add `constraints`, or name another scorer")
        if malformed := [row for row in rows if not isinstance(row, Mapping) or set(row) != {"kind", "params"}]:
            raise InputError(f'a constraint is written {{"kind": …, "params": {{…}}}}, not {malformed[0]!r}')
        constraints = [Constraint(**row) for row in rows]
        return [sum(constraint.holds(text) for constraint in constraints) / len(constraints) for text in texts]
