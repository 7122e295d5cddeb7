"""A memory-mapped array with a checksum beside each value: values that something else has altered are seen."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from mixdpo.storage.files import read_array, written_whole


class CheckedArray(np.memmap):
    """(N,) float32 in a file, NaN where a value is not known. A value is assigned together with its checksum.

    A value that is assigned to a view of the array has no checksum, so the next `open_checked` does not know the value.
    """

    checks: np.ndarray | None = None

    def __setitem__(self, index: Any, values: Any) -> None:
        if self.checks is not None:  # first: a process that is killed here leaves a value that is not known yet
            self.checks[index] = _checks(np.asarray(values, dtype=np.float32))
        super().__setitem__(index, values)


def _checks(values: np.ndarray) -> np.ndarray:
    """The bits, some of them turned over: zeros have no checksum of zeros."""
    return values.view(np.uint32) ^ np.uint32(0x5BD1E995)


def open_checked(path: Path, size: int, noun: str) -> CheckedArray:
    """The array in a file, made if there is none. An altered or infinite value becomes NaN, with one warning.

    Raises:
        InputError, OSError: the file cannot be made, or is damaged.
    """
    beside = path.with_suffix(".checks.npy")
    contents = {beside: np.zeros(size, dtype=np.uint32), path: np.full(size, np.nan, dtype=np.float32)}
    for file, content in contents.items() if not path.exists() else ():
        with written_whole(file) as partial:
            np.save(partial, content)  # in full: a disk that fills later does not end who writes to the map
    array, checks = (read_array(file, (size,), "delete it", mode="r+") for file in (path, beside))
    altered = ~np.isnan(array) & ((_checks(array) != checks) | np.isinf(array))
    if altered.any():
        again = "these are computed anew and replaced; nothing needs to be done"
        warnings.warn(f"{path} holds damaged {noun}: {again}", stacklevel=3)
        array[altered] = np.nan
    kept = array.view(CheckedArray)
    kept.checks = checks
    return kept
