"""A study's YAML file: its runs, and the options of run.py for each."""

import json
import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from mixdpo.errors import InputError
from mixdpo.options import Parser
from mixdpo.storage.files import read_yaml
from mixdpo.storage.shipped import find_config

Point = dict[str, Any]
"""A point of the grid: option -> value."""

Arguments = list[tuple[str, str]]
"""Of one run of run.py: pairs of option and value."""


@dataclass(frozen=True)
class Plan:
    """How one run differs from the others.

    Args:
        overlay: config laid over the base and the study's options.
        options: options of run.py, laid over the overlay.
        control: run that this run is compared to; the study's control if null.
    """

    overlay: str | None = None
    options: dict = field(default_factory=dict)  # bare: jsonargparse would import the classes of a dict[str, Any]
    control: str | None = None


@dataclass(frozen=True)
class Spread:
    """Standard deviations that are assumed before the first run: over prompts, of the difference between two runs; over
    seeds, of the mean of that difference."""

    prompts: float
    seeds: float


@dataclass(frozen=True)
class Study:
    """A grid of runs and what to compare.

    Args:
        config: base config of every run.
        folder: where runs, logs and tables lie.
        runs: name -> `Plan`.
        prompts: file of held-out prompt rows with a `part`, or `heldout`. The runs' GoldEvaluation gets the same.
        outcomes: name -> parts of the prompts that the mean gold score is over; the first outcome is the main one.
        control: run that the others are compared to.
        holm: runs whose comparisons with their controls are one family: within an outcome, the chance that any of them
            is decided by luck is held at 5 % (Holm 1979).
        assumed_sd: for the smallest detectable difference, which is printed before the first run.
        seeds: of everything random in a run; the first one chooses the grid point.
        options: options of run.py for every run. An overlay, a run's own options and the grid go above them.
        grid: option -> values, the same for every run.
        choose_by: part of the prompts by whose mean gold score a run's grid point is chosen.
        at_once: runs at a time, which share the cores.
    """

    config: str
    folder: str
    runs: dict[str, Plan]
    prompts: str
    outcomes: dict[str, list[str]]
    control: str
    assumed_sd: Spread
    holm: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    options: dict = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    choose_by: str | None = None
    at_once: PositiveInt = 1

    def __post_init__(self) -> None:
        if not (self.runs and self.outcomes and self.seeds and all(self.grid.values())):
            raise InputError("runs, outcomes, seeds and each list of the grid need at least one entry")
        if lost := [run for run in self.runs if self.control_of(run) not in self.runs]:
            raise InputError(f"runs.{lost[0]}: no run is called {self.control_of(lost[0])!r}, its control: name a run")
        if lost := [run for run in self.holm if run not in self.runs or run == self.control_of(run)]:
            raise InputError(f"holm: {lost[0]!r} is no run that is compared to a control: name runs that are")
        if len(self.points) > 1 and self.choose_by is None:
            raise InputError("choose_by: name the part of the prompts by which a point of the grid is chosen")
        if chosen := [name for name, parts in self.outcomes.items() if self.choose_by in parts]:
            raise InputError(f"outcomes.{chosen[0]}: {self.choose_by} chooses the grid point and cannot be an outcome")
        names = [self.name(*job) for job in product(self.runs, self.points, self.seeds)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"grid, runs, seeds: two runs would be called {twice[0]}: choose other values or names")

    @property
    def points(self) -> list[Point]:
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    @property
    def size(self) -> int:
        """Number of jobs, which are runs of run.py, once every grid point is chosen."""
        return len(self.runs) * (len(self.points) + len(self.seeds) - 1)

    def control_of(self, run: str) -> str:
        return self.runs[run].control or self.control

    def name(self, run: str, point: Point, seed: int) -> str:
        values = [f"{key.rsplit('.', 1)[-1]}{value}" for key, value in point.items()]
        return re.sub(r"[^\w.+-]", "_", "-".join([run, *values, f"seed{seed}"]))

    def arguments(self, run: str, point: Point, seed: int) -> Arguments:
        plan, given = self.runs[run], [("config", find_config(self.config)), *self.options.items()]
        given += [("config", find_config(plan.overlay))] if plan.overlay else []
        given += [*plan.options.items(), *point.items(), ("seed_everything", seed), ("data.seed", seed)]
        given += [("runs", self.folder), ("name", self.name(run, point, seed))]
        return [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in given]


def read_study(path: str | Path) -> Study:
    """
    Raises:
        InputError: the file is missing or no YAML, a key is unknown or missing, a type is wrong, or runs do not fit.
    """
    content = read_yaml(find_config(str(path)), "study")
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        return Study(**vars(parser.instantiate(parser.parse_object(content))))
    except (ArgumentError, InputError, AttributeError) as error:  # AttributeError: the file is no mapping
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
