"""docs/from_trl.md names each field of TRL's DPOConfig and SFTConfig once, and options of ours that exist."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/from_trl.md").read_text("utf-8")
NAMES = json.loads((ROOT / "mixdpo/option_names.json").read_text("utf-8"))
MODULES = ["lightning_modules.preference.PreferenceModule", "lightning_modules.sft.SFTModule"]
DATA = ["datamodules.preference.PreferenceDataModule", "datamodules.sft.SFTDataModule"]
NO_OPTIONS = {"run.py", "hf upload"}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
]


def table_rows(page: str) -> list[tuple[list[str], str]]:
    """Of each row of the tables TRL | here: the inline code of the first cell, and the second cell."""
    tables = re.findall(r"(?m)^\| TRL \| here \|\n\|[-|]+\|\n((?:\|.*\n)+)", page)
    cells = [row.strip("| ").split(" | ") for table in tables for row in table.splitlines()]
    return [(re.findall(r"`([^`]+)`", first), here) for first, here in cells]


def trl_fields() -> set[str]:
    from trl import DPOConfig, SFTConfig

    return {field.name for config in (DPOConfig, SFTConfig) for field in fields(config)}


def options_of(name: str) -> Any:
    """Options of a class, by its path or its name alone; None where no config can name such a class."""
    return NAMES["classes"].get(NAMES["homes"].get(name, name))


def find(option: str) -> Any:
    """The entry of `model.optimizer.lr` and the like; None if there is no such option."""
    room, _, rest = option.partition(".")
    tables = [options_of(path) for path in {"model": MODULES, "data": DATA}.get(room, [])]
    if not tables:
        return NAMES["run"]["fit"].get(option)
    found = [table[rest] for table in tables if rest in table]
    outer, _, inner = rest.rpartition(".")
    found += [
        (options_of(table[outer].get("class", "")) or {}).get(inner) for table in tables if outer in table and inner
    ]
    return next((each for each in found if each is not None), None)


def unknown(here: str) -> list[str]:
    """Inline code of a cell that is no option with a value it takes, no class, and no option of a class before it."""
    wrong, of_classes = [], set(NO_OPTIONS)
    for code in re.findall(r"`([^`]+)`", here):
        option, _, value = code.partition(" ")
        entry = find(option)
        if options_of(code) is not None:
            of_classes |= options_of(code).keys()
        elif code not in of_classes and (
            entry is None or (value and value not in entry.get("one_of", [value] * ("open" in entry)))
        ):
            wrong.append(code)
    return wrong


def test_each_field_is_named_once() -> None:
    named = [field for names, _ in table_rows(PAGE) for field in names]
    assert sorted(named) == sorted(trl_fields())
    assert f"the {len(named)} options of" in PAGE


def test_options_named_exist() -> None:
    rows = table_rows(PAGE)
    assert [(code, here) for _, here in rows for code in unknown(here)] == []
    silent = [here for _, here in rows if not re.search(r"`|^absent: |^refused: |^always|^the same$", here)]
    assert silent == [], "neither an option nor a reason"


@pytest.mark.parametrize("option", ["`data.max_lenght`", "`data.overlong drp`", "`ModelCheckpoint`: `modus`", "`Adm`"])
def test_a_wrong_option_is_seen(option: str) -> None:
    assert len(unknown(option)) == 1


def test_the_script_gives_fields_of_trl() -> None:
    blocks = [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]
    calls = [node for block in blocks for node in ast.walk(block) if isinstance(node, ast.Call)]
    (config,) = [call for call in calls if ast.unparse(call.func) == "DPOConfig"]
    given = {keyword.arg for keyword in config.keywords}
    assert len(given) > 5 and given <= trl_fields()
