"""Shared by the benchmarks: fresh processes, peak memory of one, and what a result was measured on."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
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
    """Seconds and megabytes between `start` and `stop`, whatever they are called with."""

    costs: dict[str, float]

    def start(self, *_: Any, **__: Any) -> None:
        self._resident, self._started = forget_peak(), time.perf_counter()

    def stop(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self._started
        self.costs = {"seconds": seconds, "peak_mb": megabytes("VmHWM"), "resident_before_mb": self._resident}


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return action(), time.perf_counter() - started


def table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": machine,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "threads": torch.get_num_threads(),
    }
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "lightning", "numpy")
    return found | {"versions": {name: version(name) for name in names}}
