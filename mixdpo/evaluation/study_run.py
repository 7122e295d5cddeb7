"""`mixdpo study STUDY.yaml`: every run in a process of its own; finished runs are skipped, failed runs tried again."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Set
from difflib import ndiff
from pathlib import Path

from mixdpo.data.prompts import read_prompts
from mixdpo.errors import InputError
from mixdpo.evaluation.compare_runs import chosen_point, detectable, finished_scores, job_rows, values, write_tables
from mixdpo.evaluation.fit_results import HELD_OUT
from mixdpo.evaluation.study_design import Arguments, Study, read_study
from mixdpo.storage.files import read_json, write_json
from mixdpo.storage.identity import named_files
from mixdpo.storage.store import Store

RUN = ("-m", "lightning_modules.cli")  # run.py, in any folder


def study(study: str) -> int:
    """Run a grid of runs from one YAML file; after each run write a table with intervals, as CSV and Markdown.

    Start the same command again to continue after an interruption or a failed run.

    Args:
        study: the study's YAML file.

    Returns:
        Exit status: 0, 1 if a run failed or could not start, 130 if interrupted.

    Raises:
        InputError: the file is wrong, or a run that is done was made with other options or files.
    """
    plan = read_study(study)
    parts = [row.get("part", "all") for row in read_prompts(plan.prompts)]
    named = {part for each in plan.outcomes.values() for part in each} | ({plan.choose_by} - {None})
    if absent := sorted(named - set(parts)):
        raise InputError(f"{plan.prompts} has no prompt of part {', '.join(absent)}; its parts: {sorted(set(parts))}")
    print(detectable(plan, sum(part in next(iter(plan.outcomes.values())) for part in parts)))
    return run_study(plan)


def run_study(plan: Study) -> int:
    """Run what is not done, then print the table. Returns the exit status, as `study` does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // plan.at_once)
    for each in (signal.SIGINT, signal.SIGTERM):  # both alike, also in the background, where a shell has SIGINT ignored
        signal.signal(each, signal.default_int_handler)
    with Store(Path(plan.folder, ".study.sqlite"), {}, noun="study"):  # keeps other studies out of the folder
        done = add_finished(plan, set())
        print(f"{plan.size} runs, {len(done)} done; {plan.at_once} at a time, {threads} threads each")
        try:
            _run_all(plan, done, threads)
        except KeyboardInterrupt:
            print("\ninterrupted: the runs in progress are lost; the same command continues")
            return 130
        print(f"\n{write_tables(plan, done)}")
    return int(len(done) < plan.size)


def known_jobs(plan: Study, done: Set[str]) -> dict[str, Arguments]:
    """The jobs with known options: all points at the first seed, the chosen point at the other seeds."""
    first, *others = plan.seeds
    scores = finished_scores(plan, done)
    chosen = {run: point for run in plan.runs if (point := chosen_point(plan, run, scores)) is not None}
    jobs = [(run, point, first) for run in plan.runs for point in plan.points]
    jobs += [(run, point, seed) for seed in others for run, point in chosen.items()]
    return {plan.name(*job): plan.arguments(*job) for job in jobs}


def add_finished(plan: Study, done: set[str]) -> set[str]:
    """Add to `done` all jobs that earlier commands have finished. These may make further jobs known."""
    # a done job is not looked at again: a file that is edited while others run must not end them
    while new := {n for n, job in known_jobs(plan, done).items() if n not in done and is_done(plan, n, job)}:
        done |= new
    return done


def _run_all(plan: Study, done: set[str], threads: int) -> None:
    """Run what is not done; adds each run that succeeds to `done`."""
    running: dict[str, subprocess.Popen] = {}
    failed: set[str] = set()
    try:
        while True:
            add_finished(plan, done)
            jobs = known_jobs(plan, done)
            waiting = [name for name in jobs if name not in {*done, *failed, *running}]
            for name in waiting[: plan.at_once - len(running)]:
                running[name] = _start(plan, name, jobs[name], threads)
            if not running:
                return
            while not (ended := [name for name, process in running.items() if process.poll() is not None]):
                time.sleep(0.2)
            for name in ended:
                (done if _end(plan, name, running.pop(name).returncode) else failed).add(name)
                print(f"{len(done) + len(failed)} of {plan.size} runs have ended", flush=True)
                write_tables(plan, done)
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)  # not SIGTERM: Lightning would finish a batch; it is lost anyway
            process.wait()


def _start(plan: Study, name: str, arguments: Arguments, threads: int) -> subprocess.Popen:
    path = Path(plan.folder, name)
    if path.exists() and not _record(path).exists():
        raise InputError(f"{path} is in the way and not of this study: move it, or change the study's folder")
    shutil.rmtree(path, ignore_errors=True)  # of a run that did not end
    write_json(_record(path), {"identity": _identity(arguments), "state": "started"})
    with path.with_name(f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *RUN, *(word for pair in arguments for word in pair)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches the study alone, which ends the whole group
            # PR_SET_PDEATHSIG: nothing else ends a run when the study is killed
            preexec_fn=(lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)) if sys.platform == "linux" else None,
        )


def _end(plan: Study, name: str, status: int) -> bool:
    """Record and tell whether the run succeeded."""
    path = Path(plan.folder, name)
    absent = [file for file in recorded(plan) if not (path / file).exists()]
    # a run that is told to stop ends with status 0, so the status alone says little
    good = status == 0 and not absent
    write_json(_record(path), json.loads(_record(path).read_text()) | {"state": "done" if good else "failed"})
    outcome, parts = next(iter(plan.outcomes.items()))
    said = path.with_name(f"{name}.log").read_text("utf-8", "replace").strip().rpartition("\n")[2]
    failure = f"FAILED (status {status}, absent: {', '.join(absent) or 'nothing'}): see {path}.log: {said:.200}"
    print(f"{name}: {f'{outcome} {values(job_rows(plan, path), parts)[0].mean():.3f}' if good else failure}")
    return good


def recorded(plan: Study) -> tuple[str, ...]:
    return "results.json", "responses.json" if plan.prompts else HELD_OUT, "adapter"


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _identity(arguments: Arguments) -> list[str]:
    """What a finished run must share with this job: its options, and the content of the files that options or
    configs name."""
    files = named_files(value for _, value in arguments)
    return [*map(" ".join, arguments), *(f"content of {file}: {digest}" for file, digest in files.items())]


def is_done(plan: Study, name: str, arguments: Arguments) -> bool:
    """Whether the job has finished with these options and files.

    Raises:
        InputError: the job is done with other options or files.
    """
    path = Path(plan.folder, name)
    if not _record(path).exists():
        return False
    record = read_json(_record(path), {"state", "identity"}, f"remove it and {path} to repeat the run")
    if record["state"] != "done" or not all((path / file).exists() for file in recorded(plan)):
        return False
    kinds = {"-": "then ", "+": "now "}  # in order: of two values of one option the later one counts
    lines = ndiff(record["identity"], _identity(arguments))
    if changed := [kinds[line[0]] + line[2:] for line in lines if line[0] in kinds]:
        remedy = f"Change them back, give the study another folder, or remove {path} to repeat the run"
        raise InputError(f"{path} is done, but with other options or files: {'; '.join(changed)}. {remedy}")
    return True
