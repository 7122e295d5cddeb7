"""Difficulty signals: what configs name."""

from importlib import import_module
from typing import Any

NAMES = ("CHES", "ImplicitReward", "PolicyLogProb", "Rating", "RewardModel")


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(import_module("mixdpo.signals.signals"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *NAMES]
