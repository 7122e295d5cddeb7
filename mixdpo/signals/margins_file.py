"""Margins files: a signal's margin of each pair of a data set, found again by the pair's id and text.

After the header, a line `{"pair_id", "text", "margin"}` for each pair, `text` being `text_hash`. FILE is always
complete; what is being computed is in FILE.part.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdpo.errors import InputError
from mixdpo.storage.files import written_whole
from mixdpo.storage.identity import differences
from mixdpo.storage.lines_file import LineFormat, LinesWriter

if TYPE_CHECKING:
    from datasets import Dataset


def _parse(row: dict[str, Any], header: dict[str, Any]) -> tuple[int, tuple[str, float]]:
    margin = float(row["margin"])
    if not math.isfinite(margin):
        raise ValueError(f"the margin of pair_id {row['pair_id']} is no finite number")
    return int(row["pair_id"]), (str(row["text"]), margin)


MARGINS = LineFormat(
    name="mixdpo margins 1",
    noun="margins file of run.py predict",
    rows="margins",
    header={"pairs": int, "signal": str, "needs": str, "source": str, "base": str, "adapter": object},
    parse=_parse,
    remedy="compute it anew",
    other="remove it or give another model.output",
)
"""Margins of a policy also say in their header what decides them."""


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
        changed = differences({key: self.header.get(key, "not said") for key in here}, here)
        if self.of_policy and changed:
            with_ = ", ".join(str(self.header.get(key)) for key in ("base", "adapter", "dtype", "lengths"))
            raise InputError(
                f"{self.path} holds margins ({self.header['signal']}) that were made with another {what} "
                f"({'; '.join(changed)}): use the options it was made with (base, adapter, dtype, lengths: {with_}), "
                "or compute it anew"
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
    file = MarginsFile(Path(path), *MARGINS.read(path))
    if len(file.pairs) != file.header["pairs"]:
        raise InputError(f"{path} has {len(file.pairs)} of its {file.header['pairs']} pairs: {MARGINS.remedy}")
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
            InputError: FILE or FILE.part holds something else, or another process is writing FILE.part.
        """
        self.path, self.part, self.texts = Path(path), Path(f"{path}.part"), texts
        header = {**header, "pairs": len(texts)}
        self._lines = None if self.path.exists() else LinesWriter(self.part, MARGINS, header)
        if self._lines is not None and not self.path.exists():
            found = self._lines.rows
        else:  # from before, or by another process that had the lock until now
            if self._lines is not None:
                self.part.unlink()
                self.close()
                self._lines = None
            there = read_margins(path)
            MARGINS.refuse_other(path, there.header, json.loads(json.dumps({"format": MARGINS.name, **header})))
            found = there.pairs
        self.margins = {pair_id: margin for pair_id, (_, margin) in found.items()}

    def append(self, pair_ids: Iterable[int], margins: Iterable[float]) -> None:
        """Keep the margins of one batch.

        Raises:
            InputError: a margin is not finite.
        """
        found = dict(zip(pair_ids, margins, strict=True))
        if bad := {pair_id: margin for pair_id, margin in found.items() if not math.isfinite(margin)}:
            raise InputError(f"margins by pair id that are no finite numbers: {bad}. Use a wider model.dtype")
        assert self._lines is not None
        self._lines.append(*map(self._line, found.items()))
        self.margins |= found

    def finish(self) -> str:
        """Make FILE of FILE.part, in the order of the data, if all pairs are known; says what has become of it."""
        if self._lines is None:
            return f"{self.path} was complete already: {len(self.texts)} pairs"
        with self._lines:
            if len(self.margins) < len(self.texts):
                return f"{self.part} has {len(self.margins)} of {len(self.texts)} pairs: the same command continues it"
            lines = [self._lines.header, *(self._line((pair_id, self.margins[pair_id])) for pair_id in self.texts)]
            with written_whole(self.path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
            self.part.unlink()
        return f"wrote {self.path}: {len(self.texts)} pairs"

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _line(self, of: tuple[int, float]) -> dict[str, Any]:
        return {"pair_id": of[0], "text": self.texts[of[0]], "margin": of[1]}
