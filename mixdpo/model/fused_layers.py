"""Layers of a frozen base that launch fewer operations and keep less for backward: LoRA, RMSNorm, SwiGLU.

Numbers are equal up to rounding. Weights keep their names, and modules their classes.
"""

from collections.abc import Collection
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

Part = Literal["lora", "norm", "swiglu"]
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_CASTS: WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = WeakKeyDictionary()
"""Layer -> what its weight was cast from, and the cast. In no module, so that a model can be copied and pickled."""


def fuse(model: nn.Module, parts: Collection[Part]) -> str:
    """Give the layers of the model their fused forward. Adapters may be added before or after.

    - lora: scale and sum inside the product with B. Under autocast A and B are cast once a step. Only a change that
      raises `Tensor._version` renews a cast. Fused and bitsandbytes' optimizers and writes to `.data` do not: call
      `torch.autograd.graph.increment_version` behind them.
    - norm: one RMSNorm kernel on CUDA, which keeps the input in the input's dtype.
    - swiglu: backward computes silu(gate) and its product with `up` again.

    Fake weights are fine, but not inside a block of `FakeTensorMode`: the formula of a layer is checked by numbers.

    Returns:
        A line that names the parts that fit no layer of the model, else "".
    """
    kinds = {module: kind for module in model.modules() if (kind := _kind(module)) in parts}
    for module, kind in kinds.items():
        module.forward = partial(_FORWARD[kind], module)  # unlike a closure, copied and pickled with the module
    unfit = ", ".join(sorted(set(parts) - set(kinds.values())))
    return f"model.fused_layers: this model has no layer for {unfit}\n" if unfit else ""


def _kind(module: Any) -> Any:
    """The part that the module is, judged by what its class computes: Gemma's norm multiplies by 1 + weight."""
    if isinstance(module, LoraLayer):  # by name, as PEFT has bitsandbytes' only where that is installed
        return "lora" if type(module).__name__ in ("Linear", "Linear4bit", "Linear8bitLt") else None
    children, parameters = ([n for n, _ in each] for each in (module.named_children(), module.named_parameters()))
    if not (_epsilon(module) and parameters == ["weight"]) and set(children) != MLP:
        return None
    x, weight = (torch.linspace(*ends, 32, device="cpu") for ends in ((-20, 20), (0.5, 2)))
    alike: dict[str, Any] = {"weight": weight, "variance_epsilon": 0.1, "eps": 0.1, "gate_proj": nn.Identity()}
    alike |= {"up_proj": torch.cos, "down_proj": torch.exp, "act_fn": getattr(module, "act_fn", None)}
    wanted = {"norm": rms_norm(x, (32,), weight, 0.1), "swiglu": torch.exp(silu(x) * torch.cos(x))}
    with suppress(AttributeError, TypeError):  # its forward reads more than a plain layer has
        computed = type(module).forward(SimpleNamespace(**alike), x)
        return next((kind for kind, values in wanted.items() if torch.allclose(computed, values)), None)


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # autocast would widen the input on CUDA
        return rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), _epsilon(norm))


def _lora_forward(layer: Any, x: Tensor, *given: Tensor) -> Tensor:
    """base(x) + Σ scale · x Aᵀ Bᵀ over the active adapters, whose x Aᵀ may be given."""
    result, adapters = layer.base_layer(x), _adapters(layer, x)
    given = given or tuple(linear(dropout(x.to(a.dtype)), a) for a, _, _, dropout in adapters)
    for (_, b, scaling, _), h in zip(adapters, given, strict=True):
        if result.dtype == h.dtype:
            result = torch.addmm(result.flatten(0, -2), h.flatten(0, -2), b.T, alpha=scaling).view_as(result)
        else:  # an addmm would round both to the narrower dtype
            result = (result + linear(h, b) * scaling).to(result.dtype)
    return result


def _adapters(layer: Any, x: Tensor) -> list[Any]:
    """A (r, in), B (out, r), scale and dropout of each active adapter."""
    off = layer.disable_adapters or layer.merged
    matrices, others = (layer.lora_A, layer.lora_B), (layer.scaling, layer.lora_dropout)
    names = [name for name in layer.active_adapters if name in layer.lora_A and not off]
    return [(*(_cast(m[name], x.device.type) for m in matrices), *(other[name] for other in others)) for name in names]


def _cast(holder: Any, device: str) -> Tensor:
    """The layer's weight, in autocast's dtype where autocast is on."""
    weight, on = holder.weight, torch.is_autocast_enabled(device) and holder.weight.dtype != torch.float64
    made_of = weight._version, weight.requires_grad, weight.device, torch.get_autocast_dtype(device) if on else None
    if on and _CASTS.get(holder, (None,))[0] != made_of:
        with torch.inference_mode(False), torch.enable_grad():  # a validation's cast serves training, with its gradient
            _CASTS[holder] = made_of, weight.to(made_of[-1])
    return _CASTS[holder][1] if on else weight


def _swiglu_forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    adapters = _adapters(down, gate) if isinstance(vars(down).get("forward"), partial) else []
    drops = any(drop.training and getattr(drop, "p", 0) for *_, drop in adapters)
    matrices = [a for a, *_ in adapters if a.dtype == gate.dtype and not drops]
    return down(*_SwiGLU.apply(gate, up, *matrices))


class _SwiGLU(torch.autograd.Function):
    """p = silu(gate) · up, and p Aᵀ of the adapters behind it. Backward computes p again for their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *matrices: Tensor) -> Any:
        ctx.save_for_backward(gate, up, *matrices)
        product = silu(gate) * up
        return product, *(linear(product, a) for a in matrices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_product: Tensor, *of_h: Tensor) -> Any:
        gate, up, *matrices = ctx.saved_tensors
        active = silu(gate)
        of_a = [g.flatten(0, -2).T @ (active * up).flatten(0, -2) for g in of_h]
        of_product = sum((g @ a for g, a in zip(of_h, matrices, strict=True)), of_product)
        return torch.ops.aten.silu_backward(of_product * up, gate), active.mul_(of_product), *of_a


_FORWARD: dict[Part, Any] = {"lora": _lora_forward, "norm": _norm_forward, "swiglu": _swiglu_forward}
