"""One part of benchmarks/device_study.sh: recipes compared on a GPU. What has ended is in OUT at any time.

    python benchmarks/device_study.py candidates --out OUT [--tiny]   # the default recipe's study: control, candidates
    python benchmarks/device_study.py controls --out OUT              # the same study, all its runs
    python benchmarks/device_study.py pairs --out OUT                 # reward accuracy on held-out real pairs
    python benchmarks/device_study.py table --out OUT                 # all that OUT holds

The study is configs/studies/default_recipe.yaml in bf16, with other seeds, many runs at a time, and all prompts are
answered at once. Of the real pairs, the first ones of a file are split by prompt, once for all runs. A run is `run.py`
on the pairs' own config, with pairs of up to 1,024 tokens; its heldout.csv has each held-out pair.
"""

import argparse
import csv
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from subprocess import Popen
from typing import Any

import noisy_labels
import numpy as np
import torch
import yaml
from inputs import small_base
from measuring import table

from mixdpo.data.messages import split_by_prompt
from mixdpo.data.pairs import read_pairs
from mixdpo.errors import InputError
from mixdpo.evaluation.bootstrap import two_way_bootstrap
from mixdpo.evaluation.fit_results import read_columns
from mixdpo.routing.route import Routing
from mixdpo.storage.files import write_csv, write_rows, write_text

ROOT, GPU = Path(__file__).parents[1], torch.cuda.is_available()
STUDY, CONTROL = ROOT / "configs/studies/default_recipe.yaml", "mixdpo_paper_cosine"
ON_GPU = {"trainer.accelerator": "gpu", "trainer.precision": "bf16-mixed", "model.dtype": "bfloat16"}
PAIRS = {"ultrafeedback_pairs": ("ultrafeedback_sample", 900), "alpaca_eval_pairs": ("alpaca_eval", 1500)}
"""File -> its config, number of pairs."""
METHODS = (CONTROL, "dpo", "sft_then_dpo", "dpo_easy_only")
HELD_OUT, BATCH, AT_ONCE, TINY_PAIRS = 0.3, 8, 10, 8
TRAINING = {
    "data.limit": "null",
    "data.overlong": "truncate",
    "data.batch_size": BATCH,
    "data.micro_batch_tokens": 8192,
}
TRAINING |= {"trainer.accumulate_grad_batches": 1}
TRAINING |= {"trainer.max_epochs": 2}  # up to max_steps: easy-only has fewer pairs, and takes some of them twice
VALUES = [f"val/{of}/{key}" for of in ("all", "easy", "hard") for key in ("rewards/accuracy", "length_accuracy")]

Job = tuple[str, str, int]
"""Data, method, seed."""

Found = tuple[list[Any], list[tuple[int, float]]]
"""Steps and VALUES as a run logged them. Of each held-out pair: its id, and 1 if the chosen response has the larger
reward, ½ if both are equal."""


Options = dict[str, Any]


def how(tiny: bool) -> Options:
    """Options of every run."""
    options = ON_GPU if GPU else {"trainer.accelerator": "cpu", "model.quantization": "none"}
    return {**options, "trainer.enable_progress_bar": "false"} | ({"model.base": small_base(tiny)} if tiny else {})


def run_all(commands: Mapping[Path, str], at_once: int) -> Iterator[list[Path]]:
    """Run shell commands, so many at a time; each writes to the .log beside its key. Yields, every second, the keys of
    those that have ended well since."""
    waiting, running = list(commands), dict[Path, Popen]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                with (key := waiting.pop(0)).with_suffix(".log").open("w") as log:
                    running[key] = Popen(commands[key], shell=True, stdout=log, stderr=log, start_new_session=True)
            time.sleep(1)
            ended = {key: running.pop(key).returncode for key in list(running) if running[key].poll() is not None}
            for key in (key for key, status in ended.items() if status):
                print(f"FAILED: {key}", tail(key.with_suffix(".log")), flush=True)
            yield [key for key, status in ended.items() if not status]
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-600:]


def write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    write_csv(path, columns, (dict(zip(columns, row, strict=True)) for row in rows))


# The study of the default recipe.


def write_studies(work: Path, tiny: bool) -> list[Path]:
    """Two files of one folder: the study's control and candidates, and all of its runs."""
    study = yaml.safe_load(STUDY.read_text("utf-8"))
    options, evaluation = study["options"], study["options"]["trainer.callbacks"][0]["init_args"]
    evaluation["batch_size"] = 400  # all prompts at once
    if tiny:
        write_rows(work / "prompts.jsonl", noisy_labels.lines_of(Path(study["prompts"]))[::57])  # 8, of all parts
        study["prompts"] = evaluation["prompts"] = str(work / "prompts.jsonl")
        evaluation["max_new_tokens"], options["data.limit"] = 4, TINY_PAIRS
    study |= {"folder": str(work / "recipe"), "seeds": [*range(2 if tiny else 8)], "at_once": 1 if tiny else AT_ONCE}
    first = {name: study["runs"][name] for name in (study["control"], *study["holm"])}
    files = {work / "candidates.yaml": first, work / "all.yaml": first | study["runs"]}
    for file, runs in files.items():
        write_text(file, yaml.safe_dump(study | {"options": options | how(tiny), "runs": runs}, sort_keys=False))
    return [*files]


def keep_study(folder: Path, out: Path) -> None:
    """Copy the study's tables, and its row of each run, grid point, seed and prompt."""
    kept = {"scores.csv": "recipe_prompts.csv", "table.csv": "recipe.csv", "table.md": "recipe.md"}
    for name, copy in kept.items():
        write_text(out / copy, (folder / name).read_text("utf-8"))


def recipe(tiny: bool, work: Path, out: Path, part: str) -> bool:
    """Whether all runs are done. The part `controls` first does what the part `candidates` was too short for."""
    if not Path("data/default_recipe/prompts.jsonl").exists():
        noisy_labels.main("default_recipe")
    good, kept, folder = False, 0.0, work / "recipe"
    for file in write_studies(work, tiny)[: 1 + (part == "controls")]:
        try:
            for ended in run_all({file: shlex.join([sys.executable, "-m", "mixdpo", "study", str(file)])}, 1):
                good = bool(ended)
                if (folder / "table.md").exists() and (folder / "table.md").stat().st_mtime > kept:
                    kept = (folder / "table.md").stat().st_mtime
                    keep_study(folder, out)
        finally:
            print(said := file.with_suffix(".log").read_text())
            print(*(tail(folder / f"{name}.log") for name in re.findall("^(.+): FAILED", said, re.MULTILINE)))
    return good


# Real pairs.


def write_split(data: str, work: Path, tiny: bool) -> Options:
    """Write the training and the held-out pairs; returns the options of a run on them, with the steps of an epoch."""
    name, most = PAIRS[data]
    source = Path(os.environ.get("DATA", ROOT.parent / "shared" / "data"), f"{data}.jsonl.gz")
    routing = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text("utf-8"))["data"]["init_args"]["routing"]
    pairs = read_pairs(str(source), margin="margin", limit=TINY_PAIRS if tiny else most).dataset
    train, held_out = map(pairs.select, split_by_prompt(pairs["prompt"], HELD_OUT, seed=0))
    threshold = Routing(**routing).plan(np.asarray(train["margin"]), np.asarray(train["pair_id"])).threshold
    split = {"data.source": work / f"{data}.train.jsonl", "data.validation": work / f"{data}.held_out.jsonl"}
    for file, rows in zip(split.values(), (train, held_out), strict=True):
        write_rows(file, rows.select_columns(["pair_id", "prompt", "chosen", "rejected", "margin"]).to_list())
    return {**split, "data.validation_threshold": threshold, "trainer.max_steps": -(-len(train) // BATCH)}


def command(run: Path, job: Job, split: Options, tiny: bool) -> str:
    (data, method, seed), most = job, 128 if tiny else 1024
    options = {**how(tiny), "data.max_length": most, "data.max_prompt_length": most // 2, "data.eval_batch_size": BATCH}
    options |= TRAINING | split
    options |= {"runs": run.parent, "name": run.name, "seed_everything": seed, "data.seed": seed}
    configs = [f"--config=configs/{name}.yaml" for name in (PAIRS[data][0], f"controls/{method}")]
    return shlex.join([sys.executable, "run.py", *configs, *(f"--{key}={value}" for key, value in options.items())])


def result(run: Path) -> Found:
    with (run / "metrics.csv").open() as lines:
        last = list(csv.DictReader(lines))[-1]
    values = [float(last[key]) if last.get(key) else None for key in VALUES]
    pairs = read_columns(run / "heldout.csv")
    right = zip(pairs["pair_id"].tolist(), pairs["rewards/accuracy"].tolist(), strict=True)
    return [int(last["step"]) + 1, *values], [*right]


def pairs_table(found: Mapping[Job, Found]) -> str:
    """Means over seeds; intervals over seeds × held-out pairs of the accuracy, and of its difference to CONTROL's."""
    lines = []
    for data, method in dict.fromkeys(job[:2] for job in found):
        right = {job: np.array([pair[-1] for pair in pairs]) for job, (_, pairs) in found.items()}
        seeds = [job[2] for job in found if job[:2] == (data, method)]
        both = [seed for seed in seeds if (data, CONTROL, seed) in found and method != CONTROL]
        gain = [right[data, method, seed] - right[data, CONTROL, seed] for seed in both]
        values = zip(*(found[data, method, seed][0] for seed in seeds), strict=True)
        steps, *means = [None if None in value else float(np.mean(value)) for value in values]
        accuracy = two_way_bootstrap([right[data, method, seed] for seed in seeds])
        against = f"{two_way_bootstrap(gain):+.3f}, seeds {', '.join(map(str, both))}" if both else ""
        size = f"{len(seeds)} × {len(right[data, method, seeds[0]])}"
        lines.append([data, method, size, f"{steps:g}", f"{accuracy:.3f}", against, *means])
    head = ["data", "run", "seeds × pairs", "steps", "reward accuracy [95 %]", f"against {CONTROL}", *VALUES]
    return table(head, lines)


def real_pairs(tiny: bool, work: Path, out: Path) -> bool:
    """Whether all runs are done."""
    splits, methods = {data: write_split(data, work, tiny) for data in PAIRS}, METHODS[::3] if tiny else METHODS
    jobs = [(data, method, seed) for seed in range(1 if tiny else 3) for data in PAIRS for method in methods]
    runs = {work / "pairs" / "-".join(map(str, job)): job for job in jobs}
    done, left, found = [run for run in runs if (run / "results.json").exists()], {}, dict[Job, Found]()
    for run in (run for run in runs if run not in done):
        shutil.rmtree(run, ignore_errors=True)  # of a run that did not end
        left[run] = command(run, runs[run], splits[runs[run][0]], tiny)
    for ended in filter(None, chain([done], run_all(left, 1 if tiny else AT_ONCE))):
        found |= {runs[run]: result(run) for run in ended}
        ordered = {job: found[job] for job in jobs if job in found}
        rows = ([*job, *row] for job, (row, _) in ordered.items())
        write(out / "pairs.csv", ("data", "run", "seed", "steps", *VALUES), rows)
        each = ([*job, *pair] for job, (_, pairs) in ordered.items() for pair in pairs)
        write(out / "pairs_heldout.csv", ("data", "run", "seed", "pair", "right"), each)
        write_text(out / "pairs.md", pairs_table(ordered))
    return len(found) == len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["candidates", "controls", "pairs", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.part == "table":
        tables = [options.out / name for name in ("parts.tsv", "recipe.md", "pairs.md")]
        return print(*(path.read_text("utf-8") if path.exists() else f"no {path.name}" for path in tables), sep="\n")
    if not (GPU or options.tiny):
        raise SystemExit("no CUDA device: --tiny tries the parts out on the CPU")
    where = work, _ = Path(os.environ.get("WORK", f"runs/device_study{'_tiny' * options.tiny}")), options.out
    (work / "pairs").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of `timeout`: ends what runs
    try:
        if options.part == "pairs":
            sys.exit(not real_pairs(options.tiny, *where))
        sys.exit(not recipe(options.tiny, *where, options.part))
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(f"device_study.py: {error}")


if __name__ == "__main__":
    main()
