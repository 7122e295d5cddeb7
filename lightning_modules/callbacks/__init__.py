"""Callbacks that configs name, imported when they are asked for."""

from importlib import import_module
from typing import Any

_HOME = {"GoldEvaluation": "gold_evaluation", "RefreshReference": "clean_tokens"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
