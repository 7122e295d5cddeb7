"""Files that a run leaves for another one: margins, and what token cleaning decided."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from bad_input.case import Case, Place, cases
from bad_input.models import cut
from mixdpo.signals.compare_margins import compare
from mixdpo.signals.margins_file import FORMAT, MarginsWriter, read_margins
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.run_tokens import read_cleaning

HEAD = {"signal": "x", "needs": "rating", "source": "x", "base": "x", "adapter": None, "pairs": 2}
FIRST = {"format": FORMAT, **HEAD}
LINES: list[Any] = [FIRST, {"pair_id": 1, "text": "a", "margin": 0.5}, {"pair_id": 2, "text": "b", "margin": 1.0}]
OF_A_POLICY = FIRST | {"needs": "policy"}
ANEW = "compute it anew"
MARGINS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("nothing", "", ("is no margins file", ANEW)),
    ("bytes", b"\x93NUMPY\xff\n", ("cannot be read", "a text file in UTF-8")),
    ("another format", [FIRST | {"format": "2"}, *LINES[1:]], ("its format is not", ANEW)),
    ("a pair lost", LINES[:2], ("has 1 of its 2 pairs", ANEW)),
    ("a margin of NaN", [*LINES[:2], LINES[2] | {"margin": float("nan")}], ("line 3", "NaN is no finite number", ANEW)),
    ("a row without its text", [*LINES[:2], {"pair_id": 2, "margin": 1.0}], ("line 3", "KeyError: 'text'", ANEW)),
]


def margins_case(fault: str, content: Any, says: tuple[str, ...]) -> Case:
    do = lambda place: read_margins(place.write("m.margins", content))  # noqa: E731
    return Case("margins file", fault, do, ("m.margins", *says))


def trained_with(*content: Any) -> Any:
    return lambda place: place.fit(data={"margins_file": place.write("m.margins", list(content))})


def continued(place: Place) -> Any:
    MarginsWriter(str(place.folder / "m.margins"), HEAD | {"signal": "y"}, {1: "a", 2: "b"}).close()
    return MarginsWriter(str(place.folder / "m.margins"), HEAD, {1: "a", 2: "b"})


def not_finite(place: Place) -> Any:
    writer = MarginsWriter(str(place.folder / "m.margins"), HEAD, {1: "a"})
    return writer.append([1], [float("inf")])


def compared(place: Place) -> Any:
    other = [FIRST, *({"pair_id": i, "text": "z", "margin": 1.0} for i in (1, 2))]
    return compare(place.write("a.margins", LINES), place.write("b.margins", other))


# Token cleaning: a copy of a run with a fault.
MASKS = Cleaning(masks="x")


def cleaned(fault: Callable[[Path], Any], use: Callable[[Place, Path], Any]) -> Any:
    def do(place: Place) -> Any:
        copy = place.folder / "earlier"
        shutil.copytree(place.shared.cleaned, copy)
        fault(copy / "cleaning")
        return use(place, copy)

    return do


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def masks_of(run: Path) -> Cleaning:
    return Cleaning(masks=str(run / "cleaning"))


def masked(place: Place, run: Path) -> Any:
    return place.fit_sft(cleaning=masks_of(run))


def read(place: Place, run: Path) -> Any:
    return read_cleaning(str(run))


def holed(weights: np.ndarray) -> np.ndarray:
    weights[3] = np.nan
    return weights


def other_data(place: Place) -> Any:
    rows = [json.loads(line) for line in Path(place.shared.samples).read_text().splitlines()]
    return place.fit_sft(source=place.write("other.jsonl", rows[:-1]), cleaning=masks_of(place.shared.cleaned))


def shorter(place: Place) -> Any:
    return place.fit_sft(cleaning=masks_of(place.shared.cleaned), data={"max_length": 60})


def backwards(folder: Path) -> None:
    """Samples as of another run: as many tokens, other ones."""
    samples = load_from_disk(str(folder / "samples")).map(lambda row: {"input_ids": row["input_ids"][::-1]})
    samples.save_to_disk(str(folder / "others"))
    shutil.rmtree(folder / "samples")
    (folder / "others").rename(folder / "samples")


SCORE_AGAIN, RUN_AGAIN = "or score anew", "run the cleaning again"
CLEANING = [
    *cases(
        "cleaning.masks",
        ("no such folder", lambda place: place.fit_sft(cleaning=MASKS), "x has no stages.json … RUN/cleaning"),
        ("of other data", other_data, f"data:  … {SCORE_AGAIN}"),
        ("of another length", shorter, f"lengths:  … {SCORE_AGAIN}"),
        ("stages.json cut off", cleaned(cut("stages.json", 99), masked), f"stages.json is damaged … {RUN_AGAIN}"),
        ("a weight too few", cleaned(array("weights.npy", lambda w: w[:-1]), masked), f"of the shape … {RUN_AGAIN}"),
        ("tokens never reached", cleaned(array("weights.npy", holed), masked), "lacks weights of … that reached all"),
    ),
    *cases(
        "read_cleaning",
        ("no run", lambda place: read_cleaning(str(place.folder)), "no stages.json: give a run with token cleaning"),
        ("a score too few", cleaned(array("scores.npy", lambda s: s[1:]), read), f"scores.npy holds … {RUN_AGAIN}"),
        ("no samples", cleaned(lambda path: shutil.rmtree(path / "samples"), read), f"is damaged … {RUN_AGAIN}"),
        ("samples of another run", cleaned(backwards, read), f"samples holds other tokens than … {RUN_AGAIN}"),
    ),
]

CASES = [
    *(margins_case(*row) for row in MARGINS),
    *cases(
        "margins file",
        ("no such file", lambda place: read_margins("/no.margins"), "/no.margins … cannot be read"),
        ("of other pairs", trained_with(*LINES), ("does not fit 16 of the 16 pairs", "first: row 1", ANEW)),
        ("of another policy", trained_with(OF_A_POLICY, *LINES[1:]), "another encoding of the pairs … compute it anew"),
        ("of another signal, to be continued", continued, "signal: y there, x here … give another model.output"),
        ("a margin that is infinite", not_finite, "by pair id … Use a wider model.dtype"),
        ("no pair in common", compared, "no pair in common … give two files of the same data"),
    ),
    *CLEANING,
]
