"""The policy as files and models that others can use: a PEFT folder, a plain merged model."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixdpo.adapters import Role, adapters_of
from mixdpo.files import written_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@torch.no_grad()
def merged_copy(model: "PeftModel", name: Role = "policy", dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A plain model in the role `name`, for generation or export, dequantised *before* the adapter is added.

    (Merging into 4-bit weights would round the adapter away.) Equal to the role up to rounding: each weight is summed
    in fp32 and rounded to `dtype` once. Besides `model` itself it takes the copy and one weight in fp32.
    """
    causal_lm = model.get_base_model()
    plain = _untrained(causal_lm, dtype)
    empty = plain.state_dict()  # the tensors of `plain` themselves: what is copied into them is in the model
    missing, unexpected = set(empty) - set(plain.all_tied_weights_keys), []
    for key, weight in _merged_weights(causal_lm, adapters_of(model, name)):
        if key not in empty or empty[key].shape != weight.shape:
            unexpected.append(key)
            continue
        empty[key].copy_(weight)
        missing.discard(key)
    if unexpected or missing:
        raise RuntimeError(f"the merged copy does not match the model: missing {missing}, unexpected {unexpected}")
    plain.tie_weights()
    plain.generation_config = causal_lm.generation_config
    return plain.eval().requires_grad_(False)


def _untrained(causal_lm: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A model of the same architecture without quantisation or adapters, on the same device."""
    from transformers import AutoModelForCausalLM

    config = causal_lm.config.__class__(
        **{key: value for key, value in causal_lm.config.to_dict().items() if key != "quantization_config"}
    )
    device = next(causal_lm.parameters()).device
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and must not shift the run's random numbers
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)


def _merged_weights(causal_lm: "PreTrainedModel", adapters: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter, one after the other; those of layers dequantised, in fp32, the adapters on."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    for path, module in causal_lm.named_modules():
        if "lora_" in path or ".base_layer" in path:
            continue
        adapted = isinstance(module, BaseTunerLayer)
        layer = module.get_base_layer() if adapted else module
        for key, value in layer._parameters.items():
            if key == "weight" and value is not None:
                deltas = [module.get_delta_weight(name) for name in adapters if adapted and name in module.lora_A]
                value = sum(deltas, dequantize_module_weight(layer).float())
            if value is not None:
                yield f"{path}.{key}".lstrip("."), value


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the policy as a PEFT folder that `PeftModel.from_pretrained` loads; written whole, then renamed.

    A stacked policy becomes one adapter of the summed rank: B₁A₁ + B₂A₂ is [B₁ B₂] times A₁ above A₂.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    states = [get_peft_model_state_dict(model, adapter_name=adapter) for adapter in adapters_of(model, "policy")]
    state = {key: torch.cat([s[key] for s in states], dim=0 if "lora_A" in key else 1) for key in states[0]}
    state = {key: value.contiguous().cpu() for key, value in state.items()}
    config = copy.copy(model.peft_config["policy"])
    config.inference_mode = True
    config.r, config.lora_alpha = config.r * len(states), config.lora_alpha * len(states)
    with written_whole(folder) as partial:
        config.save_pretrained(str(partial))
        weights = partial / "adapter_model.safetensors"
        save_file(state, weights, metadata={"format": "pt"})
        weights.chmod(0o644)
