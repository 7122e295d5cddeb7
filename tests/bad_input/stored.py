"""Files that a run leaves for another one: margins, and what token cleaning decided."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from bad_input.case import Case, Place, cases
from mixdpo.signals.compare_margins import compare
from mixdpo.signals.margins_file import FORMAT, MarginsWriter, read_margins
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.report import report
from mixdpo.token_cleaning.run_tokens import export_labels, read_cleaning

# Margins files.

HEAD = {"signal": "x", "needs": "rating", "source": "x", "base": "x", "adapter": None, "pairs": 2}
FIRST = {"format": FORMAT, **HEAD}
LINES: list[Any] = [FIRST, {"pair_id": 1, "text": "a", "margin": 0.5}, {"pair_id": 2, "text": "b", "margin": 1.0}]
ANEW = "compute it anew"
DEEP = "[" * 100_000
MARGINS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("nothing", "", ("is no margins file", ANEW)),
    ("bytes", b"\x93NUMPY\xff\n", ("cannot be read", "a text file in UTF-8")),
    ("another format", [FIRST | {"format": "2"}, *LINES[1:]], ("its format is not", ANEW)),
    ("a pair lost", LINES[:2], ("has 1 of its 2 pairs", ANEW)),
    ("a margin of NaN", [*LINES[:2], LINES[2] | {"margin": float("nan")}], ("line 3", "NaN is no finite number", ANEW)),
    ("a row without its text", [*LINES[:2], {"pair_id": 2, "margin": 1.0}], ("line 3", "KeyError: 'text'", ANEW)),
]


def margins_case(fault: str, content: Any, says: tuple[str, ...]) -> Case:
    return Case(
        "margins file", fault, lambda place: read_margins(place.write("m.margins", content)), ("m.margins", *says)
    )


def trained_with(content: list[Any]) -> Any:
    return lambda place: place.fit(data={"margins_file": place.write("m.margins", content)})


def of_a_policy(place: Place) -> Any:
    return place.fit(data={"margins_file": place.write("m.margins", [FIRST | {"needs": "policy"}, *LINES[1:]])})


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


def edited(name: str, **values: Any) -> Callable[[Path], Any]:
    def fault(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return fault


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Any]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def cut(name: str, keep: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def masked(place: Place, run: Path) -> Any:
    return place.fit_sft(cleaning=Cleaning(masks=str(run / "cleaning")))


def read(place: Place, run: Path) -> Any:
    return read_cleaning(str(run))


def holed(weights: np.ndarray) -> np.ndarray:
    weights[3] = np.nan
    return weights


def other_data(place: Place) -> Any:
    rows = [json.loads(line) for line in Path(place.shared.samples).read_text().splitlines()]
    source = place.write("other.jsonl", rows[:-1])
    return place.fit_sft(source=source, cleaning=Cleaning(masks=str(place.shared.cleaned / "cleaning")))


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
        ("no such folder", lambda place: place.fit_sft(cleaning=MASKS), "masks x … give a run's folder RUN/cleaning"),
        ("of other data", other_data, ("data: ", SCORE_AGAIN)),
        (
            "of another length",
            lambda place: place.fit_sft(
                cleaning=Cleaning(masks=str(place.shared.cleaned / "cleaning")), data={"max_length": 60}
            ),
            ("lengths: ", SCORE_AGAIN),
        ),
        ("stages.json cut off", cleaned(cut("stages.json", 99), masked), ("stages.json is damaged", RUN_AGAIN)),
        ("a weight too few", cleaned(array("weights.npy", lambda w: w[:-1]), masked), ("of the shape", RUN_AGAIN)),
        ("tokens never reached", cleaned(array("weights.npy", holed), masked), "has no weight for … that reached all"),
    ),
    *cases(
        "mixdpo report",
        ("no run", lambda place: report(str(place.folder)), "is no token-cleaning run … give the run's folder"),
    ),
    *cases(
        "mixdpo export-labels",
        (
            "scores of another length",
            cleaned(array("scores.npy", lambda s: s[1:]), read),
            ("scores.npy holds", RUN_AGAIN),
        ),
        ("samples of another run", cleaned(backwards, read), ("samples holds other tokens than", RUN_AGAIN)),
        (
            "out is there",
            lambda place: export_labels(str(place.shared.cleaned), str(place.folder)),
            "exists … --overwrite true",
        ),
    ),
]

CASES = [
    *(margins_case(*row) for row in MARGINS),
    *cases(
        "margins file",
        ("no such file", lambda place: read_margins("/no.margins"), "/no.margins … run.py predict makes it"),
        ("of other pairs", trained_with(LINES), ("does not fit 16 of the 16 pairs", "first: row 1", ANEW)),
        ("of another policy", of_a_policy, "another encoding of the pairs … use the options it was made with"),
        ("of another signal, to be continued", continued, "signal: y there, x here … give another model.output"),
        ("a margin that is infinite", not_finite, "by pair id … Use a wider model.dtype"),
        ("no pair in common", compared, "no pair in common … give two files of the same data"),
    ),
    *CLEANING,
]
