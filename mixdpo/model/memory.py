"""What the activations of a run take, and which micro-batches are recomputed because of that."""

from typing import Any

import torch
from torch import Tensor, nn

from mixdpo.batches.rows import Piece, token_rows
from mixdpo.model.forward import predicting_states

PROBED_TOKENS = 64


RESERVED = 0.25
"""Of the free memory, for what the probe does not see: gradients in flight, a layer's working set, fragmentation."""


def activation_bytes(model: Any) -> float:
    """Bytes that a token's activations take until backward, counted on a row of 64 tokens."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no other tensor gets the address of one of them
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
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    left = (1 - RESERVED) * free - 12 * learning  # gradient and two moments, fp32
    return max(0, int(left / activation_bytes(model)))


def recompute(model: nn.Module, on: bool) -> None:
    """Switch activation checkpointing, once enabled, for the forward passes that follow."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on
