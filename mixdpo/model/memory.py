"""What a run could cost at least, and what its activations take: floating-point operations, matrix rate, bytes."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from mixdpo.batches.rows import Piece, TokenRows, token_rows
from mixdpo.model.forward import predicting_states

PROBED_TOKENS = 64


RESERVED = 0.25
"""Of the free memory, for what the probe does not see: gradients in flight, a layer's working set, fragmentation."""


def linear_sizes(causal_lm: nn.Module) -> tuple[int, int]:
    """Weights of the linear layers of the body, and of the output head; tied or quantised, they multiply alike."""
    head = causal_lm.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in causal_lm.modules() if isinstance(m, nn.Linear) and m is not head]
    adapters = {id(m) for name, m in causal_lm.named_modules() if "lora_" in name}
    return sum(m.in_features * m.out_features for m in layers if id(m) not in adapters), head.weight.numel()


def floor_flops(sizes: tuple[int, int], rows: TokenRows) -> float:
    """Operations that no exact training of these rows on a frozen base can do without: forward and gradient to the
    inputs, 4 per weight and token, in the head for predicted tokens only.

    The prompt is counted once, padding and the reference not at all, so this is the floor with a cached reference
    (20.4 TFLOP a pair in an 8B model, prompt 121, completions 288 each). Attention and adapters are left out.
    """
    body, head = sizes
    return 4.0 * (body * rows.tokens + head * len(rows.target))


def matrix_rate(width: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of (512 × width) · (width × 4 width) products: the best of those that fit into the time."""
    left, right = (
        torch.ones(512, width, device=device, dtype=dtype),
        torch.ones(width, 4 * width, device=device, dtype=dtype),
    )
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        repeats = 20 if device.type == "cuda" else 1
        started = time.perf_counter()
        for _ in range(repeats):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, repeats * 2 * left.numel() * right.shape[1] / (time.perf_counter() - started))
    return best


def activation_bytes(model: Any) -> float:
    """Bytes that a token's activations take until backward, counted on a row of 64 tokens."""
    sizes: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # while it lives, no other tensor gets its address
        return tensor

    kept: list[Tensor] = []
    device = next(model.parameters()).device
    rows = token_rows([[Piece([0] * PROBED_TOKENS, 0, (1, PROBED_TOKENS))]], 1).to(device)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    of_device = [device] if device.type == "cuda" else []  # dropout must not shift the run's random numbers
    with torch.random.fork_rng(of_device), torch.enable_grad(), hooks:
        predicting_states(model, rows)
    return sum(sizes.values()) / PROBED_TOKENS


def most_tokens(model: Any) -> int:
    """Tokens of a micro-batch whose activations fit into the memory that is free now, with the optimizer's state."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return max(
        0, int(((1 - RESERVED) * free - 12 * learning) / activation_bytes(model))
    )  # gradient and two moments, fp32


def recompute(model: nn.Module, on: bool) -> None:
    """Switch activation checkpointing, once enabled, for the forward passes that follow."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on
