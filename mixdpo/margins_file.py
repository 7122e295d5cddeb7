"""Margins files: a signal's margin of each pair of a data set, found again by the pair's id and text.

JSON lines: a header that says what the margins are and depend on, then `{"pair_id", "text", "margin"}` for each pair,
`text` being `text_hash`. FILE is always complete; what is being computed is in FILE.part.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdpo.errors import InputError
from mixdpo.files import written_whole

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = "mixdpo margins 1"
HEADER = {"pairs", "signal", "needs", "source", "base", "adapter"}
"""What every first line says beside its format; margins of a policy also say what decides them."""


def text_hash(pair: Mapping[str, Any]) -> str:
    """16 hex digits of prompt messages, chosen and rejected response."""
    messages = [[message["role"], message["content"]] for message in pair["prompt"]]
    return hashlib.sha256(json.dumps([messages, pair["chosen"], pair["rejected"]]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MarginsFile:
    """`pairs`: pair id -> (text hash, margin)."""

    path: Path
    header: dict[str, Any]
    pairs: dict[int, tuple[str, float]]

    @property
    def of_policy(self) -> bool:
        """Whether the margins are of the model that is trained, so that they fit no other one."""
        return self.header["needs"] in ("policy", "adapter")

    def add_to(self, pairs: "Dataset", texts: Mapping[int, str], source: str) -> "Dataset":
        """The pairs with the margins of this file. `texts`: pair id -> text hash.

        Raises:
            InputError: a pair is not in the file, or has another text there; says how many, and the first one's row.
        """
        ids = pairs["pair_id"][:]
        found = [self.pairs.get(pair_id, ("", math.nan)) for pair_id in ids]
        if bad := [i for i, (text, _) in enumerate(found) if text != texts[ids[i]]]:
            changed = sum(found[i][0] != "" for i in bad)
            raise InputError(
                f"{self.path} does not fit {len(bad)} of the {len(pairs)} pairs of {source} (first: row "
                f"{pairs[bad[0]]['row']}): {len(bad) - changed} are not in it, {changed} have another text there. "
                f"It was made of {self.header['source']}: compute it anew (run.py predict)"
            )
        return pairs.remove_columns("margin").add_column("margin", [margin for _, margin in found])

    def refuse_other(self, here: Mapping[str, str | None], what: str) -> None:
        """
        Raises:
            InputError: the margins are of a policy, and one of these parts of the header is another one here.
        """
        there = {key: self.header.get(key, "not said") for key in (*here, "dtype", "lengths")}
        changed = [f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]
        if self.of_policy and changed:
            raise InputError(
                f"{self.path} holds margins ({self.header['signal']}) that were made with another {what} "
                f"({'; '.join(changed)}): use the options it was made with (base {self.header['base']}, "
                f"adapter {self.header['adapter']}, "
                f"{there['dtype']}, {there['lengths']}), or compute it anew"
            )


def read_margins(path: str | Path) -> MarginsFile:
    """
    Raises:
        InputError: there is no such file, it is none of `run.py predict`, or lines of it are missing.
    """
    if not Path(path).is_file():
        raise InputError(
            f"no margins file {path}; run.py predict makes it (and continues {path}.part, if there is one)"
        )
    file = _read(Path(path))
    if len(file.pairs) != file.header["pairs"]:
        raise InputError(f"{path} has {len(file.pairs)} of its {file.header['pairs']} pairs: compute it anew")
    return file


class MarginsWriter:
    def __init__(self, path: str, header: Mapping[str, Any], texts: Mapping[int, str]) -> None:
        """Collects margins in FILE.part, so that an interrupted computation goes on where it was; `margins` are those
        known so far, by pair id.

        Args:
            path: FILE.
            header: what the margins are and depend on; that of a FILE or FILE.part must say the same, `date` aside.
            texts: pair id -> text hash of all pairs, in the order of the data.

        Raises:
            InputError: FILE or FILE.part holds something else.
        """
        self.path, self.part, self.texts = Path(path), Path(f"{path}.part"), texts
        self.header = {"format": FORMAT, **header, "pairs": len(texts)}
        self.margins: dict[int, float] = {}
        there = read_margins(path) if self.path.exists() else _read(self.part) if self.part.exists() else None
        if there is not None:
            said = {key: (there.header.get(key), value) for key, value in self.header.items() if key != "date"}
            if changed := "; ".join(
                f"{key}: {old} there, {new} here" for key, (old, new) in said.items() if old != new
            ):
                raise InputError(
                    f"{there.path} holds other margins ({changed}): remove it or give another model.output"
                )
            self.header, self.margins = there.header, {pair_id: margin for pair_id, (_, margin) in there.pairs.items()}
        if not self.path.exists():
            self._write(self.part)  # without the line that was being written when the process died

    def append(self, pair_ids: Iterable[int], margins: Iterable[float]) -> None:
        """Keep the margins of one batch.

        Raises:
            InputError: a margin is not finite.
        """
        found = dict(zip(pair_ids, margins, strict=True))
        if bad := {pair_id: margin for pair_id, margin in found.items() if not math.isfinite(margin)}:
            raise InputError(f"margins by pair id that are no finite numbers: {bad}. Use a wider model.dtype")
        with self.part.open("a") as file:
            file.write("".join(self._line(pair_id, margin) for pair_id, margin in found.items()))
        self.margins |= found

    def finish(self) -> str:
        """Make FILE of FILE.part if all pairs are known; says what has become of it."""
        if self.path.exists():
            return f"{self.path} was complete already: {len(self.texts)} pairs"
        if len(self.margins) < len(self.texts):
            return f"{self.part} has {len(self.margins)} of {len(self.texts)} pairs: the same command continues it"
        self._write(self.path)
        self.part.unlink()
        return f"wrote {self.path}: {len(self.texts)} pairs"

    def _write(self, path: Path) -> None:
        """Header and known pairs in the order of the data."""
        lines = [self._line(pair_id, self.margins[pair_id]) for pair_id in self.texts if pair_id in self.margins]
        with written_whole(path) as partial:
            partial.write_text("".join([json.dumps(self.header) + "\n", *lines]))

    def _line(self, pair_id: int, margin: float) -> str:
        return json.dumps({"pair_id": pair_id, "text": self.texts[pair_id], "margin": margin}) + "\n"


def _read(path: Path) -> MarginsFile:
    """All complete lines."""
    try:
        header, *rows = map(json.loads, path.read_bytes().split(b"\n")[:-1])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        if lacking := HEADER - header.keys():
            raise ValueError(f"its first line lacks {', '.join(sorted(lacking))}")
        pairs = {int(row["pair_id"]): (str(row["text"]), float(row["margin"])) for row in rows}
        if bad := [pair_id for pair_id, (_, margin) in pairs.items() if not math.isfinite(margin)]:
            raise ValueError(f"the margin of pair_id {bad[0]} is no finite number")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no margins file of run.py predict, or is damaged ({type(error).__name__}: {error}): "
            "compute it anew"
        ) from None
    return MarginsFile(path, header, pairs)
