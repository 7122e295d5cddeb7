"""One set of weights, several roles: LoRA adapters on one frozen base, switched by flags.

- `policy`: the adapter that learns.
- `reference`: the model that a preference loss compares the policy with. The reference is a frozen copy of the adapter
  that training started from, or the base if training started from the base.
- `base`: the model with all adapters off.
- `cleaning_reference`: the adapter that scores tokens. `previous`: the cleaning_reference before its last refresh.

A policy may be stacked: after `stack_policy` it is the sum of the frozen adapters `stage_1`, `stage_2`, … and the
adapter `policy` that learns on top of them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixdpo.errors import InputError
from mixdpo.model.loading import readable

Role = Literal["policy", "reference", "base", "cleaning_reference", "previous"]
# further options of LoRA, and their values in a plain one
FURTHER, PLAIN = ("modules_to_save", "use_dora", "bias", "lora_bias", "alora_invocation_tokens"), (None, False, "none")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the frozen base (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: r, inner dimension of the update.
        alpha: α; the update is scaled by α / r.
        dropout: share of the adapter's inputs set to 0 in training.
        targets: "all-linear" (every linear layer but the head) or module names such as ["q_proj", "v_proj"]. Layers of
            a vision or audio tower get no adapter: text does not reach them.
        rslora: scale the update by α / √r, not α / r (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: ClosedUnitInterval = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False

    @classmethod
    def of(cls, adapter: str) -> "Lora":
        """The shape of a saved adapter (PEFT folder or hub id), from its configuration alone."""
        with readable(adapter, "adapter"):
            saved = LoraConfig.from_pretrained(adapter)
        targets = saved.target_modules if isinstance(saved.target_modules, str) else [*saved.target_modules]
        return cls(saved.r, saved.lora_alpha, saved.lora_dropout, targets, saved.use_rslora)


def add_adapters(base: PreTrainedModel, lora: Lora, adapter: str | None = None) -> PeftModel:
    """Put the adapter `policy` on the base: a fresh one, or the one saved in `adapter` (PEFT folder or hub id), whose
    frozen copy becomes the adapter `reference`.

    Only the policy's weights require a gradient afterwards.

    Raises:
        InputError: the saved adapter cannot be loaded or does not fit the base, or `lora.targets` do not.
    """
    if adapter is None:
        shape = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora}
        where = {"target_modules": lora.targets, "exclude_modules": towers(base) or None}
        config = LoraConfig(**shape, **where, task_type="CAUSAL_LM")
        try:
            model = get_peft_model(base, config, adapter_name="policy")
        except ValueError as error:
            raise InputError(f"lora.targets {lora.targets} do not fit this model: {error}. Use all-linear") from error
    else:
        with readable(adapter, "adapter"):
            _check_safetensors(adapter)
            model = PeftModel.from_pretrained(base, adapter, adapter_name="policy", is_trainable=True)
        _check_adapter(adapter, model, "policy")
        add_reference(model, "reference", adapter)
    model.stacked = {}  # adapter -> how many of the stage adapters stand under it
    _freeze_all_but_policy(model)
    return model


def towers(base: PreTrainedModel) -> list[str]:
    """Names of the linear layers outside the language model: those of vision and audio towers and their projectors."""
    decoder = base.get_decoder()
    if base.config.get_text_config() is base.config or decoder is base:
        return []
    text = {*decoder.modules(), base.get_output_embeddings()}
    return [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and layer not in text]


def add_reference(model: PeftModel, name: Role, adapter: str | None = None) -> None:
    """Add the frozen adapter `name`: the one saved in `adapter`, or a copy of the policy as it is now."""
    if adapter is None:
        _add_like_policy(model, name)
        copy_adapter(model, "policy", name)
        return
    # initial weights are drawn before the saved ones replace them, and must not shift the run's random numbers
    with torch.random.fork_rng(devices=[]), readable(adapter, "adapter"):
        _check_safetensors(adapter)
        model.load_adapter(adapter, adapter_name=name)
    _check_adapter(adapter, model, name)
    _freeze_all_but_policy(model, name)


def copy_adapter(model: PeftModel, source: str, target: str, *, decay: float = 0.0) -> None:
    """target := decay · target + (1 − decay) · source, matrix by matrix; decay 0 is a copy."""
    check_alike(model, source, target)
    with torch.no_grad():
        for layer in adapter_layers(model):
            for matrices in (layer.lora_A, layer.lora_B):
                new, old = matrices[source].weight, matrices[target].weight
                old.copy_(old.lerp(new, 1 - decay) if decay else new)
    model.stacked[target] = model.stacked.get(source, 0)


@torch.no_grad()
def factor_distance(model: PeftModel, source: str, target: str, decay: float) -> float:
    """How far the average that `copy_adapter` makes, of factors, is from the average W of the weights themselves:
    ‖B′A′ − W‖ / ‖W‖ with W = d · B₀A₀ + (1 − d) · BA. Call before the copy.

    d is `decay`, B₀A₀ the target and BA the source, each times its layer's scale; the norms are Frobenius' over all
    layers. W is the soft update of TR-DPO (arXiv 2404.09656). Its rank is up to 2r, so no adapter of rank r holds it.
    B′A′ − W = −d (1 − d) (B − B₀)(A − A₀): the distance is 0 while only B has moved, and 0.1 says that the new target
    misses W by a tenth of W's size. NaN where source and target both are the bare base.
    """
    squares = []
    for layer in adapter_layers(model):
        (b, b_0), (a, a_0) = ([m[n].weight.double() for n in (source, target)] for m in (layer.lora_B, layer.lora_A))
        average = torch.cat([(1 - decay) * b, decay * b_0], 1), torch.cat([a, a_0])
        products = (average, (decay * (1 - decay) * (b - b_0), a - a_0))
        # ‖BA‖² = tr(BᵀB AAᵀ): of the small products alone
        squares.append([layer.scaling[source] ** 2 * (b.T @ b * (a @ a.T)).sum() for b, a in products])
    size, distance = (torch.stack(each).sum().sqrt() for each in zip(*squares, strict=True))
    return float(distance / size)


def check_alike(model: PeftModel, source: str, target: str) -> None:
    """
    Raises:
        InputError: the two adapters differ in shapes, layers or scale, so neither can be copied to the other.
    """

    def shape(layer: Any, name: str) -> Any:
        return name in layer.lora_A and (layer.lora_A[name].weight.shape, layer.scaling[name])

    if any(shape(layer, source) != shape(layer, target) for layer in adapter_layers(model)):
        raise InputError(f"the adapters {source} and {target} differ in rank, alpha or targets: make model.lora agree")


def stack_policy(model: PeftModel) -> None:
    """Freeze the policy as the next stage adapter and start a fresh one on top: the same function, new weights."""
    config = model.peft_config["policy"]
    if config.rank_pattern or config.alpha_pattern:
        raise InputError("stage_start fresh_adapter needs an adapter of one rank and scale: use another stage_start")
    add_stage(model)
    copy_adapter(model, "policy", f"stage_{model.stacked['policy']}")
    for layer in adapter_layers(model):
        weight = layer.lora_A["policy"].weight  # PEFT would draw by the generator of its device
        drawn = nn.init.kaiming_uniform_(torch.empty_like(weight, device="cpu"), a=5**0.5)
        with torch.no_grad():
            weight.copy_(drawn)
            layer.lora_B["policy"].weight.zero_()


def add_stage(model: PeftModel) -> None:
    """Room for one more frozen stage adapter under the policy."""
    model.stacked["policy"] = stage = model.stacked.get("policy", 0) + 1
    _add_like_policy(model, f"stage_{stage}")
    for layer in adapter_layers(model):
        layer._active_adapter = adapters_of(model, "policy")


@contextmanager
def role(model: PeftModel, name: Role) -> Iterator[None]:
    """Compute in the role `name` inside the block, and in the earlier role after the block.

    Flips PEFT's two per-layer flags only: `disable_adapter()` would also flip `requires_grad` (and un-freeze on exit
    what was frozen) and takes 30 times longer. The role at *backward* decides the gradient, so never enter a role
    between a forward and its backward.
    """
    layers = adapter_layers(model)
    saved = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    active = adapters_of(model, name)
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = active or ["policy"], not active
        yield
    finally:
        for layer, (before, disabled) in zip(layers, saved, strict=True):
            layer._active_adapter, layer._disable_adapters = before, disabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors by full name, as a checkpoint holds them."""
    # named_parameters, not state_dict: that would pack the quantisation state of every 4-bit layer
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_of(model: PeftModel, name: str) -> list[str]:
    """The adapters whose sum a role adds to the base; none for the bare base."""
    stages = [f"stage_{stage}" for stage in range(1, model.stacked.get(name, 0) + 1)]
    return [*stages, name] if name in model.peft_config else stages


def _add_like_policy(model: PeftModel, name: str) -> None:
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and must not shift the run's random numbers
        model.add_adapter(name, copy.copy(model.peft_config["policy"]))
    for matrices in (m for layer in adapter_layers(model) for m in (layer.lora_A, layer.lora_B) if name in m):
        matrices[name].to(matrices["policy"].weight.dtype)  # PEFT's are fp32, also where bf16-true holds the policy
    _freeze_all_but_policy(model, name)


def _freeze_all_but_policy(model: PeftModel, *added: str) -> None:
    for layer in adapter_layers(model):
        layer.lora_dropout.update({name: nn.Identity() for name in added})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".policy." in name)


def _check_safetensors(adapter: str) -> None:
    """Refuse an adapter without safetensors: PEFT would then read a pickle, which can run code."""
    if not Path(adapter).is_dir():
        hf_hub_download(adapter, "adapter_model.safetensors")
    elif not Path(adapter, "adapter_model.safetensors").is_file():
        raise InputError(f"the adapter '{adapter}' has no adapter_model.safetensors: save it anew by save_pretrained")


def _check_adapter(name: str, model: PeftModel, adapter: str) -> None:
    """Refuse all but plain LoRA layers, which alone a role can switch, and files with missing, unknown or NaN weights.

    PEFT draws missing weights at random and ignores unknown weights.
    """
    config = model.peft_config[adapter]
    extra = [key for key in FURTHER if getattr(config, key, None) not in PLAIN]
    if config.peft_type != "LORA" or extra:
        raise InputError(f"adapter '{name}' is no plain LoRA, but {config.peft_type} with {extra}: give a plain one")
    with readable(name, "adapter"):
        saved, needed = load_peft_weights(name, device="cpu"), get_peft_model_state_dict(model, adapter_name=adapter)
    if unlike := sorted(saved.keys() ^ needed.keys()):
        remedy = f"Give the base that the adapter was trained on, {config.base_model_name_or_path}"
        raise InputError(f"adapter '{name}' does not fit model.base, as {unlike[0]} is not in both. {remedy}")
    if not all(torch.isfinite(weight).all() for weight in saved.values()):
        raise InputError(f"adapter '{name}' holds NaN or infinite weights: give another adapter")
