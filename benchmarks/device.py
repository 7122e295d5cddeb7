"""One part of benchmarks/device.sh: what must be known once there is a GPU. Adds its results to OUT/device.json.

    python benchmarks/device.py PART --out OUT [--tiny]      # --tiny: small models, on the CPU where there is no GPU
    python benchmarks/device.py table --out OUT              # all that OUT holds, as one table

Random weights of real shapes, SmolLM2 where its package is there, and nothing from the network. What was found is
written after each result, so a part that is stopped keeps what it had.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from device_kernels import DEVICE, GPU, Found, attentions, generation, parity, speed
from inputs import TINY_BASE, small_base
from measuring import about, table

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "mixdpo" / "constraints" / "constraints_pairs.jsonl"


def base_and_pairs(folder: str, tiny: bool) -> tuple[str, str]:
    base = small_base(tiny)
    if base != TINY_BASE:
        return base, str(PAIRS)
    from tiny import make_pairs, write_pairs

    return base, write_pairs(Path(folder) / "pairs.jsonl", make_pairs(48))


def run_arguments(name: str, steps: int, folder: str, tiny: bool) -> list[str]:
    """`run.py` on own_pairs.yaml with the small model, on the GPU where there is one."""
    base, source = base_and_pairs(folder, tiny)
    options = {"name": name, "runs": folder, "model.base": base, "data.source": source, "data.batch_size": 4}
    options |= {"trainer.max_steps": steps, "trainer.accumulate_grad_batches": 1, "data.validation": 0}
    options |= {"data.max_length": 256, "data.max_prompt_length": 128, "model.reference_cache": "false"}
    options |= {} if GPU else {"trainer.accelerator": "cpu", "model.quantization": "none"}
    return ["--config", "configs/own_pairs.yaml", *(str(word) for k, v in options.items() for word in (f"--{k}", v))]


def run_py(name: str, steps: int, *more: str, folder: str, tiny: bool) -> dict[str, Any]:
    command, started = [sys.executable, "run.py", *run_arguments(name, steps, folder, tiny), *more], time.perf_counter()
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = {"said": (ran.stderr or ran.stdout).strip().splitlines()[-3:]} if ran.returncode else {}
    return {"exit": ran.returncode, "seconds": time.perf_counter() - started, **said}


def facts(tiny: bool, out: Path) -> Found:
    from mixdpo.model.memory import matrix_rate

    if GPU:
        card = torch.cuda.get_device_properties(0)
        yield "card", f"{card.name}, sm {card.major}.{card.minor}, {card.total_memory / 1e9:.1f} GB"
        yield "CUDA", torch.version.cuda
        yield "context, GB", (card.total_memory - torch.cuda.mem_get_info()[0]) / 1e9
    width = 256 if tiny else 4096
    yield f"bf16 matrix rate at width {width}, TFLOP/s", matrix_rate(width, DEVICE, torch.bfloat16, seconds=2) / 1e12
    yield "attention", attentions()


def starts(tiny: bool, out: Path) -> Found:
    """Does a run load and start?"""
    layouts = {"packed": (), "padded, recomputed": ("--data.pack", "0", "--data.share_prompt", "false")}
    for name, options in layouts.items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, run_py("start", 2, *options, folder=folder, tiny=tiny)


def tests(tiny: bool, out: Path) -> Found:
    """Those marked gpu."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    options = ["-m", "gpu", "-rfE", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    ran = subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True)
    yield "pytest -m gpu", {"exit": ran.returncode, "said": ran.stdout.splitlines()[-20:]}


def waits(tiny: bool, out: Path) -> Found:
    """Calls that wait for the device in steps that are not logged, by place; the progress bar is on."""
    from lightning_modules import cli
    from lightning_modules.preference import PreferenceModule

    step, first, last, found, calls = PreferenceModule.training_step, 4, 16, Counter[str](), Counter[str]()

    def watched(module: Any, batch: Any, index: int) -> Any:
        calls["steps"] += 1
        if GPU and calls["steps"] in (first, last):
            torch.cuda.set_sync_debug_mode("warn" if calls["steps"] == first else "default")
        return step(module, batch, index)

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack()[:-1]]
            found[" < ".join([frame for frame in frames if not frame.startswith("warnings.py")][-8:][::-1])] += 1

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning, PreferenceModule.training_step = note, watched
        more = ["--trainer.log_every_n_steps", "1000", "--trainer.max_epochs", "10"]
        sys.argv = ["run.py", "fit", *run_arguments("waits", last, folder, tiny), *more]
        cli.run(sys.argv[1:])
    yield (
        f"in {last - first} of {calls['steps']} steps",
        dict(found.most_common(20)) if GPU else "counted on a GPU only",
    )


def memory(tiny: bool, out: Path) -> Found:
    """benchmarks/memory_8b.py, which writes OUT/memory.json itself after each question."""
    more = ["--tiny", "--ask", "1,4"] if tiny else []
    yield from other("memory_8b.py", "memory.json", out, *more)


def trl(tiny: bool, out: Path) -> Found:
    """benchmarks/preference_step.py on the device: ours and TRL's, reference online."""
    with tempfile.TemporaryDirectory() as folder:
        base, built_in = base_and_pairs(folder, tiny)
        source = os.environ.get("SOURCE", built_in)
        numbers = ["--pairs", "4" if tiny else "16", "--rounds", "1", "--cases", "online"]
        how = ["--accelerator", DEVICE.type, "--dtype", "float32" if tiny else "bfloat16"]
        yield from other("preference_step.py", "trl.json", out, "--model", base, "--source", source, *numbers, *how)


def other(script: str, file: str, out: Path, *more: str) -> Found:
    command = [sys.executable, str(Path(__file__).with_name(script)), "--out", str(out / file), *more]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    head, _, *rows = [line.split(" | ") for line in ran.stdout.splitlines() if line.startswith("| ")] or ([], [])
    yield script, {"exit": ran.returncode} | ({} if head else {"said": ran.stdout.splitlines()[-3:]})
    for name, *cells in rows:
        yield name[2:], {what.strip(" |"): cell.strip(" |") for what, cell in zip(head[1:], cells, strict=True)}


def resume(tiny: bool, out: Path) -> Found:
    """Six steps at once, and again, and as three and three: largest difference of the adapters."""
    from safetensors.torch import load_file

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    for kind, more in {"deterministic": ["--trainer.deterministic", "true"], "as it is": []}.items():
        with tempfile.TemporaryDirectory() as folder:
            more = [*more, "--checkpoint.every_n_steps", "3", "--model.lora.dropout", "0.1"]
            more += ["--model.schedule_steps", "6", "--model.optimizer.init_args.lr", "1e-3"]
            last = ["--ckpt_path", f"{folder}/half/checkpoints/last.ckpt"]
            jobs = {"whole": (6, more), "half": (3, more), "rest": (6, [*more, *last]), "again": (6, more)}
            ran = {n: run_py(n, steps, *given, folder=folder, tiny=tiny) for n, (steps, given) in jobs.items()}
            if any(run["exit"] for run in ran.values()):
                yield kind, ran
                continue
            names = ("whole", "again", "rest")
            whole, again, rest = (load_file(f"{folder}/{n}/adapter/adapter_model.safetensors") for n in names)
            off = [max(float((whole[k] - each[k]).abs().max()) for k in whole) for each in (rest, again)]
            yield kind, dict(zip(("resumed", "the same run again"), off, strict=True))


PARTS = {part.__name__: part for part in (facts, starts, tests, waits, parity, speed, memory, resume, trl, generation)}


def add(out: Path, part: str, result: dict[str, Any]) -> None:
    path = out / "device.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.with_suffix(".new").write_text(json.dumps(found | {part: result}, indent=2, default=str) + "\n")
    path.with_suffix(".new").replace(path)


def short(value: Any) -> str:
    """For one line of the table."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {short(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "¦")


def print_table(out: Path) -> None:
    path, rows = out / "device.json", []
    found = json.loads(path.read_text()) if path.exists() else {}
    for line in (out / "parts.tsv").read_text().splitlines():
        part, ended = line.split("\t", 1)
        rows.append([part, ended.replace("\t", ", "), found.get(part, {}).get("error", "")])
        rows += [["", name, short(value)[:400]] for name, value in found.get(part, {}).get("found", {}).items()]
    print(table(["part", "what", "found"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "device")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.part == "table":
        return print_table(options.out)
    if not (GPU or options.tiny):
        raise SystemExit("no CUDA device: --tiny tries the parts out on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"about": about(), "tiny": options.tiny, "found": {}}
    add(options.out, options.part, result)  # a part that is stopped at once is no part of an earlier run
    try:
        for name, value in PARTS[options.part](options.tiny, options.out):
            result["found"][name] = value
            print(f"{options.part}: {name}: {short(value)}", flush=True)
            add(options.out, options.part, result)
    except Exception as error:
        add(options.out, options.part, result | {"error": f"{type(error).__name__}: {error}"})
        raise
    values = [value for value in result["found"].values() if isinstance(value, dict)]
    sys.exit(any(value.get("exit") or "error" in value for value in values))


if __name__ == "__main__":
    main()
