"""The page of a run, or of several: curves, histograms, tables, responses; and the differences between runs."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt

from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import paired_bootstrap
from mixdpo.evaluation.fit_results import HELD_OUT, ORDER, read_columns
from mixdpo.pages import public, template
from mixdpo.pages.figures import Series, draw
from mixdpo.storage import identity
from mixdpo.storage.files import read_text, write_text
from mixdpo.storage.read import parse_yaml

METRICS, RESPONSES, PLANS = "metrics.csv", "responses.json", ("route.json", "plan.json")
READERS: dict[str, Callable[[Path], Any]] = dict.fromkeys((METRICS, ORDER, HELD_OUT), read_columns)
READERS |= dict.fromkeys((RESPONSES, "results.json", *PLANS), lambda path: json.loads(read_text(path)))
READERS["config.yaml"] = lambda path: public(read_text(path))


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        files: name → content of the files that are there.
        tables: file → column → its values (N,); no columns where the file is absent.
        plan: of route.json or plan.json.
    """

    name: str
    folder: Path
    files: Mapping[str, Any]
    tables: Mapping[str, dict[str, np.ndarray]]
    plan: Mapping[str, Any]

    def absent(self) -> list[str]:
        return [name for name in READERS if name not in self.files and not (name in PLANS and self.plan)]

    def outcomes(self) -> dict[str, dict[Any, float]]:
        """Name of a measure → its values by held-out pair or prompt."""
        columns = (self.tables[HELD_OUT].get(name, ()) for name in ("pair_id", "rewards/accuracy"))
        rows = [(str(row["prompt"]), row["after"]) for row in self.files.get(RESPONSES, ())]
        scores = {prompt: after["score"] for prompt, after in rows if after["score"] is not None}
        tokens = {prompt: after["tokens"] for prompt, after in rows}
        accuracy = {number: value for number, value in zip(*columns, strict=True) if np.isfinite(value)}
        return {"reward accuracy": accuracy, "gold score": scores, "response length, tokens": tokens}

    def most_changed(self) -> list[Mapping[str, Any]]:
        """Responses whose scores changed most, in either direction; the first ones where there are no scores."""
        before, after = ([row[k]["score"] or 0 for row in self.files.get(RESPONSES, ())] for k in ("before", "after"))
        return [self.files[RESPONSES][i] for i in np.argsort(-np.abs(np.subtract(after, before)), kind="stable")[:12]]


def read_run(folder: str, name: str) -> Run:
    """
    Raises:
        InputError: the folder holds no run, or a file is damaged.
    """
    files: dict[str, Any] = {}
    for file, read in READERS.items():
        try:
            files |= {file: read(path)} if (path := Path(folder, file)).exists() else {}
        except (ValueError, IndexError) as error:
            raise InputError(f"{path} is damaged ({error}): remove the file to get a page without it") from None
    if not files and not Path(folder, "cleaning").exists():
        raise InputError(f"{folder} holds no {METRICS}, config.yaml, …: give the folder of a run")
    tables = {file: files.get(file, {}) for file in (METRICS, ORDER, HELD_OUT)}
    for side in ("easy", "hard") if (order := tables[ORDER]) else ():
        order[f"margin/{side}"] = np.where(order["hard"] == (side == "hard"), order["margin"], np.nan)
    rows, plan = files.get(RESPONSES, ()), files.get("route.json") or files.get("plan.json", {})
    tokens = {when: np.array([row[when]["tokens"] for row in rows], float) for when in ("before", "after")}
    return Run(name, Path(folder), files, tables | {RESPONSES: tokens}, plan)


@dataclass
class Panels:
    """Draws columns of the runs. `empty` lists the titles of figures for which no run has data."""

    runs: Sequence[Run]
    empty: list[str] = field(default_factory=list)

    def __call__(self, title: str, file: str, columns: dict[str, str], x: str | None = "step", **options: Any) -> Any:
        """`columns` (label → column of `file`) against column x, or their histograms where x is None.

        Of one run each column has a colour. Of several each run has one, and the first two columns are drawn.
        """
        one, series = len(self.runs) == 1, []
        for number, run in enumerate(self.runs):
            for place, (label, column) in enumerate([*columns.items()][: None if one else 2]):
                values = run.tables[file].get(column, np.empty(0))
                if (finite := np.isfinite(values)).any():
                    look = (label, place, 0) if one else (f"{run.name}: {label}", number, place)
                    series.append(Series(run.tables[file][x][finite] if x else None, values[finite], *look))
        return {"series": series, "svg": draw(title, series, **options)} if series else self.empty.append(title)


def differences(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Rows of each run against the first: mean differences over what both measured, with paired 95 % intervals."""
    first = runs[0].outcomes()
    for run in runs[1:]:
        for measure, ours in run.outcomes().items():
            if len(both := [key for key in ours if key in first[measure]]) > 1:
                before, after = ([values[key] for key in both] for values in (first[measure], ours))
                gain = paired_bootstrap(before, after, samples=2_000)
                row = {"run": run.name, "measure": measure, "n": len(both), "means": [np.mean(before), np.mean(after)]}
                yield row | {"gain": gain, "decided": gain.decides(len(both))}


def report(runs: list[str], out: str | None = None, samples: NonNegativeInt = 12, seed: int = 0) -> None:
    """Write one page that shows a run, or compares several runs with the first: curves, margins, responses, intervals.

    Args:
        runs: folders of runs.
        out: the .html file to write, replaced if it exists; default report.html, of one run in its folder.
        samples: of a run with token cleaning, number of samples to show, spread over stages and sources.
        seed: of the choice of samples.

    Raises:
        InputError: a folder is none of a run, a file is damaged, or the tokenizer of a cleaned run cannot be loaded.
    """
    names = [Path(run).resolve().name for run in runs]
    read = [read_run(run, name if names.count(name) == 1 else run) for run, name in zip(runs, names, strict=True)]
    cleaning = None
    if len(runs) == 1 and Path(runs[0], "cleaning").exists():
        from mixdpo.evaluation.cleaning_page import cleaning_part

        cleaning = cleaning_part(runs[0], samples, seed)
    configs = [parse_yaml(run.files.get("config.yaml", "{}"), run.name, finite=False) for run in read]
    options = {run.name: identity.differences(configs[0], config) for run, config in zip(read, configs, strict=True)}
    content = {"runs": read, "panels": Panels(read), "differences": list(differences(read)), "cleaning": cleaning}
    page = template("report.html").render(title=" · ".join(names), quote=shlex.quote, options=options, **content)
    path = Path(out or Path(runs[0] if len(runs) == 1 else "", "report.html"))
    write_text(path, page)
    print(f"wrote {path}")
