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
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError, check_one_of
from mixdpo.evaluation.compare_runs import chosen_point, detectable, mean_score, write_tables
from mixdpo.evaluation.study_design import Job, Study, read_study
from mixdpo.storage.files import read_json, write_json
from mixdpo.storage.identity import named_files

RECORDED = ("results.json", "responses.json", "adapter")


@dataclass
class _Process:
    process: subprocess.Popen
    started: float


def study(study: str, table_only: bool = False, against: str | None = None) -> int:
    """Run a grid of runs from one YAML file; then a table with intervals, as CSV and Markdown, and plots.

    Start the same command again to go on after an interruption or a failed run.

    Args:
        study: the study's YAML file.
        table_only: start nothing; write the tables and plots of what is done.
        against: start nothing; write table_against_RUN, in which every run is compared to this one.

    Returns:
        Exit status: 0, 1 if a run failed or could not start, 130 if interrupted.

    Raises:
        InputError: the file is wrong, or a run that is done was made with other options or files.
    """
    plan = read_study(study)
    folder = Path(plan.folder)
    if not (table_only or Path("run.py").is_file()):
        raise InputError("there is no run.py here: start `mixdpo study` in the folder of the repository")
    parts = [row.get("part", "all") for row in read_prompts(plan.prompts)]
    wanted = {part for listed in plan.outcomes.values() for part in listed} | ({plan.choose_by} - {None})
    if absent := sorted(wanted - set(parts)):
        raise InputError(f"{plan.prompts} has no prompt of part {', '.join(absent)}; its parts: {sorted(set(parts))}")
    main = next(iter(plan.outcomes.values()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // plan.at_once)
    print(detectable(plan, sum(part in main for part in parts)))
    if against is not None:
        check_one_of("against", against, plan.runs)
        plan = replace(plan, control=against, runs={name: replace(p, control=None) for name, p in plan.runs.items()})
        print(write_tables(plan, add_finished(plan, {}), f"table_against_{against}"))
        return 0
    with _alone(folder), _interruptible():
        done = add_finished(plan, {})
        print(
            f"{plan.size} runs, {len(done)} done; {plan.at_once} at a time, {threads} threads each; {_left(plan, done)}"
        )
        try:
            failed = {} if table_only else _run_all(plan, done, threads)
        except KeyboardInterrupt:
            print("\ninterrupted: the runs in progress are lost; the same command goes on")
            return 130
        table = write_tables(plan, done)
    from mixdpo.evaluation.study_plots import write_plots

    print(f"\n{table}\n{write_plots(plan, done)}")
    for name, why in failed.items():
        print(f"{name} {why}", file=sys.stderr)
    return int(not table_only and len(done) < plan.size)


def known_jobs(plan: Study, done: dict[str, float]) -> Iterator[Job]:
    """The jobs whose options are known: all points at the first seed, the chosen one at the others, and what starts
    from another run once that is done."""
    for seed in plan.seeds:
        for run, spec in plan.runs.items():
            chosen, start = chosen_point(plan, run, done), None
            if spec.after is not None:
                point = chosen_point(plan, spec.after, done)
                start = None if point is None else plan.name(spec.after, point, seed)
                if start not in done:
                    continue
            points = plan.points if seed == plan.seeds[0] else [] if chosen is None else [chosen]
            yield from (plan.job(run, point, seed, start) for point in points)


def add_finished(plan: Study, done: dict[str, float]) -> dict[str, float]:
    """`done` (seconds of each job) with all that earlier studies have left, which may make further jobs known."""
    while new := {job.name: s for job in known_jobs(plan, done) if job.name not in done and (s := _took(plan, job))}:
        done.update(new)
    return done


def _run_all(plan: Study, done: dict[str, float], threads: int) -> dict[str, str]:
    """Run what is not done, adding it to `done`; returns why the others failed."""
    running: dict[str, _Process] = {}
    failed: dict[str, str] = {}
    try:
        while True:
            waiting = [
                job for job in known_jobs(plan, add_finished(plan, done)) if job.name not in {*done, *failed, *running}
            ]
            for job in waiting[: plan.at_once - len(running)]:
                running[job.name] = _start(plan, job, threads)
            if not running:
                return failed
            while not (ended := [name for name, run in running.items() if run.process.poll() is not None]):
                time.sleep(0.2)
            for name in ended:
                _end(plan, name, running.pop(name), done, failed)
    finally:
        for run in running.values():
            os.killpg(run.process.pid, signal.SIGKILL)  # not SIGTERM: Lightning would finish a batch; it is lost anyway
            run.process.wait()


def _start(plan: Study, job: Job, threads: int) -> _Process:
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
    return _Process(process, time.perf_counter())


def _end(plan: Study, name: str, run: _Process, done: dict[str, float], failed: dict[str, str]) -> None:
    path, took = Path(plan.folder, name), time.perf_counter() - run.started
    absent = [file for file in RECORDED if not (path / file).exists()]
    # a run that is told to stop does so with status 0, so the status alone says little
    good = run.process.returncode == 0 and not absent
    record = json.loads(_record(path).read_text()) | {"state": "done" if good else "failed", "seconds": round(took, 1)}
    write_json(_record(path), record)
    if good:
        done[name] = took
        outcome, parts = next(iter(plan.outcomes.items()))
        what = f"{took:.0f} s, {outcome} {mean_score(plan, name, parts):.3f}"
    else:
        status = f"exit status {run.process.returncode}" + (f", no {absent[0]}" if absent else "")
        failed[name] = what = f"FAILED after {took:.0f} s ({status}): see {path}.log"
    left, count = _left(plan, done, len(failed)), len(done) + len(failed)
    print(f"{time.strftime('%H:%M:%S')} [{count} of {plan.size}] {name}: {what}; {left}", flush=True)
    write_tables(plan, done)


def _left(plan: Study, done: dict[str, float], failed: int = 0) -> str:
    if not done and plan.minutes_per_run is None:
        return "time not known yet"
    minutes = sum(done.values()) / len(done) / 60 if done else plan.minutes_per_run
    return f"about {minutes * -(-(plan.size - len(done) - failed) // plan.at_once):.0f} min left"


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
        InputError: it was done with other options or files.
    """
    path = Path(plan.folder, job.name)
    record: dict[str, Any] = {"state": "new"}
    if _record(path).exists():
        record = read_json(_record(path), {"state", "command", "files"}, f"remove it and {path} to repeat the run")
    if record["state"] != "done" or not all((path / file).exists() for file in RECORDED):
        return 0.0
    now = _identity(job)
    then, here = ([" ".join(pair) for pair in about["command"]] for about in (record, now))
    differs = [f"then {option}" for option in then if option not in here]
    differs += [f"now {option}" for option in here if option not in then]
    if then != here and not differs:  # of two values of one option the later one counts
        old, new = next(pair for pair in zip_longest(then, here) if pair[0] != pair[1])
        differs = [f"the order of the options: then {old} stood where {new} stands now"]
    changed = {file for file, _ in record["files"].items() ^ now["files"].items()}
    differs += [f"content of {file}" for file in sorted(changed)]
    if differs:
        raise InputError(
            f"{path} is done, but with something else: {'; '.join(differs)}. Change it back, give the study another "
            f"folder, or remove {path} to repeat the run"
        )
    return max(record["seconds"], 0.1)


def _die_with_the_study() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing else ends a run when the study is killed


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another study is running in {folder}: wait for it, or end it") from None
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the study as Ctrl-C does, also in the background, where a shell makes Ctrl-C ignored."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, signal.default_int_handler) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
