"""The options of a class that a config names, printed at the terminal, and the message about a wrong name."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
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
            known = {a.dest.removesuffix(".help") for a in parser._actions}
            word = ".".join(filter(None, unknown.groups()))
            meant = nearest(word, {*known, "class_path", "init_args"}) or nearest(word.partition(".")[0], known)
            message = message.replace(unknown[0], unknown[0] + meant, 1)
        super().error(message, ex)


def lazily(room: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room that hands on the names in `homes`, each imported from its module in the
    room when the name is asked for."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{homes[name]}"), name)

    return __getattr__, lambda: [*vars(sys.modules[room]), *homes]


def nearest_path(path: str) -> str:
    """The end of a message about a class path that leads nowhere: "; did you mean 'PATH'?", or nothing."""
    parent, _, name = path.rpartition(".")
    if parent.partition(".")[0] not in ROOMS and (module := sys.modules.get(parent)):
        return nearest(name, dir(module))
    root, known = Path(__file__).parents[1], {}
    for file in (file for room in ROOMS for file in sorted((root / room).rglob("*.py"))):
        home = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        # a class that its room's __init__ hands on has the room's shorter path
        for kind in re.findall(r"^(?:class )?([A-Z]\w+)(?=\(|:| = objective)", file.read_text("utf-8"), re.MULTILINE):
            room = import_module(home.rpartition(".")[0] or home)
            known[f"{room.__name__ if kind in dir(room) else home}.{kind}"] = kind
    if not parent:
        names = {kind: kind for place in BY_NAME for kind in dir(import_module(place))}
        names |= {kind: place for place, kind in known.items()}
        return re.sub(r"'(\w+)'", lambda match: repr(names[match[1]]), nearest(name, names))
    return nearest(path, [place for place, kind in known.items() if kind == name] or known)


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
