"""The shape of the house: which room may import which, and how large anything may grow (`make size` prints it all)."""

import ast
import inspect
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from statistics import median

import size
import torch
import yaml

FLOORS = [
    {"mixdpo.errors"},
    {"mixdpo.storage"},
    {"mixdpo.options", "mixdpo.routing", "mixdpo.batches", "mixdpo.constraints"},
    {"mixdpo.data", "mixdpo.first_look", "mixdpo.pages"},
    {"mixdpo.model"},
    {"mixdpo.losses", "mixdpo.signals", "mixdpo.token_cleaning", "mixdpo.metrics"},
    {"mixdpo.evaluation"},
    {"mixdpo.__main__"},
    {"datamodules", "lightning_modules"},
    {"run"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def name_of(path: Path) -> str:
    parts = path.relative_to(size.ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in size.source_files()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "mixdpo" else parts[:1])


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, in functions as well, but not under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            # `from mixdpo.losses import functions` is of a module, `… import DPO` of what a module holds
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in inner}
    return names


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def test_no_room_imports_from_its_own_floor_or_a_higher_one() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names & MODULES.keys())
        if room_of(name) != room_of(module) and FLOOR[room_of(name)] >= FLOOR[room_of(module)]
    ]
    assert wrong == []


def test_no_circle_of_imports() -> None:
    own = {module: (names & MODULES.keys()) - {module} for module, names in IMPORTS.items()}
    list(TopologicalSorter(own).static_order())  # raises CycleError with the modules


def test_mixdpo_never_imports_lightning() -> None:
    tops = {m: {name.split(".")[0] for name in names} for m, names in IMPORTS.items() if m.split(".")[0] == "mixdpo"}
    assert [module for module, names in tops.items() if names & LIGHTNING] == []


def test_sizes() -> None:
    files = [str(path.relative_to(size.ROOT)) for path in size.source_files() if size.lines(path) > size.FILE]
    assert files == []
    sizes = [function for path in size.source_files() for function in size.functions(path)]
    assert [place for lines, place in sizes if lines > size.FUNCTION] == []
    assert median(lines for lines, _ in sizes) <= size.MEDIAN
    assert size.lines(size.ROOT / "run.py") <= size.RUN


def test_budget() -> None:
    rooms = size.code_by_room()
    assert rooms.total() <= size.SOURCE
    assert sum(lines for room, lines in rooms.items() if room not in size.NOT_CORE) <= size.CORE
    assert sum(map(size.lines, (size.ROOT / "tests").rglob("*.py"))) <= size.TESTS


def test_code_lines_are_those_that_run(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('"""A\ndocstring."""\n\n# of x\nx = (\n    1,\n)\n"""Of x."""\n\n\ndef f():\n    """Of f."""\n')
    assert size.code_lines(file) == 4  # x takes three lines, f one


def test_from_the_demo_to_the_equation_in_two_hops() -> None:
    """1: configs/demo.yaml -> the room that its class path names. 2: the room -> the class with its equation."""
    demo = yaml.safe_load((size.ROOT / "configs/demo.yaml").read_text("utf-8"))
    room, _, name = demo["model"]["init_args"]["preference_loss"]["class_path"].rpartition(".")
    loss = getattr(import_module(room), name)
    assert name == "DPO" and loss.__module__ in {room, *IMPORTS[room]}
    source = inspect.getsource(loss)
    assert "logsigmoid" in source and "2305.18290" in source


def test_an_interface_that_only_a_gpu_run_calls() -> None:
    assert "including_emulation" in inspect.signature(torch.cuda.is_bf16_supported).parameters
