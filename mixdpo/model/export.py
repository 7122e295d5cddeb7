"""The policy as files and models that others can use: a PEFT folder, a plain merged model."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixdpo.errors import InputError
from mixdpo.model.adapters import Role, adapters_of
from mixdpo.storage.files import written_whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@torch.no_grad()
def merged_copy(model: "PeftModel", name: Role = "policy", dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A plain model in the role `name`, for generation or export, dequantised *before* the adapter is added.

    (Merging into 4-bit weights would round the adapter away.) Equal to the role up to rounding: each weight is summed
    in fp32 and rounded to `dtype` once. Besides `model` itself it takes the copy and one weight in fp32, all on the
    model's device; what is not adapted and has that dtype already is shared.
    """
    causal_lm = model.get_base_model()
    plain = _without_weights(causal_lm, dtype)
    merged, tied = _merged_weights(causal_lm, adapters_of(model, name)), plain.all_tied_weights_keys
    weights = {key: weight.detach().to(dtype) for key, weight in merged if key not in tied}
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    if unlike := sorted(set(missing) - set(tied)) or unexpected:
        raise InputError(
            f"no plain copy of a {causal_lm.config.model_type} model can be made ({unlike[0]} would be missing): "
            "generate with the model itself (dequantise false)"
        )
    plain.tie_weights()
    plain.generation_config = causal_lm.generation_config
    return plain.to(next(causal_lm.parameters()).device).eval().requires_grad_(False)


def generation_dtype(model: "PeftModel", dequantise: bool | None) -> torch.dtype | None:
    """The dtype of the merged copy that generates faster than the model, or None where the model itself generates.

    Args:
        dequantise: True asks for a copy in fp32, False for no copy. None asks for a copy in fp32 on a CPU. On a GPU
            None asks for a copy in the dtype of the model's head if 1.1 times the copy's bytes are free, else for none.
    """
    causal_lm = model.get_base_model()
    head = causal_lm.get_output_embeddings().weight
    if dequantise is None and any(set(m._buffers) - m._non_persistent_buffers_set for m in causal_lm.modules()):
        return None  # some mixtures of experts: a copy would lack them
    if dequantise is None and head.device.type == "cuda":
        need, free = 1.1 * causal_lm.num_parameters() * head.element_size(), torch.cuda.mem_get_info(head.device)[0]
        return head.dtype if need < free else None
    return None if dequantise is False else torch.float32


def _without_weights(causal_lm: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A model of the same architecture without quantisation or adapters, whose weights take no memory yet."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = causal_lm.config.__class__(
        **{key: value for key, value in causal_lm.config.to_dict().items() if key != "quantization_config"}
    )
    # buffers are not in checkpoints, so they are computed; some draw, which must not shift the run's random numbers
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )


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
                plain = dequantize_module_weight(layer)
                value = sum(deltas, plain.float()) if deltas else plain
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
