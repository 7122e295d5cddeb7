"""The least cost of a run: floating-point operations and the rate of matrix products. Recomputation on and off."""

import torch
from torch import nn
from torch.utils.benchmark import Timer

from mixdpo.batches.rows import TokenRows

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
    """Operations per second of (512 × width) · (width × 4 width) products: the best of those that fit into the time.

    The matrices are random: a GPU takes more power for them than for ones, and then lowers its clock. They are drawn by
    a generator of their own, so the run's random numbers stay as they are.
    """
    draw = {"device": device, "dtype": dtype, "generator": torch.Generator(device).manual_seed(0)}
    left, right = (torch.randn(*size, **draw) for size in ((512, width), (width, 4 * width)))
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * left.numel() * right.shape[1] / min(timer.blocked_autorange(min_run_time=seconds).times)


def recompute(model: nn.Module, on: bool) -> None:
    """Switch activation checkpointing on or off for later forward passes. The model must have enabled it before."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on
