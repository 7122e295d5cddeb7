"""What a class that a config names takes, for the person at the terminal, and what is said where a name is wrong."""

import inspect
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from yaml import YAMLError

from mixdpo.errors import InputError, nearest
from mixdpo.storage.read import parse_yaml

UNKNOWN_OPTION = re.compile(
    r"(?:(?:Group '(\S+)'|\w+ '\w+') does not accept option '|Option '|\w+ arguments: -*)([\w.]+)[^;\n]*(; did .+\?)?"
)


BY_NAME = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim")  # no path is needed for these


PACKAGES = ("mixdpo", "lightning_modules", "datamodules")


def strict(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """jsonargparse's loader of YAML, for what `parse_yaml` takes only: a key that stands twice would lose one value."""

    def loaded(text: str) -> Any:
        parse_yaml(text, "the text", finite=False)
        return load(text)

    return loaded


set_loader("yaml", strict(get_loader("yaml")), (YAMLError, InputError))


class Parser(ArgumentParser):
    """Takes no abbreviated option, and null only where the type does; names the option nearest to an unknown one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def validate(self, namespace: Any, *args: Any, **options: Any) -> None:
        super().validate(namespace, *args, **options)  # says what is required, before what null is
        super().validate(namespace, *args, **options | {"skip_unset": False})
        for group in self.groups or ():
            if not isinstance(given := namespace.get(group, Namespace()), Namespace):
                raise TypeError(f'Parser key "{group}": should be a mapping of options. Got value: {given}')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (unknown := UNKNOWN_OPTION.search(message)) and not unknown[3]:
            known = {a.dest.removesuffix(".help") for a in getattr(ex, "subcommand_parser", self)._actions}
            word = ".".join(filter(None, unknown.groups()))
            meant = nearest(word, {*known, "class_path", "init_args"}) or nearest(word.partition(".")[0], known)
            message = message.replace(unknown[0], unknown[0] + meant, 1)
        super().error(message, ex)


def nearest_path(message: str) -> str:
    """For a message about a class path that leads nowhere: the nearest name that is there."""
    found = re.findall(r"(?:module '|named '|path string: )([\w.]+)(?:' has no attribute '(\w+))?", message) or [()]
    parent, _, name = ".".join(filter(None, found[0])).rpartition(".")
    if parent:
        module = sys.modules.get(parent)
        return nearest(name, [*dir(module), *(each.name for each in iter_modules(getattr(module, "__path__", ())))])
    if "No module named" in message:
        return nearest(name, PACKAGES)
    known: dict[str, str | None] = {
        key: None for place in BY_NAME for key, kind in vars(import_module(place)).items() if inspect.isclass(kind)
    }
    for module, content in [(key, vars(value)) for key, value in sys.modules.items() if key.startswith(PACKAGES)]:
        known |= {key: f"{module}.{key}" for key, kind in content.items() if getattr(kind, "__module__", "") == module}
    return re.sub(r"'(\w+)'", lambda found: repr(known[found[1]] or found[1]), nearest(name, known))


def options(name: str) -> None:
    """Print the arguments of a class that configs name, such as mixdpo.losses.BetaDPO, and what each means.

    Args:
        name: class path of a loss, scorer, schedule, signal, callback, module or data module.

    Raises:
        InputError: there is no such class.
    """
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(f"there is no class {name} ({error}): give its whole path{nearest_path(str(error))}") from None
    if not inspect.isclass(kind):
        raise InputError(f"{name} is no class: give the path of one, as configs do")
    described = [inspect.getdoc(documented) for documented in (kind, kind.__init__) if documented.__doc__]
    print(f"{name}{inspect.signature(kind)}\n\n" + "\n\n".join(text for text in described if text))
