"""The kernels of an optimizer, and what a continued run must have kept of the optimizer."""

from typing import Any

import torch

KERNELS = ("fused", "foreach")
"""Options that decide how an update is computed, and not what."""


def choose_kernels(optimizer: torch.optim.Optimizer, device: torch.device, precision: str) -> None:
    """Let Adam and AdamW update by the fused kernel on CUDA, if neither `fused` nor `foreach` was given. The fused
    kernel needs no temporary copies of the moments. Under 16-mixed a fused optimizer would see scaled gradients until
    after clipping. A continued run keeps its kernel: the fused one computes on CPUs too."""
    given = any(optimizer.defaults.get(name) is not None for name in KERNELS)
    if isinstance(optimizer, torch.optim.Adam) and device.type == "cuda" and precision != "16-mixed" and not given:
        for options in (optimizer.defaults, *optimizer.param_groups):
            options["fused"] = True


def describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's class and numbers, without its kernels: a run may continue on another device."""
    plain = {n: value for n, value in optimizer.defaults.items() if isinstance(value, int | float | str | tuple)}
    values = {f"optimizer.{name}": str(value) for name, value in plain.items() if name not in KERNELS}
    return {"optimizer": type(optimizer).__name__} | values


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar on their device; 0 where there is none."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
