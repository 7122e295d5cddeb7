"""Verdicts files: what a judge prefers, prompt by prompt, kept as each verdict comes.

The header says who was judged, on what and how; a line is a verdict, and of two of the same prompt and order the last
one counts. What `mixdpo score` needs is in this file alone.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixdpo.errors import InputError
from mixdpo.storage.lines_file import LineFormat

Order = Literal["model_first", "baseline_first"]


Source = Literal["log_probs", "text", "reward_model"]


@dataclass(frozen=True)
class Verdict:
    """Of one prompt in one order.

    Attributes:
        index: position of the prompt in OUTPUTS, from 0.
        order: whose output the judge was shown first.
        preference: probability that the MODEL's output is preferred over the baseline's, in [0, 1], whatever the order;
            None where the judge gave no verdict.
        source: what the preference was read from ("from" in the file); None without a preference.
        failed: why there is no preference; None where there is one.
        judge_prompt_tokens, judge_completion_tokens: what the judge used for it, failed attempts included; None where
            it does not say.
        len_model, len_baseline: characters of the two outputs.
        tokens: length of the model's output in tokens; None where OUTPUTS does not say.
        ended: whether the model ended its output by itself; None where OUTPUTS does not say.
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
        if self.order not in ("model_first", "baseline_first"):
            raise ValueError(f"the order is {self.order!r}")
        if (self.preference is None) == (self.failed is None):
            raise ValueError("it needs either a preference or what failed")
        if self.preference is not None and not (math.isfinite(self.preference) and 0 <= self.preference <= 1):
            raise ValueError(f"the preference {self.preference} is not in [0, 1]")

    @property
    def key(self) -> tuple[int, Order]:
        return self.index, self.order

    def line(self) -> dict[str, Any]:
        content = {"from" if name == "source" else name: value for name, value in vars(self).items()}
        unsaid = ("preference", "from") if self.failed is not None else ("failed",)
        return {name: value for name, value in content.items() if name not in unsaid}


def _parse(row: dict[str, Any], header: dict[str, Any]) -> tuple[tuple[int, Order], Verdict]:
    if type(row["index"]) is not int or not 0 <= row["index"] < header["prompts"]:
        raise ValueError(f"index {row['index']!r} is none of the {header['prompts']} prompts")
    verdict = Verdict(
        index=row["index"],
        order=row["order"],
        preference=float(row["preference"]) if "preference" in row else None,
        source=row["from"] if "preference" in row else None,
        failed=str(row["failed"]) if "failed" in row else None,
        judge_prompt_tokens=row["judge_prompt_tokens"],
        judge_completion_tokens=row["judge_completion_tokens"],
        len_model=int(row["len_model"]),
        len_baseline=int(row["len_baseline"]),
        tokens=row["tokens"],
        ended=row["ended"],
    )
    return verdict.key, verdict


VERDICTS = LineFormat(
    name="mixdpo verdicts 1",
    noun="verdicts file of `mixdpo judge`",
    rows="verdicts",
    header={"model": str, "baseline": str, "outputs": str, "prompts": int, "judge": dict},
    parse=_parse,
    remedy="restore it from a copy, or judge anew into another --out",
    other="use the same inputs and options to continue it, or give another --out",
)


@dataclass(frozen=True)
class VerdictsFile:
    """`verdicts`: one for each (index, order) that is there, in this order, failed ones included."""

    path: Path
    header: dict[str, Any]
    verdicts: list[Verdict]


def read_verdicts(path: str | Path) -> VerdictsFile:
    """All complete lines: one that was being written when the judge was killed is left out.

    Raises:
        InputError: there is no such file, it is none of `mixdpo judge`, or a line of it is damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"no verdicts file {path}; `mixdpo judge` makes it")
    header, found = VERDICTS.read(path)
    return VerdictsFile(Path(path), header, [found[key] for key in sorted(found)])
