"""What a class that a config names takes, for the person at the terminal."""

import inspect
from importlib import import_module

from mixdpo.errors import InputError


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
        raise InputError(f"there is no class {name} ({error}): give its whole path, as configs do") from None
    if not inspect.isclass(kind):
        raise InputError(f"{name} is no class: give the path of one, as configs do")
    described = [inspect.getdoc(documented) for documented in (kind, kind.__init__) if documented.__doc__]
    print(f"{name}{inspect.signature(kind)}\n\n" + "\n\n".join(text for text in described if text))
