"""A tiny random model with a real tokenizer and chat template, and random pairs and conversations of its words.

Imports nothing of this project: `compare_checkouts.py` makes one model for two checkouts.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch

_WORDS = "red blue green tea sun moon cat dog tree sea hill road book song rain wind salt snow bird fish"
WORDS = _WORDS.split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def write_llama(folder: Path) -> str:
    """A folder with a 2-layer Llama with random weights (fp32, 64 wide) and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, "user", "assistant", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    tokens |= {"additional_special_tokens": ["<|im_start|>"], "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**shape, eos_token_id=3, pad_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random words of many lengths, with distinct margins 0.5, 1.0, … shuffled."""
    draw = random.Random(seed)
    margins = [0.5 * (i + 1) for i in range(count)]
    draw.shuffle(margins)

    def text(longest: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, longest)))

    return [
        {"pair_id": f"p{i}", "prompt": f"{text(6)} {i % 7}", "chosen": text(12), "rejected": text(9), "margin": margin}
        for i, margin in enumerate(margins)
    ]


def make_samples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """SFT rows of two sources, of random words of many lengths; every third one has two turns."""
    draw = random.Random(seed)

    def message(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(2, longest)))}

    def turns(number: int) -> list[dict[str, str]]:
        return [m for _ in range(number) for m in (message("user", 6), message("assistant", 12))]

    ids = {i: {"id": f"s{i}", "source": "odd" if i % 2 else "even"} for i in range(count)}
    return [names | {"messages": turns(2 if i % 3 == 0 else 1)} for i, names in ids.items()]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def response(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
