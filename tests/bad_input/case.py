"""One row of the table, and what it may use."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conftest import build, build_sft, fit, make_pairs, make_samples, write_pairs

from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.export import save_adapter
from mixdpo.model.loading import load_base
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import Random

GONE = object()
"""In a change of a row: the column is left out."""


class Shared:
    """What several cases start from, made once and then only read or copied."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.pairs = write_pairs(folder / "pairs.jsonl", make_pairs(16))
        self.samples = write_pairs(folder / "samples.jsonl", make_samples(12))

    @cached_property
    def run(self) -> Path:
        """A run of two steps over pairs."""
        fit(self.model, self.pairs, self.folder / "run", trainer={"max_steps": 2})
        return self.folder / "run"

    @cached_property
    def cleaned(self) -> Path:
        """A run over samples with token cleaning."""
        cleaning = Cleaning(scorer=Random())
        fit(self.model, self.samples, self.folder / "cleaned", make=build_sft, cleaning=cleaning)
        return self.folder / "cleaned"

    @cached_property
    def adapter(self) -> Path:
        save_adapter(add_adapters(self.base(), Lora(rank=2)), self.folder / "adapter")
        return self.folder / "adapter"

    def base(self, folder: Any = None) -> Any:
        return load_base(str(folder or self.model), quantization="none", dtype="float32")


@dataclass
class Place:
    """A folder of a case's own, and what all share."""

    folder: Path
    shared: Shared

    @property
    def model(self) -> str:
        return self.shared.model

    def write(self, name: str, content: bytes | str | list[Any]) -> str:
        """A file of bytes, text, or rows (json lines); packed if it is called .gz and is no bytes."""
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogatepass")
            content = gzip.compress(content) if name.endswith(".gz") else content
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def fit(self, *, make: Any = build, source: str | None = None, model: str | None = None, **options: Any) -> Any:
        source = source or (self.shared.samples if make is build_sft else self.shared.pairs)
        return fit(model or self.model, source, self.folder / "run", make=make, **options)

    def fit_sft(self, **options: Any) -> Any:
        return self.fit(make=build_sft, **options)


@dataclass(frozen=True)
class Case:
    """`do` must end in an `InputError`, or give the log (text) of a tolerance; `says` are parts of either: where it
    is, and what to do or how many there are."""

    entrance: str
    fault: str
    do: Callable[[Place], Any]
    says: tuple[str, ...]
    tolerated: bool = False

    @property
    def name(self) -> str:
        return f"{self.entrance}: {self.fault}"


def parts(says: str | tuple[str, ...]) -> tuple[str, ...]:
    """ "a … b" is short for ("a", "b")."""
    return tuple(says.split(" … ")) if isinstance(says, str) else says


def cases(entrance: str, *rows: tuple[str, Callable[[Place], Any], str | tuple[str, ...]]) -> list[Case]:
    """Cases of one entrance: fault, what is done, what is said."""
    return [Case(entrance, fault, do, parts(says)) for fault, do, says in rows]


def changed(row: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (row | change).items() if value is not GONE}
