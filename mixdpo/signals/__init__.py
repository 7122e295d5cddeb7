"""Difficulty signals: what configs name."""

from importlib import import_module
from typing import Any

_HOME = {
    "CHES": "signals",
    "ImplicitReward": "signals",
    "PolicyLogProb": "signals",
    "Rating": "signals",
    "RewardModel": "signals",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
