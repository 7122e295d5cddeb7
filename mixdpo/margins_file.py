"""Margins files: a signal's margin for each pair of a data set, found again by the pair's id and text.

One JSON object a line: first a header that says what the margins are and what they were computed with, then
`{"pair_id", "text", "margin"}` for each pair in the order of the data, where `text` is `text_hash`. While a file is being
computed, its pairs are in FILE.part; FILE itself is always complete.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = "mixdpo margins 1"


def text_hash(pair: Mapping[str, Any]) -> str:
    """16 hex digits of prompt messages, chosen and rejected response."""
    messages = [[message["role"], message["content"]] for message in pair["prompt"]]
    return hashlib.sha256(json.dumps([messages, pair["chosen"], pair["rejected"]]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MarginsFile:
    """A complete margins file. `pairs`: pair id -> (text hash, margin), in the order of the file."""

    path: str
    header: dict[str, Any]
    pairs: dict[int, tuple[str, float]]

    @property
    def of_policy(self) -> bool:
        """Whether the margins are of the model that is trained, so that they fit no other one."""
        return self.header["needs"] in ("policy", "adapter")

    def summary(self) -> dict[str, Any]:
        return {"file": self.path, **{key: self.header[key] for key in ("signal", "options", "base", "adapter")}}

    def with_margins(self, dataset: "Dataset", source: str) -> "Dataset":
        """The pairs of `read_pairs` with margins from this file, NaN where it has none.

        Raises:
            InputError: a pair's text is not the one that its margin was computed of.
        """
        margins, changed = np.full(len(dataset), np.nan), []
        for index, pair in enumerate(dataset):
            text, margin = self.pairs.get(pair["pair_id"], (None, math.nan))
            margins[index] = margin
            if text is not None and text != text_hash(pair):
                changed.append(pair["row"])
        if changed:
            raise InputError(
                f"{self.path} was made of other texts: {len(changed)} of the {len(dataset)} pairs of {source} have their "
                f"id there and another prompt, chosen or rejected response (first: row {changed[0]}). Compute it anew"
            )
        return dataset.remove_columns("margin").add_column("margin", margins)

    def check_complete(self, margins: Iterable[float], rows: Iterable[int], source: str) -> None:
        """
        Raises:
            InputError: a pair has no margin.
        """
        lacking = [(row, margin) for row, margin in zip(rows, margins, strict=True)]
        lacking_rows = [row for row, margin in lacking if math.isnan(margin)]
        if lacking_rows:
            raise InputError(
                f"{self.path} has no margin for {len(lacking_rows)} of {len(lacking)} pairs of {source} (first: row "
                f"{lacking_rows[0]}): it was made of other pairs, or with data.limit or data.overlong drop"
            )

    def check_made_with(self, here: Mapping[str, str], what: str) -> None:
        """
        Raises:
            InputError: the margins are of a policy, and it saw the pairs otherwise or is another one.
        """
        there = {key: self.header[key] for key in here}
        if self.of_policy and there != here:
            changed = "; ".join(
                f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]
            )
            raise InputError(
                f"{self.path} was made with another {what} ({changed}), and its margins ({self.header['signal']}) belong "
                f"to that one: use the options it was made with (base {self.header['base']}, {self.header['dtype']}; "
                f"{self.header['lengths']}), or compute it anew"
            )


def read_margins(path: str) -> MarginsFile:
    """
    Raises:
        InputError: there is no such file, it is not a margins file, or it is not complete.
    """
    if not Path(path).is_file():
        unfinished = (
            f"; {path}.part is unfinished: give its run.py predict command again" if _part(path).exists() else ""
        )
        raise InputError(f"no margins file {path}{unfinished}")
    header, pairs, size = _read(Path(path))
    if len(pairs) != header.get("pairs") or size != Path(path).stat().st_size:
        raise InputError(f"{path} is not whole: it has {len(pairs)} of {header.get('pairs')} pairs. Compute it anew")
    return MarginsFile(path, header, pairs)


class MarginsWriter:
    """Collects margins batch by batch, so that an interrupted computation goes on where it was.

    Attributes:
        margins: pair id -> margin of the pairs that are known so far.
    """

    def __init__(self, path: str, header: Mapping[str, Any], texts: Mapping[int, str]) -> None:
        """
        Args:
            path: FILE.
            header: what the margins are and depend on; `date` aside it must be that of a FILE or FILE.part there is.
            texts: pair id -> text hash of all pairs, in the order of the data.

        Raises:
            InputError: FILE or FILE.part holds something else.
        """
        self.path, self.part, self.texts = Path(path), _part(path), texts
        self.header = {"format": FORMAT, **header, "pairs": len(texts)}
        self.margins: dict[int, float] = {}
        self.complete = self.path.exists()
        if self.complete:
            there = read_margins(path)
            self._continue(self.path, there.header, there.pairs)
        elif self.part.exists() and b"\n" in self.part.read_bytes():
            there_header, pairs, size = _read(self.part)
            self._continue(self.part, there_header, pairs)
            os.truncate(self.part, size)  # a line that was being written when the process died
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.part.write_text(_line(self.header))

    def _continue(self, file: Path, header: dict[str, Any], pairs: Mapping[int, tuple[str, float]]) -> None:
        keys = [key for key in {**header, **self.header} if key != "date" and header.get(key) != self.header.get(key)]
        if keys:
            differences = "; ".join(f"{key}: {header.get(key)} there, {self.header.get(key)} here" for key in keys)
            raise InputError(f"{file} holds other margins ({differences}): give another model.output, or remove it")
        self.header, self.margins = header, {pair_id: margin for pair_id, (_, margin) in pairs.items()}

    def append(self, pair_ids: Iterable[int], margins: Iterable[float]) -> None:
        """Keep the margins of one batch.

        Raises:
            InputError: a margin is not finite.
        """
        found = dict(zip(pair_ids, margins, strict=True))
        bad = [pair_id for pair_id, margin in found.items() if not math.isfinite(margin)]
        if bad:
            raise InputError(f"the margin of pair {bad[0]} is {found[bad[0]]}: the model overflows; use a wider dtype")
        with self.part.open("a") as file:
            file.write("".join(self._pair_line(pair_id, margin) for pair_id, margin in found.items()))
        self.margins |= found

    def finish(self) -> str:
        """Write FILE if all pairs are known; what has become of it, in a sentence."""
        if self.complete:
            return f"{self.path} was complete already: {len(self.texts)} pairs"
        if len(self.margins) < len(self.texts):
            return f"{len(self.margins)} of {len(self.texts)} pairs are in {self.part}: the same command goes on there"
        lines = [_line(self.header), *(self._pair_line(pair_id, self.margins[pair_id]) for pair_id in self.texts)]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(lines))
        os.replace(temporary, self.path)
        self.part.unlink()
        self.complete = True
        return f"wrote {self.path}: {len(self.texts)} pairs"

    def _pair_line(self, pair_id: int, margin: float) -> str:
        return _line({"pair_id": pair_id, "text": self.texts[pair_id], "margin": margin})


def _part(path: str) -> Path:
    return Path(f"{path}.part")


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], dict[int, tuple[str, float]], int]:
    """Header, pairs, and the size in bytes of the complete lines."""
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    try:
        header, *rows = map(json.loads, content.splitlines())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        pairs = {int(row["pair_id"]): (str(row["text"]), float(row["margin"])) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no margins file of run.py predict ({type(error).__name__}: {error})") from None
    return header, pairs, len(content)
