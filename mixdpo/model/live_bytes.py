"""The bytes that live while fake tensors are computed, and what CUDA's kernels take where there is no CUDA."""

import weakref
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public name for it

PHASES = ("loaded", "reference", "forward", "backward", "optimizer")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and each phase's peak of them."""

    def __init__(self, on_cuda: bool) -> None:
        super().__init__()
        self.on_cuda, self.now, self.phase = on_cuda, 0, PHASES[0]
        self.live, self.peaks = dict[int, int](), Counter[str]()

    def start(self, phase: str) -> None:
        self.phase, self.peaks[phase] = phase, self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return 1  # a fake tensor has no value: Adam's number of steps, or a check's answer
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.live:
                grain = 512 if self.on_cuda else 1  # of CUDA's caching allocator
                self.live[key] = -(-storage.nbytes() // grain) * grain
                self.now += self.live[key]
                weakref.finalize(storage, self._drop, key)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now + self._in_passing(name, args))
        return made

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def _in_passing(self, name: str, args: Any) -> int:
        """Bytes that a kernel takes and gives back: a weight as dequantised, what attention's backward sums in fp32."""
        if name == "gemm_4bit" and (args[0].numel() > 512 * args[0].shape[-1] or not self.on_cuda):
            return prod(args[2]) * args[0].element_size() + prod(args[2]) // 8
        if name == "logsumexp":
            return args[0].nbytes
        return 2 * args[1].nbytes if self.on_cuda and "attention" in name and "backward" in name else 0


def kernels_of(device: str) -> AbstractContextManager[Any]:
    """Inside the block a simulation for "cuda" computes by what stands for CUDA's kernels."""
    kernels: dict[str, Any] = {"scaled_dot_product_attention": _cuda_attention, "rms_norm": _CudaRMSNorm.apply}
    return patch.multiple(nn.functional, **kernels) if device == "cuda" else nullcontext()


def _cuda_attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Tensor:
    """What `scaled_dot_product_attention` does on CUDA in half precision: flash attention without a mask or with one
    that is causal from the lower right; otherwise the memory-efficient kernel, which adds the mask as a tensor."""
    causal, scale, aten = options.get("is_causal", False), options.get("scale"), torch.ops.aten
    if attn_mask is None or type(attn_mask).__name__ == "CausalBias":
        causal = causal or attn_mask is not None
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]
    bias = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    bias = nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]].expand(*query.shape[:3], -1)
    inputs = (query, key, value, bias, query.requires_grad, 0.0, causal)
    return aten._scaled_dot_product_efficient_attention(*inputs, scale=scale)[0]


class _CudaRMSNorm(torch.autograd.Function):
    """What `rms_norm` keeps on CUDA, where it is one kernel: the input, and one fp32 number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _shape: Any, weight: Tensor, _epsilon: float) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None
