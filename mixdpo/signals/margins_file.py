"""Margins files: a signal's margin of each pair in a data set, found by the pair's id and text.

FILE holds JSON lines: a header, then `{"pair_id", "text", "margin"}` for each pair, `text` being `text_hash`. FILE is
always complete; margins that are being computed are in FILE.part.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixdpo.data.table import Dataset
from mixdpo.errors import InputError
from mixdpo.storage.files import read_text, write_rows
from mixdpo.storage.identity import differences
from mixdpo.storage.read import parse_json
from mixdpo.storage.store import Store

FORMAT = "mixdpo margins 1"
ANEW = "compute it anew by run.py predict"
OTHER = "remove it or give another model.output"


def text_hash(pair: Mapping[str, Any]) -> str:
    """16 hex digits of prompt messages, chosen and rejected response, and of the `context` if there is one."""
    messages = [[message["role"], message["content"]] for message in pair["prompt"]]
    content = [messages, pair["chosen"], pair["rejected"], *filter(None, [pair.get("context")])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MarginsFile:
    """`pairs`: pair id -> (text hash, margin)."""

    path: Path
    header: dict[str, Any]
    pairs: dict[int, tuple[str, float]]

    @property
    def of_policy(self) -> bool:
        """Whether the margins were computed by the model to be trained. They then fit no other model."""
        return self.header["needs"] in ("policy", "adapter")

    def add_to(self, pairs: Dataset, texts: Mapping[int, str], source: str) -> Dataset:
        """The pairs, with their margins replaced by those of this file. `texts`: pair id -> text hash.

        Raises:
            InputError: pairs are missing or have another text in the file; says how many, and the row of the first.
        """
        ids = pairs["pair_id"][:]
        kept = [self.pairs.get(pair_id, ("", math.nan)) for pair_id in ids]
        if bad := [i for i, (text, _) in enumerate(kept) if text != texts[ids[i]]]:
            misfits = f"{len(bad)} of the {len(pairs)} pairs of {source} (first: row {pairs[bad[0]]['row']})"
            raise InputError(f"{self.path}, made of {self.header['source']}, does not fit {misfits}: {ANEW}")
        return pairs.remove_columns("margin").add_column("margin", [margin for _, margin in kept])

    def refuse_other(self, current: Mapping[str, str | None], what: str) -> None:
        """
        Raises:
            InputError: the margins are of a policy, and a part in `current` differs from the header.
        """
        changed = differences({key: self.header.get(key, "not recorded") for key in current}, current)
        if self.of_policy and changed:
            raise InputError(f"{self.path} was made with another {what} ({'; '.join(changed)}): {ANEW}")


def read_margins(path: str | Path) -> MarginsFile:
    """
    Raises:
        InputError: there is no such file, `run.py predict` has not written it, or the file is damaged.
    """
    first, *lines = read_text(path).removesuffix("\n").split("\n")
    header = parse_json(first, f"{path} is no margins file: line 1", ANEW)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is no margins file (its format is not {FORMAT!r}): {ANEW}")
    pairs = dict(_pair(line, f"{path}, line {number},") for number, line in enumerate(lines, 2))
    if len(pairs) != header["pairs"]:
        raise InputError(f"{path} has {len(pairs)} of its {header['pairs']} pairs: {ANEW}")
    return MarginsFile(Path(path), header, pairs)


def _pair(line: str, where: str) -> tuple[int, tuple[str, float]]:
    row = parse_json(line, where, ANEW)
    try:
        return int(row["pair_id"]), (str(row["text"]), float(row["margin"]))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{where} is damaged ({type(error).__name__}: {error}): {ANEW}") from None


class MarginsWriter:
    def __init__(self, path: str, header: Mapping[str, Any], texts: Mapping[int, str]) -> None:
        """Collects margins in FILE.part, so that the same command continues an interrupted computation. `margins` holds
        the margins known so far, by pair id.

        Args:
            path: FILE.
            header: everything that the margins depend on. An existing FILE or FILE.part must have the same header.
            texts: pair id -> text hash of all pairs, in the order of the data.

        Raises:
            InputError: FILE or FILE.part holds something else, or another process is writing FILE.part.
        """
        self.path, self.part, self.texts = Path(path), Path(f"{path}.part"), texts
        self.header = json.loads(json.dumps({"format": FORMAT, **header, "pairs": len(texts)}))
        self._store: Any = None
        if not self.path.exists():
            self._store = Store(self.part, self.header, noun="margins", remedy=OTHER)
            self.margins = {int(pair_id): float(margin) for pair_id, margin in self._store.get().items()}
            return
        file = read_margins(path)
        if changed := differences({**file.header, "date": None}, self.header):
            raise InputError(f"{path} holds other margins ({'; '.join(changed)}): {OTHER}")
        self.margins = {pair_id: margin for pair_id, (_, margin) in file.pairs.items()}

    def append(self, pair_ids: Iterable[int], margins: Iterable[float]) -> None:
        """Keep the margins of one batch.

        Raises:
            InputError: a margin is not finite.
        """
        new = dict(zip(pair_ids, margins, strict=True))
        if bad := {pair_id: margin for pair_id, margin in new.items() if not math.isfinite(margin)}:
            raise InputError(f"margins (by pair id) are not finite: {bad}. Use a wider model.dtype")
        self._store.add({pair_id: repr(margin).encode() for pair_id, margin in new.items()})
        self.margins |= new

    def finish(self) -> str:
        """Make FILE of FILE.part, in the order of the data, if all margins are known. Returns a line for the user."""
        if self._store is None:
            return f"{self.path} was complete already: {len(self.texts)} pairs"
        with self._store:
            if len(self.margins) < len(self.texts):
                return f"{self.part} has {len(self.margins)} of {len(self.texts)} pairs: the same command continues it"
            rows = [{"pair_id": key, "text": text, "margin": self.margins[key]} for key, text in self.texts.items()]
            write_rows(self.path, [{**self.header, "date": time.strftime("%Y-%m-%d %H:%M:%S")}, *rows])
        self.part.unlink(missing_ok=True)  # another process may have waited for the same pairs
        return f"wrote {self.path}: {len(self.texts)} pairs"

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
