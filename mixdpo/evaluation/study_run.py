"""`mixdpo study STUDY.yaml`: every run in a process of its own; what is done is skipped, what failed is tried again."""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import ndiff
from pathlib import Path
from typing import Any

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.compare_runs import chosen_point, mean_score, write_tables
from mixdpo.evaluation.study_design import Job, Study, read_study
from mixdpo.storage.files import read_json, write_json
from mixdpo.storage.identity import named_files

RECORDED = ("results.json", "responses.json", "adapter")

Running = tuple[subprocess.Popen, float]  # and when it started


def study(study: str, table_only: bool = False) -> int:
    """Run a grid of runs from one YAML file; then a table with intervals, as CSV and Markdown.

    Start the same command again to go on after an interruption or a failed run.

    Args:
        study: the study's YAML file.
        table_only: start nothing; write the tables of what is done.

    Returns:
        Exit status: 0, 1 if a run failed or could not start, 130 if interrupted.

    Raises:
        InputError: the file is wrong, or a run that is done was made with other options or files.
    """
    plan = read_study(study)
    parts = {row.get("part", "all") for row in read_prompts(plan.prompts)}
    if absent := sorted(plan.parts - parts):
        raise InputError(f"{plan.prompts} has no prompt of part {', '.join(absent)}; its parts: {sorted(parts)}")
    if not (table_only or Path("run.py").is_file()):
        raise InputError("there is no run.py here: start `mixdpo study` in the folder of the repository")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // plan.at_once)
    failed: set[str] = set()
    for each in (signal.SIGINT, signal.SIGTERM):  # both alike, also in the background, where a shell has SIGINT ignored
        signal.signal(each, signal.default_int_handler)
    with _alone(Path(plan.folder)):
        done = add_finished(plan, {})
        print(f"{plan.size} runs, {len(done)} done; {plan.at_once} at a time, {threads} threads each")
        try:
            if not table_only:
                _run_all(plan, done, failed, threads)
        except KeyboardInterrupt:
            print("\ninterrupted: the runs in progress are lost; the same command goes on")
            return 130
        table = write_tables(plan, done)
    print(f"\n{table}")
    return int(not table_only and len(done) < plan.size)


def known_jobs(plan: Study, done: dict[str, float]) -> Iterator[Job]:
    """The jobs whose options are known: all points at the first seed, the chosen one at the others."""
    for seed in plan.seeds:
        for run in plan.runs:
            chosen = chosen_point(plan, run, done)
            points = plan.points if seed == plan.seeds[0] else [] if chosen is None else [chosen]
            yield from (plan.job(run, point, seed) for point in points)


def add_finished(plan: Study, done: dict[str, float]) -> dict[str, float]:
    """`done` (seconds of each job) with all that earlier studies have left, which may make further jobs known."""
    while new := {job.name: s for job in known_jobs(plan, done) if job.name not in done and (s := _took(plan, job))}:
        done.update(new)
    return done


def _run_all(plan: Study, done: dict[str, float], failed: set[str], threads: int) -> None:
    """Run what is not done; adds each run to `done` or to `failed`."""
    running: dict[str, Running] = {}
    try:
        while True:
            add_finished(plan, done)
            waiting = [job for job in known_jobs(plan, done) if job.name not in {*done, *failed, *running}]
            for job in waiting[: plan.at_once - len(running)]:
                running[job.name] = _start(plan, job, threads)
            if not running:
                return
            while not (ended := [name for name, (process, _) in running.items() if process.poll() is not None]):
                time.sleep(0.2)
            for name in ended:
                _end(plan, name, running.pop(name), done, failed)
    finally:
        for process, _ in running.values():
            os.killpg(process.pid, signal.SIGKILL)  # not SIGTERM: Lightning would finish a batch; it is lost anyway
            process.wait()


def _start(plan: Study, job: Job, threads: int) -> Running:
    path = Path(plan.folder, job.name)
    if path.exists() and not _record(path).exists():
        raise InputError(f"{path} is in the way and not of this study: move it, or change the study's folder")
    shutil.rmtree(path, ignore_errors=True)  # of a run that did not end
    write_json(_record(path), {**_identity(job), "state": "started"})
    with path.with_name(f"{job.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "run.py", *(word for pair in job.arguments for word in pair)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches the study alone, which ends the whole group
            preexec_fn=_die_with_the_study if sys.platform == "linux" else None,
        )
    return process, time.perf_counter()


def _end(plan: Study, name: str, run: Running, done: dict[str, float], failed: set[str]) -> None:
    path, (process, started) = Path(plan.folder, name), run
    took, absent = time.perf_counter() - started, [file for file in RECORDED if not (path / file).exists()]
    # a run that is told to stop does so with status 0, so the status alone says little
    good = process.returncode == 0 and not absent
    record = json.loads(_record(path).read_text()) | {"state": "done" if good else "failed", "seconds": round(took, 1)}
    write_json(_record(path), record)
    if good:
        done[name] = took
        outcome, parts = next(iter(plan.outcomes.items()))
        result = f"{took:.0f} s, {outcome} {mean_score(plan, name, parts):.3f}"
    else:
        status = f"exit status {process.returncode}" + (f", no {absent[0]}" if absent else "")
        result = f"FAILED after {took:.0f} s ({status}): see {path}.log"
        failed.add(name)
    count = len(done) + len(failed)
    minutes = sum(done.values()) / max(1, len(done)) / 60 * -(-(plan.size - count) // plan.at_once)
    print(f"[{count} of {plan.size}] {name}: {result}; about {minutes:.0f} min left", flush=True)
    write_tables(plan, done)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _identity(job: Job) -> dict[str, Any]:
    """What must be the same for a run that is done to be this job: its options, and the content of the files that they
    or their configs name."""
    values = [value for _, value in job.arguments]
    return {"command": [list(pair) for pair in job.arguments], "files": named_files(values)}


def _took(plan: Study, job: Job) -> float:
    """Seconds of a job that is done, or 0.

    Raises:
        InputError: the job is done with other options or files.
    """
    path = Path(plan.folder, job.name)
    if not _record(path).exists():
        return 0.0
    record = read_json(_record(path), {"state", "command", "files"}, f"remove it and {path} to repeat the run")
    if record["state"] != "done" or not all((path / file).exists() for file in RECORDED):
        return 0.0
    now = _identity(job)
    old, new = ([" ".join(pair) for pair in each["command"]] for each in (record, now))
    kinds = {"-": "then ", "+": "now "}  # in order: of two values of one option the later one counts
    changed = [kinds[line[0]] + line[2:] for line in ndiff(old, new) if line[0] in kinds]
    changed += [f"content of {file}" for file in sorted(dict(record["files"].items() ^ now["files"].items()))]
    if changed:
        raise InputError(
            f"{path} is done, but with something else: {'; '.join(changed)}. Change it back, give the study another "
            f"folder, or remove {path} to repeat the run"
        )
    return max(record["seconds"], 0.1)


def _die_with_the_study() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing else ends a run when the study is killed


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other studies out of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another study is running in {folder}: wait for it, or end it") from None
        yield
