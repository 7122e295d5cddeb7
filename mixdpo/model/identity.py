"""Fingerprints of weights: of a base, and of the adapters of a role."""

import hashlib

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixdpo.model.adapters import Role, adapter_layers, adapters_of
from mixdpo.model.forward import causal_lm_of


def adapter_fingerprint(model: PeftModel, name: Role) -> str:
    """16 hex digits of the weights that the role `name` adds to the base; "none" if the role adds nothing."""
    digest, adds = hashlib.sha256(), False
    adapters = adapters_of(model, name)
    for layer in adapter_layers(model):
        for adapter in adapters:
            if adapter in layer.lora_A:  # it may have fewer layers than the policy
                adds |= bool(layer.lora_B[adapter].weight.any())  # B of a fresh adapter is 0
                digest.update(repr(layer.scaling[adapter]).encode())
                for matrices in (layer.lora_A, layer.lora_B):
                    digest.update(matrices[adapter].weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if adds else "none"


def base_fingerprint(model: PeftModel | PreTrainedModel) -> str:
    """16 hex digits of the base's weights (quantised as they are) and its configuration. Adapters do not count.

    Reads all weights once: about a second per GB.
    """
    model = causal_lm_of(model)
    config = model.config.to_dict()
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in config.items() if not k.startswith("_"))).encode())
    named = ((name.replace(".base_layer.", "."), name, parameter) for name, parameter in model.named_parameters())
    for name, path, parameter in sorted(named, key=lambda item: item[0]):
        if "lora_" not in name:
            for tensor in (parameter, *_scales(model.get_submodule(path.rpartition(".")[0]), parameter)):
                digest.update(name.encode())
                digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def _scales(layer: nn.Module, weight: nn.Parameter) -> list[Tensor]:
    """The scales by which bitsandbytes multiplies a weight of 4 or 8 bits."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        return [state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]
    # the first forward moves the scales of 8 bits to the layer
    holders = (weight, getattr(layer, "state", None)) if weight is getattr(layer, "weight", None) else ()
    return [holder.SCB for holder in holders if getattr(holder, "SCB", None) is not None]
