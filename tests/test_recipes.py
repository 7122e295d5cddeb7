"""The recipes of CONTRIBUTING.md work as they stand: the loss and the scorer in a run, the signal, the order."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import make_pairs, write_pairs
from test_cli import ROOT, in_process

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RECIPE = re.compile(r"Use: `(--\S+) (mine\.\w+)`\n```python\n(.+?)```", re.DOTALL)
TINY = """--model.quantization none --model.dtype float32 --data.max_length 64 --data.max_prompt_length 32
    --trainer.enable_progress_bar false"""


def test_a_loss_a_scorer_and_a_signal(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = RECIPE.findall(TEXT)
    (tmp_path / "mine.py").write_text("\n\n".join(code for _, _, code in recipes))
    monkeypatch.syspath_prepend(tmp_path)
    mine, called = importlib.import_module("mine"), set()
    for _, path, code in recipes:
        assert len([line for line in code.splitlines() if line]) <= 5
        kind = getattr(mine, path.removeprefix("mine."))

        def watched(self: Any, *arguments: Any, original: Any = kind.__call__) -> Any:
            called.add(type(self).__name__)
            return original(self, *arguments)

        kind.__call__ = watched
    words = {option: [option, path] for option, path, _ in recipes}
    signal = words.pop("--model.signal")
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    common = ["--model.base", tiny_model, "--runs", str(tmp_path), "--data.source", source, *TINY.split()]
    fit = ["--data.validation", "0", "--trainer.callbacks", "null", *(word for pair in words.values() for word in pair)]
    assert in_process("--config", "configs/demo.yaml", *common, *fit) == 0
    assert called == {"Squared", "Surprising"}
    assert in_process("predict", "--config", "configs/signals/rating.yaml", *common, *signal) == 0
    assert called == {"Squared", "Surprising", "LengthGap"}
    monkeypatch.delitem(sys.modules, "mine")


def test_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each added line follows the one above it."""
    (lines,) = re.findall(r"```diff\n(.+?)```", TEXT, re.DOTALL)
    source = (ROOT / "mixdpo/routing/route.py").read_text("utf-8")
    for above, added in re.findall(r"^ (.+)\n\+(.+)$", lines, re.MULTILINE):
        assert source.count(above) == 1
        source = source.replace(above, f"{above}\n{added}\n")
    route = ModuleType("route")
    monkeypatch.setitem(sys.modules, "route", route)  # where a dataclass looks up its annotations
    exec(source, vars(route))
    plan = route.Routing(hard_fraction=0.0, order="middle_out").plan(np.array([5.0, 4, 3, 2, 1]), np.arange(5))
    assert plan.order.tolist() == [2, 1, 3, 0, 4]
