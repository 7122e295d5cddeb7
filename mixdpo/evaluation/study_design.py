"""A study's YAML file: which runs there are, and the options of run.py for each."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from mixdpo.errors import InputError, check_one_of
from mixdpo.storage.files import read_text

Point = dict[str, Any]
"""A point of the grid: option -> value."""


@dataclass(frozen=True)
class Plan:
    """How one run differs from the others.

    Args:
        overlay: config laid over the base and the study's options.
        options: options of run.py, laid over that.
        after: run whose adapter, of the same seed, this one starts from.
        control: run that it is compared to; the study's if null.
    """

    overlay: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    control: str | None = None


@dataclass(frozen=True)
class Job:
    """One run of run.py. `arguments`: pairs of option and value; `start`: the job whose adapter it starts from."""

    name: str
    run: str
    point: Point
    seed: int
    arguments: tuple[tuple[str, str], ...]
    start: str | None = None


@dataclass(frozen=True)
class Study:
    """A grid of runs and what to compare.

    Args:
        config: base config of every run.
        folder: where runs, logs, tables and plots lie.
        runs: name -> `Plan`.
        prompts: file of held-out prompt rows with a `part`, or `heldout`: what the runs' GoldEvaluation responses.
        outcomes: name -> parts of the prompts whose mean gold score it is; the first is the main one.
        control: run that the others are compared to.
        assumed_sd: `prompts`: standard deviation over prompts of the difference between two runs; `seeds`: over seeds
            of its mean. For what is said before the first run.
        seeds: of everything random in a run; the first one chooses the grid point.
        options: options of run.py for every run. An overlay, a run's own options and the grid go above them.
        grid: option -> values, the same for every run.
        choose_by: part of the prompts by whose mean gold score a run's grid point is chosen.
        at_once: runs at a time, which share the cores.
        minutes_per_run: for the estimate before any run has been timed.
    """

    config: str
    folder: str
    runs: dict[str, Any]
    prompts: str
    outcomes: dict[str, list[str]]
    control: str
    assumed_sd: dict[str, float]
    seeds: list[int] = field(default_factory=lambda: [0])
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    choose_by: str | None = None
    at_once: int = 1
    minutes_per_run: float | None = None

    def __post_init__(self) -> None:
        for name, plan in self.runs.items():
            others = {"after": plan.after, "control": plan.control or self.control}
            if wrong := [f"{key} {other!r}" for key, other in others.items() if other not in (None, *self.runs)]:
                raise InputError(f"runs.{name}: {' and '.join(wrong)}: no such run; there are {', '.join(self.runs)}")
            self._check_chain(name)
        if not (self.runs and self.outcomes and self.seeds and len(set(self.seeds)) == len(self.seeds)):
            raise InputError("runs, outcomes and seeds must not be empty, and a seed must come once")
        if self.at_once < 1 or set(self.assumed_sd) != {"prompts", "seeds"}:
            raise InputError("at_once must be at least 1, and assumed_sd needs exactly the keys prompts and seeds")
        if self.options.get("data.validation") != 0 and not isinstance(self.options.get("data.validation"), str):
            raise InputError("options: data.validation must be 0 or a file: a share would be split anew for each seed")
        if empty := [option for option, values in self.grid.items() if not values]:
            raise InputError(f"grid.{empty[0]}: give at least one value, or leave the option out")
        if len(self.points) > 1 and self.choose_by is None:
            raise InputError("choose_by: name the part of the prompts by which a point of the grid is chosen")
        if chosen := [name for name, parts in self.outcomes.items() if self.choose_by in parts]:
            raise InputError(f"outcomes.{chosen[0]}: {self.choose_by} chooses the grid point and cannot be an outcome")
        names = [self.name(run, point, self.seeds[0]) for run in self.runs for point in self.points]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(
                f"grid, runs: two of them would be called {sorted(twice)[0]}: choose other values or names"
            )

    def _check_chain(self, name: str) -> None:
        seen, after = [name], self.runs[name].after
        while after is not None:
            if after in seen:
                raise InputError(f"runs.{name}: after goes round in a circle: {' → '.join([*seen, after])}")
            seen, after = [*seen, after], self.runs[after].after if after in self.runs else None

    @property
    def points(self) -> list[Point]:
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    @property
    def size(self) -> int:
        """How many jobs there are once every grid point is chosen."""
        return len(self.runs) * (len(self.points) + len(self.seeds) - 1)

    def control_of(self, run: str) -> str:
        return self.runs[run].control or self.control

    def name(self, run: str, point: Point, seed: int) -> str:
        values = [f"{key.rsplit('.', 1)[-1]}{value}" for key, value in point.items()]
        return re.sub(r"[^\w.+-]", "_", "-".join([run, *values, f"seed{seed}"]))

    def job(self, run: str, point: Point, seed: int, start: str | None = None) -> Job:
        plan, name = self.runs[run], self.name(run, point, seed)
        arguments = [("--config", self.config), *_flags(self.options)]
        arguments += [("--config", plan.overlay)] if plan.overlay else []
        arguments += [*_flags(plan.options), *_flags(point)]
        # the data's seed orders ties, shuffles and draws random routes; it splits nothing, see data.validation
        arguments += _flags({"seed_everything": seed, "data.seed": seed, "runs": self.folder, "name": name})
        arguments += _flags({"model.adapter": f"{self.folder}/{start}/adapter"}) if start else []
        return Job(name, run, point, seed, tuple(arguments), start)


def read_study(path: str | Path) -> Study:
    """
    Raises:
        InputError: no such file, no YAML, an unknown or missing key, a wrong type, or runs that do not fit together.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a study's YAML file, such as configs/studies/noisy_labels.yaml")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: no YAML ({' '.join(str(error).split())}): correct it") from error
    try:
        values = _checked(Study, content, "")
        runs = {name: Plan(**_checked(Plan, plan, f"runs.{name}.")) for name, plan in values["runs"].items()}
        return Study(**{**values, "runs": runs})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _checked(cls: type, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where.rstrip('.') or 'the file'}: need a mapping of {cls.__name__}'s keys, not {values!r}")
    known = {f.name: f for f in fields(cls)}
    for key in values:
        check_one_of(f"{where}{key}: the key", key, known)
    required = (name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
    if absent := [name for name in required if name not in values]:
        raise InputError(f"{where}{absent[0]} is missing")
    for key, value in values.items():
        if not _fits(value, hint := known[key].type):
            expected = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
            raise InputError(f"{where}{key}: expected {expected}, not {value!r}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return type(value) in (int, float) if hint is float else type(value) is hint


def _flags(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in options.items()]
