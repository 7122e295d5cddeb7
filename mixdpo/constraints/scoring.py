"""The built-in preference task's gold score: which of a prompt's constraints an answer satisfies.

The score of an answer is the share of constraints that hold, so a preference needs no judge, and the gain from training
is measured exactly. White space around an answer is ignored; an answer without a letter or a digit satisfies nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixdpo.constraints.checks import words
from mixdpo.constraints.kinds import KINDS, Kind
from mixdpo.errors import InputError, check_one_of


@dataclass(frozen=True)
class Constraint:
    """One constraint of a prompt: the name of its kind and that kind's parameters.

    Raises:
        InputError: an unknown kind, or parameters that are not its own or of the wrong type.
    """

    kind: str
    params: Mapping[str, int | str]

    def __post_init__(self) -> None:
        check_one_of("a constraint's kind", self.kind, KINDS)
        types = {name: type(values[0]) for name, values in self.rule.choices.items()}
        if not isinstance(self.params, Mapping) or {key: type(value) for key, value in self.params.items()} != types:
            wanted = {name: kind.__name__ for name, kind in types.items()}
            raise InputError(f"constraint {self.kind!r} takes the params {wanted}, not {self.params!r}")

    @property
    def rule(self) -> Kind:
        return KINDS[self.kind]

    def holds(self, text: str) -> bool:
        """Whether `text` satisfies it; text without a letter or a digit never does."""
        text = text.strip()
        return bool(words(text)) and self.rule.check(text, **self.params)

    def to_dict(self) -> dict[str, Any]:
        """The form it has in files: `{"kind": …, "params": {…}}`."""
        return {"kind": self.kind, "params": dict(self.params)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Constraint":
        """The inverse of `to_dict`.

        Raises:
            InputError: not of that form, or not a valid constraint.
        """
        if not isinstance(row, Mapping) or set(row) != {"kind", "params"}:
            raise InputError(f'a constraint is written {{"kind": …, "params": {{…}}}}, not {row!r}')
        return cls(row["kind"], row["params"])


def score(text: str, constraints: Sequence[Constraint]) -> float:
    """Share of `constraints` that `text` satisfies, 0 to 1.

    Raises:
        InputError: no constraints, hence no share.
    """
    if not constraints:
        raise InputError("an answer cannot be scored without constraints: give its prompt one at least")
    return sum(constraint.holds(text) for constraint in constraints) / len(constraints)


class ConstraintScorer:
    """Scores answers by the share of satisfied constraints; each prompt row needs a `constraints` column."""

    def __call__(self, prompt_row: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
        """Scores of `texts`, answers to the one prompt of `prompt_row`.

        Raises:
            InputError: the row has no constraints, or malformed ones.
        """
        if not isinstance(prompt_row.get("constraints"), list):
            raise InputError(
                f"prompt_id {prompt_row.get('prompt_id')!r} has no list of constraints to score by: give it one, or "
                "name another scorer"
            )
        constraints = [Constraint.from_dict(row) for row in prompt_row["constraints"]]
        return [score(text, constraints) for text in texts]
