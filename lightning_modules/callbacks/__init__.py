"""Callbacks of a run: those that configs and Python name, imported when they are asked for."""

from importlib import import_module
from typing import Any

_HOME = {
    "ExactResume": "checkpoint",
    "LastCheckpoint": "checkpoint",
    "CleanTokens": "clean_tokens",
    "RefreshReference": "clean_tokens",
    "NonFinite": "faults",
    "OutOfMemory": "faults",
    "GoldEvaluation": "gold_evaluation",
    "Throughput": "logging",
    "ValidateAtMaxSteps": "logging",
    "RunFiles": "run_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
