"""Verdicts files: what a judge prefers, prompt by prompt, kept as each verdict comes.

JSON lines: a header that says who was judged, on what and how, then a line for each verdict. A verdict that is there
twice counts as its last line says. What `mixdpo score` needs is in this file alone.
"""

import errno
import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixdpo.errors import InputError

Order = Literal["model_first", "baseline_first"]
Source = Literal["log_probs", "text", "reward_model"]

FORMAT = "mixdpo verdicts 1"
HEADER = {"model", "baseline", "outputs", "prompts", "judge"}
"""What every first line says beside its format."""
_REMEDY = "restore it from a copy, or judge anew into another --out"


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

    def line(self) -> str:
        content = {"from" if name == "source" else name: value for name, value in vars(self).items()}
        unsaid = ("preference", "from") if self.failed is not None else ("failed",)
        return json.dumps({name: value for name, value in content.items() if name not in unsaid}) + "\n"


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
    try:
        return _parse(Path(path), Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


class VerdictsWriter:
    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        """Appends verdicts to a file, so that a judge that was interrupted goes on where it was.

        Args:
            path: of the file; made where there is none, else its header must say the same.
            header: what `HEADER` lists.

        Raises:
            InputError: the file holds other verdicts or something else, or another judge is writing to it.
        """
        self.path = Path(path)
        header = {"format": FORMAT, **header}
        self._file = self._open()
        try:
            self._begin((json.dumps(header) + "\n").encode())
            there = self._drop_cut_off_line()
            _refuse_other(there, header)
        except BaseException:
            self._file.close()
            raise
        self.verdicts = {verdict.key: verdict for verdict in there.verdicts}

    def append(self, verdict: Verdict) -> None:
        """On the disk when this returns."""
        self._write(verdict.line().encode())
        self.verdicts[verdict.key] = verdict

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "VerdictsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        """The file, locked as long as it is open."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}. Give another --out") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(
                f"another judge is writing to {self.path}: wait until it is done, or give another --out"
            ) from None
        return file

    def _begin(self, header: bytes) -> None:
        """Write the header to a file that is new, or whose header was being written when the judge was killed."""
        self._file.seek(0)
        if header.startswith(start := self._file.read()):
            self._write(header[len(start) :])

    def _write(self, line: bytes) -> None:
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.close()  # nothing may follow a line that was cut off
            raise InputError(
                f"cannot write {self.path}: {error.strerror}. Make room there; the same command continues"
            ) from None

    def _drop_cut_off_line(self) -> VerdictsFile:
        """What the file holds; its last line is cut away where no line break ends it.

        In place, as the lock is on this file: one that takes its place would have no lock. A kill leaves the file with
        the line or without it.
        """
        self._file.seek(0)
        content = self._file.read()
        there = _parse(self.path, content)
        self._file.truncate(content.rfind(b"\n") + 1)
        return there


def _parse(path: Path, content: bytes) -> VerdictsFile:
    header, *lines = content.split(b"\n")[:-1] or [b""]
    found: dict[tuple[int, Order], Verdict] = {}
    parsed = _header(path, header)
    for number, line in enumerate(lines, 2):
        try:
            verdict = _verdict(json.loads(line), parsed["prompts"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is damaged ({type(error).__name__}: {error}): {_REMEDY}") from None
        found[verdict.key] = verdict
    return VerdictsFile(path, parsed, [found[key] for key in sorted(found)])


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(line)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        if lacking := HEADER - header.keys():
            raise ValueError(f"its first line lacks {', '.join(sorted(lacking))}")
        if type(header["prompts"]) is not int or not isinstance(header["judge"], dict):
            raise ValueError("`prompts` should be a number, `judge` an object")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no verdicts file of `mixdpo judge`, or is damaged ({type(error).__name__}: {error}): {_REMEDY}"
        ) from None
    return header


def _verdict(row: dict[str, Any], prompts: int) -> Verdict:
    """
    Raises:
        ValueError, KeyError, TypeError: the row is none of `Verdict.line`.
    """
    if type(row["index"]) is not int or not 0 <= row["index"] < prompts:
        raise ValueError(f"index {row['index']!r} is none of the {prompts} prompts")
    return Verdict(
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


def _refuse_other(there: VerdictsFile, here: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: the header of the file says other things than ours; names each.
    """
    old, new = ({**header, **header["judge"], "judge": None} for header in (there.header, here))
    names = dict.fromkeys([*old, *new])
    if changed := [f"{n}: {old.get(n)} there, {new.get(n)} here" for n in names if old.get(n) != new.get(n)]:
        raise InputError(
            f"{there.path} holds the verdicts of another judgement ({'; '.join(changed)}): use the same inputs and "
            "options to continue it, or give another --out"
        )
