"""Train six short runs in two checkouts with the same seeds, and compare the adapters bit for bit.

`git worktree add /tmp/baseline baseline`, then
`python benchmarks/compare_checkouts.py /tmp/baseline [NEW_CHECKOUT …] [--runs NAME …]`

NEW_CHECKOUT is the checkout of this script by default. The runs: MixDPO, cleaned MixDPO, self-evolving token cleaning,
SimPO, bucketed routing with a refreshed reference, and a resumed run; each on one tiny random model, fp32, on the CPU.
Each checkout trains in a process of its own, with its own code and caches, on the Python that runs this script. That
takes about a minute. Where a run fails, or an adapter differs in one bit, the run is named, and the exit status is 1
(with `--tolerance 1e-4`: where the adapters differ by more, as norms; for changes that only round otherwise).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from tiny import make_pairs, make_samples, write_llama, write_pairs  # noqa: E402

# old name -> new name, and a file that only checkouts with the new name have
RENAMED = {
    "mixdpo.schedules.": ("mixdpo.routing.", "mixdpo/routing/schedules.py"),
    "lightning_modules.token_cleaning.": ("lightning_modules.callbacks.", "lightning_modules/callbacks/__init__.py"),
}
TRAIN = """
import json, runpy, sys
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["run.py", *arguments]
    try:
        runpy.run_path("run.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            print("== failed", *arguments, end.code)
    except Exception as error:
        print("== failed", *arguments, repr(error))
"""
ROOMS = {"lightning_modules": "Module", "datamodules": "DataModule"}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
Options = dict[str, Any]


def merged(first: Options, second: Options) -> Options:
    both = {key: merged(first[key], second[key]) for key in first.keys() & second.keys() if type(second[key]) is dict}
    return {**first, **second, **both}


def named(class_path: str, **options: Any) -> Options:
    return {"class_path": class_path, "init_args": options}


def base_options(model: str, module: str, data: str, source: str) -> Options:
    loading = {"base": model, "quantization": "none", "dtype": "float32", "lora": {"rank": 4, "dropout": 0.1}}
    optimizer = named("torch.optim.AdamW", lr=1e-2)
    trainer = {"accelerator": "cpu", "precision": "32-true", "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    batches = {"source": source, "validation": 0.2, "batch_size": 4, "eval_batch_size": 2, "max_length": 64}
    return {
        "seed_everything": 42,
        "model": named(module, **loading, optimizer=optimizer),
        "data": named(data, **batches),
        "trainer": {**trainer, "max_epochs": 1, "log_every_n_steps": 1, **QUIET},
    }


def six_runs(folder: Path) -> dict[str, list[Options]]:
    """Name -> options of the run; of a resumed run also of the run that it continues, first."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    model = write_llama(folder / "model")
    pairs = write_pairs(folder / "pairs.jsonl", make_pairs(30))
    samples = write_pairs(folder / "samples.jsonl", make_samples(48))
    names = [f"{room}.preference.Preference{kind}" for room, kind in ROOMS.items()]
    preference = merged(base_options(model, *names, pairs), {"data": {"init_args": {"max_prompt_length": 32}}})
    sft = base_options(model, *(f"{room}.sft.SFT{kind}" for room, kind in ROOMS.items()), samples)

    def run(base: Options, model: Options, data: Options, **trainer: Any) -> Options:
        changes = {"model": {"init_args": model}, "data": {"init_args": data}, "trainer": trainer}
        return merged(base, changes)

    refresh, hard = "lightning_modules.token_cleaning.RefreshReference", {"routing": {"hard_fraction": 0.4}}
    mixdpo = {"schedule": named("mixdpo.schedules.StagedCosine", warmup=0.2)}
    cleaning = {"selection": {"keep_ratio": 0.6, "scope": "global"}}
    shuffled = {"routing": {"hard_fraction": 0.4, "order": "shuffled", "reshuffle": True}}
    buckets = {"routing": {"hard_fraction": 0.0, "order": "bucketed", "buckets": 3}}
    pausable = {"schedule": named("mixdpo.schedules.Constant", warmup=0.0)}
    evolving = {"stage_start": "restart", "schedule": named("mixdpo.schedules.StagedLinear", warmup=0.2)}
    evolving |= {"cleaning": cleaning | {"warm_up_stages": 1}}
    slices = {"slices": {"count": 3, "split": "contiguous"}}
    simpo = {"preference_loss": named("mixdpo.losses.SimPO"), "schedule": named("mixdpo.schedules.Cosine")}
    linear = {"schedule": named("mixdpo.schedules.Linear")}
    moving = [named(refresh, every="stage", role="reference")]
    return {
        "mixdpo": [run(preference, mixdpo, hard, max_epochs=2)],
        "mixdpo_cleaned": [run(preference, mixdpo | {"cleaning": cleaning | {"reference_lr": 1e-2}}, hard)],
        "self_evolving": [run(sft, evolving, slices, callbacks=[named(refresh, every="stage")])],
        "simpo": [run(preference, simpo, shuffled, max_epochs=2)],
        "bucketed": [run(preference, linear, buckets, callbacks=moving)],
        "resumed": [run(preference, pausable, hard, max_epochs=2, **more) for more in ({"max_steps": 4}, {})],
    }


def command(checkout: Path, folder: Path, name: str, options: Options, resume: str | None) -> list[str]:
    """Writes the run's config with the names that the checkout has."""
    text = json.dumps({**options, "name": name, "runs": str(folder / "runs"), "ckpt_path": resume})
    for old, (new, marker) in RENAMED.items():
        text = text.replace(old, new) if (checkout / marker).exists() else text
    config = folder / f"{name}.yaml"
    config.write_text(text)
    return ["--config", str(config)]


def train(checkout: Path, folder: Path, runs: dict[str, list[Options]]) -> None:
    """Leaves folder/runs/NAME/adapter of each run that does not fail."""
    folder.mkdir()
    commands = []
    for name, (*before, last) in runs.items():
        commands += [command(checkout, folder, f"{name}-before", options, None) for options in before]
        checkpoint = str(folder / "runs" / f"{name}-before" / "checkpoints" / "last.ckpt") if before else None
        commands.append(command(checkout, folder, name, last, checkpoint))
    caches = {"MIXDPO_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    own_code = {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | caches | own_code | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options: Options = {"cwd": checkout, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", TRAIN], input=json.dumps(commands), **options)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-3000:]}")
    for line in done.stdout.splitlines():
        if line.startswith("== failed"):
            print(f"{checkout}: {line}", flush=True)


def adapter(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Nothing, where the run has failed."""
    file = folder / "runs" / name / "adapter" / "adapter_model.safetensors"
    return load_file(file) if file.exists() else {}


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the matrices that are not there twice, or differ in a bit."""
    alike = {
        key
        for key in first.keys() & second.keys()
        if first[key].dtype == second[key].dtype == torch.float32
        and torch.equal(first[key].view(torch.int32), second[key].view(torch.int32))
    }
    return sorted((first.keys() | second.keys()) - alike)


def relative(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two adapters against the first one's; 1 where they have other matrices."""
    if first.keys() != second.keys():
        return 1.0
    one, other = (torch.cat([weights[key].flatten() for key in sorted(first)]) for weights in (first, second))
    return float((one - other).norm() / one.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("new", type=Path, nargs="*", default=[ROOT])
    parser.add_argument("--runs", nargs="+", help="only these")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative norm of the difference that is accepted")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as root:
        baseline = Path(root) / "baseline"
        runs = six_runs(Path(root))
        runs = {name: runs[name] for name in arguments.runs or runs}
        train(arguments.baseline.resolve(), baseline, runs)
        trained = {name: adapter(baseline, name) for name in runs}
        for name, weights in trained.items():
            if not weights or not all(map(torch.any, weights.values())):
                sys.exit(f"the baseline has trained nothing in {name}")
        for first, second in combinations(runs, 2):
            if not differences(trained[first], trained[second]):
                sys.exit(f"{first} and {second} gave the same adapter: the comparison tells nothing")
        for number, checkout in enumerate(arguments.new):
            folder = Path(root) / str(number)
            train(checkout.resolve(), folder, runs)
            for name in runs:
                own = adapter(folder, name)
                differ, off = differences(trained[name], own), relative(trained[name], own)
                result = (
                    f"DIFFERS in {len(differ)} matrices, first {differ[0]}, by {off:.1e}" if differ else "bit-identical"
                )
                print(f"{checkout} {name}: {result}", flush=True)
                failed |= bool(differ) and not off <= arguments.tolerance
    sys.exit(failed)


if __name__ == "__main__":
    main()
