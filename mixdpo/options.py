"""The options of a class that a config names, printed at the terminal, and the message about a wrong name."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from yaml import YAMLError

from mixdpo.errors import InputError, nearest
from mixdpo.storage.read import parse_yaml

UNKNOWN_OPTION = re.compile(
    r"(?:(?:Group '(\S+)'|\w+ '\w+') does not accept option '|Option '|\w+ arguments: -*)([\w.]+)[^;\n]*(; did .+\?)?"
)
BY_NAME = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim")  # their classes need no path
ROOMS = ("mixdpo", "lightning_modules", "datamodules")
HELP = "see run.py fit --help, --model.help CLASS, --data.help CLASS, python -m mixdpo options CLASS"


_load_yaml = get_loader("yaml")


def strict(text: str) -> Any:
    """What jsonargparse's loader of YAML makes of a text that `parse_yaml` takes: a key given twice loses a value."""
    parse_yaml(text, "the text", finite=False)
    return _load_yaml(text)


set_loader("yaml", strict, (YAMLError, InputError))


class Parser(ArgumentParser):
    """Takes no abbreviated option, and null only where the type does; names the option nearest to an unknown one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def validate(self, namespace: Any, *args: Any, **options: Any) -> None:
        super().validate(namespace, *args, **options)  # names a missing option before a null one
        super().validate(namespace, *args, **options | {"skip_unset": False})
        for group in self.groups or ():
            if not isinstance(given := namespace.get(group, Namespace()), Namespace):
                raise TypeError(f'Parser key "{group}": should be a mapping of options. Got value: {given}')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[misc]
        if (unknown := UNKNOWN_OPTION.search(message)) and not unknown[3]:
            parser: Any = getattr(ex, "subcommand_parser", self)
            word = ".".join(filter(None, unknown.groups()))
            known = {a.dest.removesuffix(".help") for a in parser._actions}
            message = message.replace(unknown[0], unknown[0] + nearest_option(word, known), 1)
        super().error(message, ex)


def nearest_option(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown option: "; did you mean 'OPTION'?", or nothing."""
    return nearest(word, {*known, "class_path", "init_args"}) or nearest(word.partition(".")[0], known)


def lazily(room: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room that hands on the names in `homes`, each imported from its module in the
    room when the name is asked for."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{homes[name]}"), name)

    return __getattr__, lambda: [*vars(sys.modules[room]), *homes]


@cache
def option_names() -> Any:
    """`classes`: options by class; `homes`: the class that a name or path means; `verbs`: options by verb; `run`: those
    of the verbs of run.py, beside those of fit. benchmarks/option_names.py writes the file."""
    return json.loads((Path(__file__).parent / "option_names.json").read_text("utf-8"))


def nearest_path(path: str) -> str:
    """The end of a message about a class path that leads nowhere: "; did you mean 'PATH'?", or nothing."""
    parent, _, name = path.rpartition(".")
    if parent.partition(".")[0] not in ROOMS and (module := sys.modules.get(parent)):
        return nearest(name, dir(module))
    homes = option_names()["homes"]
    if parent:
        return nearest(path, [homes[name]] if name in homes else homes)
    return re.sub(r"'(\w+)'", lambda kind: repr(homes[kind[1]]), nearest(name, homes))


def options(name: str) -> None:
    """Print the arguments of a class that configs name, such as mixdpo.losses.BetaDPO, with the meaning of each.

    Args:
        name: class path of a loss, scorer, schedule, signal, callback, module or data module.

    Raises:
        InputError: there is no such class.
    """
    kind: Any = None
    with suppress(ImportError, ValueError, AttributeError):
        kind = resolve_name(name)
    if not inspect.isclass(kind):
        raise InputError(f"there is no class {name}: give its whole path, as configs do{nearest_path(name)}")
    described = [inspect.getdoc(documented) for documented in (kind, kind.__init__) if documented.__doc__]
    print(f"{name}{inspect.signature(kind)}\n\n" + "\n\n".join(text for text in described if text))
