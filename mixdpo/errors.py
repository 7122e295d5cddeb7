"""The errors a user is meant to read: docs/troubleshooting.md says what to do about each."""

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what, where (file, row, option) and what to do."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient became infinite or NaN: the message names step and rows, and the file that has the numbers."""


class OutOfSpaceError(OSError):
    """A run's folder cannot take what the run has to write: the message says where, and how much."""


class Stopped(Exception):
    """A signal ended the run after a whole step, which is in its last checkpoint.

    Args:
        signal: its number; the exit status is 128 + that, as for a process that the signal had killed.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def differences(there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> list[str]:
    """What two mappings say differently, key by key; None is the same as no key."""
    found = []
    for key in {**there, **here}:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{within}{key}.")
        elif old != new:
            found.append(f"{within}{key}: {old} there, {new} here")
    return found


def refuse_other_run(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: what a checkpoint was made with differs from what there is now; names each part that does.
    """
    if changed := differences(there, here):
        raise InputError(
            f"the checkpoint belongs to another run ({'; '.join(changed)}). Continue with the config.yaml beside it, "
            "or start anew from its adapter/ folder (model.adapter)"
        )
