"""The least cost of a run and the memory of its activations: floating-point operations, matrix rate, bytes."""

import time
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from mixdpo.batches.rows import Piece, TokenRows, token_rows
from mixdpo.model.forward import predicting_states

PROBED_TOKENS = 64


RESERVED = 0.25
"""Share of the free memory that the probe misses: gradients in flight, a layer's working set, fragmentation."""


OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of running out of memory: of the CPU, the driver (`torch.AcceleratorError`), cuBLAS (`RuntimeError`)."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def linear_sizes(causal_lm: nn.Module) -> tuple[int, int]:
    """Numbers of weights in the body's linear layers and in the output head, whether tied or quantised."""
    head = causal_lm.get_output_embeddings()  # type: ignore[operator]
    layers = [m for name, m in causal_lm.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    return sum(m.in_features * m.out_features for m in layers if m is not head), head.weight.numel()


def floor_flops(sizes: tuple[int, int], rows: TokenRows) -> float:
    """Floating-point operations that any exact training of these rows on a frozen base needs.

    Forward and gradient to the inputs take 4 per weight and token. In the head only predicted tokens count.

    The prompt is counted once, padding and the reference not at all, so this is the floor with a cached reference
    (20.4 TFLOP a pair in an 8B model, prompt 121, completions 288 each). Attention and adapters are left out.
    """
    body, head = sizes
    return 4.0 * (body * rows.tokens + head * len(rows.target))


def matrix_rate(width: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of (512 × width) · (width × 4 width) products: the best of those that fit into the time."""
    left, right = (torch.ones(*size, device=device, dtype=dtype) for size in ((512, width), (width, 4 * width)))
    best, until, repeats = 0.0, time.perf_counter() + seconds, 20 if device.type == "cuda" else 1
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(repeats):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, repeats * 2 * left.numel() * right.shape[1] / (time.perf_counter() - started))
    return best


def activation_bytes(model: Any) -> float:
    """Bytes that a token's activations take until backward, counted on a row of 64 tokens."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no other tensor gets the same address
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    device = next(model.parameters()).device
    rows = token_rows([[Piece([0] * PROBED_TOKENS, 0, (1, PROBED_TOKENS))]], 1).to(device)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    of_device = [device] if device.type == "cuda" else []  # dropout must not shift the run's random numbers
    with torch.random.fork_rng(of_device), torch.enable_grad(), hooks:
        predicting_states(model, rows)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known) / PROBED_TOKENS


def most_tokens(model: Any) -> int:
    """Tokens of a micro-batch whose activations fit into the memory that is free now, with the optimizer's state."""
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    left = (1 - RESERVED) * free - 12 * learning  # gradient and two moments, fp32
    return max(0, int(left / activation_bytes(model)))


def recompute(model: nn.Module, on: bool) -> None:
    """Switch activation checkpointing on or off for later forward passes. The model must have enabled it before."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on
