"""Attention over the documents of packed rows, registered with transformers as `varlen`, `lower_right`, `by_segment`.

A document is a sequence, or a prompt with several responses that are blind to each other. A document's attention is
that of the model's own forward. Prompt and first response are one causal segment; each further response is another.
So a row costs as much as its documents, and no mask of the whole row exists. The three differ in the kernel.
"""

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixdpo.batches.rows import Segments
from mixdpo.model.fused_head import gathered

BIAS = causal_lower_right(1, 1)
"""Set to each call's lengths: inside a dispatch mode, such as that of fake tensors, no new one can be made."""


def attention(kernel: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention (R, T, heads, D) of query (R, heads, T, D), key and value; 0 at padding.

    `segments` comes through the keyword arguments of the model's forward, so a layer that is recomputed in backward
    gets the same: a `Segments`, or True for plain rows, which are causal. Without it the mask says what attends to
    what, as in generation.
    """
    segments: Segments | bool = options.pop("segments", False)
    if isinstance(segments, bool):
        return sdpa_attention_forward(module, query, key, value, None if segments else mask, **options)
    states, dtype = ((query, segments.queries), (key, segments.keys), (value, segments.keys)), computing_dtype(value)
    # positions may have widened query and key
    qkv = [gathered(part.transpose(1, 2).flatten(0, 1), spans).to(dtype) for part, spans in states]
    rows = KERNELS[kernel](*qkv, segments, options.get("scaling")).split([end - at for at, end in segments.queries])
    return (rows[0][None] if len(rows) == 1 else pad_sequence(rows, batch_first=True)), None


def computing_dtype(states: Tensor) -> torch.dtype:
    """What matrix products of these states are computed in: autocast's dtype, or their own."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Any:
    """All segments in one kernel. On other devices than CUDA a loop stands in for the kernel, for tests."""
    if q.device.type == "cuda":
        return in_one_kernel(q, k, v, segments, scale)
    sizes = tuple(zip(*(starts.diff().tolist() for starts in segments.cu_seqlens), strict=True))
    return _one_by_one(_lower_right, q, k, v, Segments((), (), sizes, segments.cu_seqlens), scale)


def in_one_kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Any:
    """Attention (queries, heads, D) of q, and of k and v (keys, heads, D) with as many heads or fewer."""
    from torch.nn.attention.varlen import varlen_attn

    longest = (max(sizes) for sizes in zip(*segments.sizes, strict=True))
    return varlen_attn(q, k, v, *segments.cu_seqlens, *longest, scale=scale, **_causal(varlen_attn))


@cache
def _causal(function: Callable[..., Any]) -> dict[str, Any]:
    """What says causal and grouped heads to `varlen_attn`, which differs between versions of torch."""
    asked = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    return {name: value for name, value in asked.items() if name in signature(function).parameters}


def _one_by_one(kernel: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
    queries, keys = zip(*segments.sizes, strict=True)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    # a kernel's tensors are (1, heads, tokens, D)
    found = [kernel(*(states.transpose(0, 1)[None] for states in part), scale=scale) for part in parts]
    return torch.cat([part[0].transpose(0, 1) for part in found])


def _lower_right(q: Tensor, k: Tensor, v: Tensor, **scale: Any) -> Tensor:
    """By a flash kernel, without a mask and without repeated keys, where the device has one."""
    BIAS.seq_len_q, BIAS.seq_len_kv = q.shape[2], k.shape[2]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, BIAS, enable_gqa=True, **scale)


def _masked(q: Tensor, k: Tensor, v: Tensor, **scale: Any) -> Tensor:
    """By repeated keys, as few kernels group heads, and by a mask where a response sees its prompt."""
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    if q.shape[2] == k.shape[2]:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **scale)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **scale)


KERNELS: dict[str, Callable[..., Tensor]] = {"varlen": _varlen, "lower_right": partial(_one_by_one, _lower_right)}
"""Fastest first; `auto` until `check_documents` chooses."""

KERNELS |= dict.fromkeys(("by_segment", "auto"), partial(_one_by_one, _masked))

for name in KERNELS:
    AttentionInterface.register(name, partial(attention, name))
    AttentionMaskInterface.register(name, sdpa_mask)  # for generation
