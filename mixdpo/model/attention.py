"""Attention over the documents of packed rows, registered with transformers as `by_segment`.

A document is a sequence, or a prompt with several responses that are blind to each other. A document's attention is
that of the model's own forward. Prompt and first response are one causal block; each further response is another.
So a row costs as much as its documents, and no mask of the whole row exists.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_SEGMENT = "by_segment"


def by_segment(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention (R, T, heads, D) of query (R, heads, T, D), key and value; without documents it is `sdpa`.

    `documents`, a sequence of `Document`, comes through the keyword arguments of the model's forward. A layer that is
    recomputed in backward then gets the same documents.
    """
    documents = options.pop("documents", None)
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    options.pop("is_causal", None)
    rows: list[list[Tensor]] = [[] for _ in query]
    for row, start, first, *ends in documents:
        q, k, v = (states[row : row + 1] for states in (query, key, value))
        for begin, end in pairwise((start, *(ends or (first,)))):
            if begin == start:
                block = (k[:, :, start:end], v[:, :, start:end], None)
            else:
                seen = [torch.cat([states[:, :, start:first], states[:, :, begin:end]], 2) for states in (k, v)]
                mask = torch.ones(end - begin, seen[0].shape[2], dtype=torch.bool, device=q.device).tril(first - start)
                block = (*seen, mask[None, None])
            part, _ = sdpa_attention_forward(module, q[:, :, begin:end], *block, is_causal=block[2] is None, **options)
            rows[row].append(part)
    for parts in rows:
        padding = query.shape[2] - sum(part.shape[1] for part in parts)
        parts.append(parts[0].new_zeros(1, padding, *parts[0].shape[2:]))
    return torch.cat([torch.cat(parts, 1) for parts in rows]), None


AttentionInterface.register(BY_SEGMENT, by_segment)


AttentionMaskInterface.register(BY_SEGMENT, sdpa_mask)  # for generation
