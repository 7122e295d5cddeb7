"""Writes mixdpo/option_names.json, what mixdpo/first_look.py knows: `python benchmarks/option_names.py`."""

import argparse
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from importlib import import_module
from math import inf
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest.mock import patch

from jsonargparse import capture_parser

from lightning_modules.verbs import cross_fit, estimate, run_cli
from mixdpo import __main__ as verbs
from mixdpo.evaluation import compare
from mixdpo.options import BY_NAME, Parser

FILE = Path(__file__).parents[1] / "mixdpo/option_names.json"
ROOMS = {
    "mixdpo": "losses routing signals token_cleaning.scorers token_cleaning.cleaning token_cleaning.selection"
    " batches.steps evaluation.formats constraints.scoring",
    "lightning_modules": "preference sft margins responses callbacks",
    "datamodules": "preference sft prompts",
}


def leaves(kind: Any) -> list[Any]:
    """The types and values inside a type, and their origins."""
    inner = () if typing.get_origin(kind) is Callable else typing.get_args(kind)
    return [typing.get_origin(kind) or kind, *(leaf for each in inner for leaf in leaves(each))]


def option(action: Any, is_class: bool) -> dict[str, Any]:
    """What is known of an option; `class` is its class if none is given, `open` one of which the rest is unknown."""
    inside, default = leaves(getattr(action, "_typehint", None)), action.default
    default = (default.get("class_path") if default else "{}") if isinstance(default, dict) else default
    says = re.sub(r"(?<=[.;])\s.*", "", " ".join((action.help or "").split())).rstrip(".;")
    known: dict[str, Any] = {"says": shorten(says, 74, placeholder=" …")}
    known["default"] = None if default in (argparse.SUPPRESS, -inf) else default
    if (is_class or Callable in inside) and str not in inside:
        groups = [f"{each.__module__}.{each.__name__}" for each in inside if is_dataclass(each)]
        known["class"] = default if isinstance(default, str) else "".join(groups[:1])
    elif is_class or Any in inside or dict in inside:
        known["open"] = True
    elif typing.Literal in inside and not {str, list, tuple}.intersection(inside):
        known["one_of"] = [each for each in inside if isinstance(each, str)]
    return {name: value for name, value in known.items() if value is not None}


def options(parser: Any) -> dict[str, Any]:
    names = {action.dest: action for action in parser._actions}
    return {name: option(names[name], f"{name}.help" in names) for name in names if not name.endswith(".help")}


def of_class(kind: Any, is_foreign: bool) -> dict[str, Any] | None:
    """None where a class of another package takes what its signature does not name."""
    if is_foreign and any(each.kind is each.VAR_KEYWORD for each in inspect.signature(kind).parameters.values()):
        return None
    parser = Parser()
    parser.add_class_arguments(kind, fail_untyped=False)
    kept = ("class", "open", "one_of") if is_foreign else ("class", "open", "one_of", "default", "says")
    return {name: {each: known[each] for each in kept if each in known} for name, known in options(parser).items()}


def of_verb(verb: Callable[[list[str]], Any]) -> dict[str, Any]:
    """Of a verb that takes the options of `fit` beside its own."""
    with patch.object(argparse.ArgumentParser, "parse_known_args", autospec=True, side_effect=EOFError) as parse:
        try:
            return verb([])
        except EOFError:
            return options(parse.call_args[0][0])


def table() -> dict[str, Any]:
    with patch.object(sys, "argv", ["run.py"]), patch("mixdpo.first_look.FirstLook"):
        actions = capture_parser(run_cli.start, ["fit"])._actions
        others = {v: options(capture_parser(verbs.main, [v])) for v in verbs.VERBS.keys() - {"compare"}}
    others["compare"] = of_verb(compare.compare)
    (choices,) = (action.choices for action in actions if action.dest == "subcommand")
    run = {verb: options(each) for verb, each in choices.items()}
    run |= {"estimate": of_verb(estimate.estimate), "cross-fit": of_verb(cross_fit.cross_fit)}
    run["inspect"] = of_verb(estimate.inspect)
    of_fit = run["fit"].keys()
    run |= {verb: {n: run[verb][n] for n in run[verb].keys() - of_fit} for verb in run if verb != "fit"}
    others["options"]["name"]["class"] = ""  # the text is a class path
    classes, homes = {}, {}
    for room in (*BY_NAME, *(f"{top}.{name}" for top in ROOMS for name in ROOMS[top].split())):
        for name, kind in inspect.getmembers(import_module(room), inspect.isclass):
            if kind.__module__.startswith(room) and not name.startswith("LazyInstance"):
                path = name if room in BY_NAME else f"{room}.{name}"
                classes[path] = of_class(kind, room in BY_NAME)
                homes |= dict.fromkeys([name, f"{room}.{name}", f"{kind.__module__}.{name}"], path)
    return {"classes": classes, "homes": homes, "run": run, "verbs": others}


def text() -> str:
    """One line an option; a class of another package without its path, as it may be written."""
    written = json.dumps(table(), indent=1, sort_keys=True, ensure_ascii=False)
    return re.sub(r"\n {4,}|\n {3}(?=[}\]])", " ", written).replace('"class": "torch.optim.', '"class": "') + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
