"""Shared by the benchmarks: fresh processes, peak memory of one, and what a result was measured on."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


def in_fresh_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def forget_peak() -> float:
    """The peak so far was of loading; returns the megabytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return megabytes("VmRSS")


def megabytes(field: str) -> float:
    """Of this process. Not ru_maxrss, which on Linux a child inherits from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


class Clock:
    """Seconds and megabytes of a block, or between `start` and `stop`, whatever they are called with."""

    costs: dict[str, float]

    def __init__(self, gpu: bool = False) -> None:
        """Megabytes are those of this process, or those that it has on the GPU."""
        self._gpu = gpu

    def start(self, *_: Any, **__: Any) -> None:
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._resident = torch.cuda.memory_allocated() / 1e6 if self._gpu else forget_peak()
        self._started, self._worked = time.perf_counter(), time.process_time()

    def stop(self, *_: Any, **__: Any) -> None:
        if self._gpu:
            torch.cuda.synchronize()
        self.costs = {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": time.process_time() - self._worked,
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if self._gpu else megabytes("VmHWM"),
            "reserved_mb": torch.cuda.max_memory_reserved() / 1e6 if self._gpu else None,
            "resident_before_mb": self._resident,
        }

    def __enter__(self) -> "Clock":
        self.start()
        return self

    __exit__ = stop


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return action(), time.perf_counter() - started


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; of a float three digits, of None a dash."""

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or os.environ.get("COMMIT", ""),  # a copy on a rented machine may have no .git
        "command": shlex.join(sys.argv),
        "machine": machine,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "threads": torch.get_num_threads(),
    }
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "lightning", "numpy")
    versions = {name: next((there.version for there in distributions(name=name)), None) for name in names}
    return found | {"versions": versions}
