"""Does a pair fit? An 8B model in NF4 on one GPU: peak memory and tokens per second, in eight questions.

    python benchmarks/memory_8b.py [--ask 1,5] [--out benchmarks/results/memory_8b.json]

Llama-3.1-8B's architecture; its weights are drawn and packed on the device, so no wide model is written, read or held.
A pair is a prompt of 128 tokens and two responses that fill the length; three optimizer steps of one pair with the
reference online, the last two timed. Tokens count each side with its prompt, for both. Every question is a process of
its own, the most important ones first. torch.cuda.set_per_process_memory_fraction limits the memory. TRL runs with its
defaults (activation checkpointing on). `--tiny` tries all of it out on a CPU with two small layers and without limits.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import LLAMA_8B, TINY, random_nf4, random_pair, random_policy, small_base
from measuring import about, in_fresh_process, table

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PROMPT, STEPS, GOAL = 128, 3, "r 16, one pair of 2 × 2,048 tokens, in at most 8.5 GB allocated"


class Question(NamedTuple):
    side: str
    rank: int
    length: int
    recompute: bool = True
    limit_gb: float | None = None


QUESTIONS = [
    Question("ours", 16, 2048),  # the goal
    Question("ours", 128, 1024),  # where the optimizer's step is the peak
    Question("ours", 16, 1024),
    Question("trl", 16, 1024),  # beside the one before
    Question("ours", 16, 2048, limit_gb=12),  # a card of 12 GB, and what fragmentation takes there
    Question("ours", 16, 2048, recompute=False),  # what recomputation saves, and costs
    Question("ours", 16, 1024, recompute=False, limit_gb=24),  # a card of 24 GB need not recompute
    Question("ours", 64, 1024),
]


def limit(gigabytes: float | None) -> None:
    if GPU and gigabytes:
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)


def costs(ends: list[float], tokens: int) -> dict[str, float]:
    """Of steps that ended at these times; the first one is not counted."""
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    found = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    if GPU:
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        found |= {"reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    return found


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(asked: Question, tiny: bool) -> dict[str, float]:
    from mixdpo.batches.rows import build_rows
    from mixdpo.losses import DPO
    from mixdpo.model.adapters import role
    from mixdpo.model.forward import sequence_log_probs
    from mixdpo.model.memory import floor_flops, linear_sizes, matrix_rate, recompute

    limit(asked.limit_gb)
    model = random_policy(TINY if tiny else LLAMA_8B, DEVICE, asked.rank)
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    recompute(model, asked.recompute)
    rows = build_rows([random_pair(PROMPT // (16 if tiny else 1), asked.length)], [True], [True]).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=GPU)
    loaded = {"loaded_gb": torch.cuda.memory_allocated() / 1e9} if GPU else {}

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False):
            with torch.no_grad(), role(model, "reference"):
                reference = sequence_log_probs(model, rows)
            policy = sequence_log_probs(model, rows)
            loss = DPO()(policy[:1], policy[1:], reference[:1], reference[1:]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ends = []
    for _ in range(STEPS):
        step()
        ends.append(now())
    found = costs(ends, 2 * asked.length) | loaded
    floor = 1.5 * floor_flops(linear_sizes(base), rows)  # with the reference's forward
    rate = matrix_rate(base.config.hidden_size, DEVICE, torch.bfloat16)
    return found | {"floor_share": floor / rate / found["seconds"], "tflop_per_second": rate / 1e12}


def trl(asked: Question, tiny: bool) -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from mixdpo.model.loading import load_tokenizer

    limit(asked.limit_gb)
    tokenizer, model = load_tokenizer(small_base()), random_nf4(TINY if tiny else LLAMA_8B, DEVICE, "sdpa")
    draw = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        ids = torch.randint(len(tokenizer) // 4, len(tokenizer) // 2, (tokens,), generator=draw)
        return " ".join(map(tokenizer.decode, ids.tolist()))

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    sides = {"prompt": PROMPT // (16 if tiny else 1), "chosen": asked.length, "rejected": asked.length}
    pairs = [{name: text(tokens) for name, tokens in sides.items()} for _ in range(STEPS)]
    with tempfile.TemporaryDirectory() as out:
        arguments = {"output_dir": out, "per_device_train_batch_size": 1, "max_length": asked.length, "bf16": True}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**arguments, **quiet, max_steps=STEPS, use_cpu=not GPU),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    return costs(ends, 2 * asked.length)


def tried(asked: Question, tiny: bool) -> dict[str, Any]:
    try:
        return {"fits": True, **in_fresh_process({"ours": ours, "trl": trl}[asked.side], asked, tiny)}
    except torch.OutOfMemoryError as error:
        return {"fits": False, "why": str(error).splitlines()[0]}
    except BrokenProcessPool:  # by the system, for want of the machine's memory: says nothing about the GPU's
        return {"fits": None, "why": "its process was killed"}


def row(run: dict[str, Any]) -> list[Any]:
    way = "recomputed" if run["recompute"] else "kept"
    keys = ("peak_gb", "reserved_gb", "tokens_per_second", "floor_share")
    cells = [f"{run[key]:.2f}" if key in run else None for key in keys]
    return [f"{run['side']}, r {run['rank']}, 2 × {run['length']}, {way}", run["limit_gb"], run["fits"], *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", default=",".join(str(number + 1) for number in range(len(QUESTIONS))))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_8b.json"))
    options = parser.parse_args()
    if not (GPU or options.tiny):
        raise SystemExit("no CUDA device: --tiny tries the script out on the CPU")
    found: dict[str, Any] = {"about": about(), "goal": GOAL, "tiny": options.tiny, "runs": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for number in map(int, options.ask.split(",")):
        asked = QUESTIONS[number - 1]
        if options.tiny:
            asked = asked._replace(length=asked.length // 32, limit_gb=None)
        found["runs"].append(asked._asdict() | tried(asked, options.tiny))
        print(found["runs"][-1], flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    heads = ["one pair", "GB at most", "fits", "peak, GB", "reserved, GB", "tokens/s", "floor share"]
    print("\n" + table(heads, map(row, found["runs"])))


if __name__ == "__main__":
    main()
