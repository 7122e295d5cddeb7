"""Layers of a frozen base that launch fewer operations and keep less for backward: LoRA, RMSNorm, SwiGLU.

Numbers are equal up to rounding. Weights keep their names, and modules their classes.
"""

from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, silu

Part = Literal["lora", "norm", "swiglu"]
MLP = ["act_fn", "down_proj", "gate_proj", "up_proj"]
_CASTS: WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = WeakKeyDictionary()
"""Layer -> what its weight was cast from, and the cast. In no module, so that a model can be copied and pickled."""


def fuse(model: nn.Module, parts: list[Part] | tuple[Part, ...]) -> str:
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
    return unfit and f"model.fused_layers: this model has no layer for {unfit}\n"


def _kind(module: Any) -> Any:
    """The part that the module is, judged by what its class computes: Gemma's norm multiplies by 1 + weight."""
    if isinstance(module, LoraLayer):  # by name, as PEFT has bitsandbytes' only where that is installed
        return "lora" if type(module).__name__ in ("Linear", "Linear4bit", "Linear8bitLt") else None
    children, parameters = sorted(n for n, _ in module.named_children()), [n for n, _ in module.named_parameters()]
    if not (_epsilon(module) and parameters == ["weight"]) and children != MLP:
        return None
    x, weight = (torch.linspace(*ends, 32, device="cpu") for ends in ((-20, 20), (0.5, 2)))
    alike = SimpleNamespace(weight=weight, variance_epsilon=0.1, eps=0.1, act_fn=getattr(module, "act_fn", None))
    alike.gate_proj, alike.up_proj, alike.down_proj = nn.Identity(), torch.cos, torch.exp
    wanted = {"norm": nn.functional.rms_norm(x, (32,), weight, 0.1), "swiglu": torch.exp(silu(x) * torch.cos(x))}
    with suppress(AttributeError, TypeError):  # its forward reads more than a plain layer has
        return next((kind for kind, y in wanted.items() if torch.allclose(type(module).forward(alike, x), y)), None)


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # autocast would widen the input on CUDA
        return nn.functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), _epsilon(norm))


def _lora_forward(layer: Any, x: Tensor, *given: Tensor) -> Tensor:
    """base(x) + Σ scale · x Aᵀ Bᵀ over the active adapters; the x Aᵀ of all of them may be given."""
    result, adapters = layer.base_layer(x), _adapters(layer, x)
    if len(given) < len(adapters):
        given = tuple(linear(dropout(x.to(a.dtype)), a) for a, _, _, dropout in adapters)
    for (_, b, scaling, _), h in zip(adapters, given, strict=True):
        if result.dtype == h.dtype:
            result = torch.addmm(result.flatten(0, -2), h.flatten(0, -2), b.T, alpha=scaling).view_as(result)
        else:  # an addmm would round both to the narrower dtype
            result = (result + linear(h, b) * scaling).to(result.dtype)
    return result


def _adapters(layer: Any, x: Tensor) -> list[Any]:
    """A (r, in), B (out, r), scale and dropout of each active adapter."""
    matrices, others = (layer.lora_A, layer.lora_B), (layer.scaling, layer.lora_dropout)
    names = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
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
    # adapters that read what `down` reads: neither cast nor dropped out
    matrices = [a for a, _, _, d in adapters if a.dtype == gate.dtype and not (d.training and vars(d).get("p"))]
    return down(*_SwiGLU.apply(gate, up, *matrices))


class _SwiGLU(torch.autograd.Function):
    """p = silu(gate) · up, and p Aᵀ of the adapters behind it. Backward computes p again for their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *matrices: Tensor) -> Any:
        ctx.save_for_backward(gate, up, *matrices)
        return (product := silu(gate) * up), *(linear(product, a) for a in matrices)

    @staticmethod
    def backward(ctx: Any, of_product: Tensor, *of_h: Tensor) -> Any:
        gate, up, *matrices = ctx.saved_tensors
        active = silu(gate)
        learns = zip(of_h, ctx.needs_input_grad[2:], strict=True)  # an earlier stage's adapter does not
        of_a = [g.flatten(0, -2).T @ (active * up).flatten(0, -2) if needed else None for g, needed in learns]
        of_product = sum((g @ a for g, a in zip(of_h, matrices, strict=True)), of_product)
        return torch.ops.aten.silu_backward(of_product * up, gate), active.mul_(of_product), *of_a


_FORWARD: dict[Part, Any] = {"lora": _lora_forward, "norm": _norm_forward, "swiglu": _swiglu_forward}
