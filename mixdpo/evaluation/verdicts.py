"""Verdicts files: what a judge prefers, prompt by prompt, kept as each verdict comes.

The head says which model was judged, on what and how. What `mixdpo score` needs is in this file alone.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixdpo.errors import InputError
from mixdpo.storage.store import Key, Store, read_store

Order = Literal["model_first", "baseline_first"]
Source = Literal["log_probs", "text", "reward_model"]
NOUN = "verdicts"


@dataclass(frozen=True)
class Verdict:
    """Of one prompt in one order.

    Attributes:
        index: position of the prompt in OUTPUTS, from 0.
        order: whose response the judge was shown first.
        preference: probability that the MODEL's response is preferred over the baseline's, in [0, 1], whatever the
            order; None where the judge gave no verdict.
        source: what the preference was read from; None without a preference.
        failed: why there is no preference; None where there is one.
        judge_prompt_tokens, judge_completion_tokens: what the judge used for it, failed attempts included; None where
            it does not say.
        len_model, len_baseline: characters of the two responses.
        tokens: length of the model's response in tokens; None where OUTPUTS does not say.
        ended: whether the model ended its response by itself; None where OUTPUTS does not say.
    """

    index: int
    order: Order
    preference: float | None
    source: Source | None
    failed: str | None
    judge_prompt_tokens: int | None
    judge_completion_tokens: int | None
    len_model: int
    len_baseline: int
    tokens: int | None
    ended: bool | None

    def __post_init__(self) -> None:
        if (self.preference is None) == (self.failed is None):
            raise ValueError("it needs either a preference or what failed")
        if self.preference is not None and not (math.isfinite(self.preference) and 0 <= self.preference <= 1):
            raise ValueError(f"the preference {self.preference} is not in [0, 1]")

    @property
    def key(self) -> tuple[int, Order]:
        return self.index, self.order


class VerdictsWriter(Store):
    def __init__(self, path: str | Path, head: Mapping[str, Any]) -> None:
        """Goes on with a file, or makes the file. `verdicts` are those known so far; a failed one may be replaced.

        Raises:
            InputError: the file holds other verdicts or something else, or another process is writing to the file.
        """
        remedy = "use the same inputs and options to continue it, or give another --out"
        super().__init__(path, head, noun=NOUN, remedy=remedy)
        self.verdicts = _by_key(self.get())

    def keep(self, *verdicts: Verdict) -> None:
        self.add({f"{each.index} {each.order}": json.dumps(vars(each)).encode() for each in verdicts})
        self.verdicts |= {each.key: each for each in verdicts}


def _by_key(entries: Mapping[Key, bytes]) -> dict[tuple[int, Order], Verdict]:
    verdicts = [Verdict(**json.loads(value)) for value in entries.values()]
    return {verdict.key: verdict for verdict in verdicts}


@dataclass(frozen=True)
class VerdictsFile:
    """`verdicts`: one for each (index, order) that is there, in this order, failed ones included."""

    path: Path
    header: dict[str, Any]
    verdicts: list[Verdict]


def read_verdicts(path: str | Path) -> VerdictsFile:
    """
    Raises:
        InputError: there is no such file, the file is none of `mixdpo judge`, is damaged, or is being written.
    """
    if not Path(path).is_file():
        raise InputError(f"no verdicts file {path}; `mixdpo judge` makes it")
    header, entries = read_store(path, NOUN, "restore it from a copy, or judge anew into another --out")
    return VerdictsFile(Path(path), header, [verdict for _, verdict in sorted(_by_key(entries).items())])
