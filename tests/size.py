"""Lines of code by room against the budget: `python tests/size.py`. Code is neither blank, comment nor docstring."""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SOURCE, CORE = 8_650, 6_000
TESTS = 17_640  # in lines of any kind
FILE, FUNCTION, MEDIAN, RUN = 300, 60, 10, 15  # most lines of any kind
ROOMS = ("mixdpo", "lightning_modules", "datamodules")
NOT_CORE = {"mixdpo", "mixdpo/storage", "mixdpo/evaluation", "mixdpo/constraints", "mixdpo/pages"}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> list[Path]:
    return [ROOT / "run.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def code_lines(path: Path) -> int:
    text, code = path.read_text("utf-8"), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):  # a string alone is documentation, of an attribute as well
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(code)


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines of any kind, file:line) of each."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, Function))
    return [(node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno}") for node in nodes]


def room_of(path: Path) -> str:
    """mixdpo/losses, lightning_modules/callbacks, datamodules, run.py, …"""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2] if len(parts) > 2 else parts[:1])


def code_by_room() -> Counter[str]:
    rooms: Counter[str] = Counter()
    for path in source_files():
        rooms[room_of(path)] += code_lines(path)
    return rooms


def of_budget(name: str, count: int, budget: int) -> str:
    return f"{name:28} {count:6,} of {budget:,}{'  OVER' if count > budget else ''}"


def main() -> None:
    rooms, sizes = code_by_room(), sorted(size for path in source_files() for size in functions(path))
    largest = max(source_files(), key=lines)
    print("code lines by room (* core)")
    for name, count in sorted(rooms.items()):
        print(f"  {name + (' *' if name not in NOT_CORE else ''):28}{count:6,}")
    print(of_budget("source", rooms.total(), SOURCE))
    print(of_budget("core", sum(count for name, count in rooms.items() if name not in NOT_CORE), CORE))
    print(of_budget(f"file {largest.relative_to(ROOT)}", lines(largest), FILE))
    print(of_budget(f"function {sizes[-1][1]}", sizes[-1][0], FUNCTION))
    print(of_budget("median function", round(median(size for size, _ in sizes)), MEDIAN))
    print(of_budget("tests, all lines", sum(map(lines, (ROOT / "tests").rglob("*.py"))), TESTS))
    print(f"{'beside: benchmarks':28} {sum(map(code_lines, (ROOT / 'benchmarks').rglob('*.py'))):6,}")
    print(f"{'beside: templates':28} {sum(map(lines, (ROOT / 'mixdpo').rglob('*.html'))):6,}")


if __name__ == "__main__":
    main()
