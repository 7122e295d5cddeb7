"""Hidden states + output head + targets -> log-probabilities per token, without a sequence's logits in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

TILE = 256
"""Positions whose logits exist at one time: 256 × 128k vocabulary in fp32 is 134 MB."""
VOCABULARY_TILE = 16_384


@dataclass(frozen=True)
class SequenceLogProbs:
    """Of B completions.

    Attributes:
        sums: (B,) summed log-probability of the completion's tokens given what stands before them, in nats, fp32.
        lengths: (B,) number of these tokens, the end token counted.
        shared_sums: (B,) `sums` over the first min(L_w, L_l) tokens, as many as both completions of the pair have. Only
            ld_dpo reads it.
    """

    sums: Tensor
    lengths: Tensor
    shared_sums: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> "SequenceLogProbs":
        shared = None if self.shared_sums is None else self.shared_sums[index]
        return SequenceLogProbs(self.sums[index], self.lengths[index], shared)

    @property
    def means(self) -> Tensor:
        """(B,) per token; 0 of no token."""
        return self.sums / torch.where(self.lengths > 0, self.lengths, 1)


def token_log_probs(hidden: Tensor, head: nn.Module, targets: Tensor, tile: int = TILE) -> Tensor:
    """log p(target | hidden) for M positions, (M,), in float32 (float64 for float64 input).

    The head is applied to `tile` positions at a time and each tile's logits are computed again in backward, so memory
    is bounded by one tile. A frozen head gets no gradient.

    Args:
        hidden: (M, H), the hidden states that predict the targets.
        head: maps (M, H) to logits (M, V).
        targets: (M,) token ids.
    """
    pieces = zip(hidden.split(tile), targets.split(tile), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(_tile_log_probs, h, head, t, use_reentrant=False) for h, t in pieces]
    else:
        parts = [_tile_log_probs(h, head, t) for h, t in pieces]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=_wide(hidden.dtype))


def exact_token_log_probs(hidden: Tensor, head: nn.Linear, targets: Tensor, tile: int = TILE) -> Tensor:
    """As `token_log_probs`, without gradients, and with the logits of a bf16 head computed in fp32.

    The head's rows are widened 16,384 at a time: a 128k × 4096 head in fp32 would take 2.1 GB.
    """
    wide = _wide(hidden.dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if head.weight.dtype == wide:
            return token_log_probs(hidden.to(wide), head, targets, tile)
        bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
        parts = [
            _exact_tile(h.to(wide), head.weight, bias, t)
            for h, t in zip(hidden.split(tile), targets.split(tile), strict=True)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=wide)


def _exact_tile(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    pieces = zip(weight.split(VOCABULARY_TILE), bias.split(VOCABULARY_TILE), strict=True)
    sums = [linear(hidden, w.to(hidden.dtype), b.to(hidden.dtype)).logsumexp(-1) for w, b in pieces]
    target_logits = (hidden * weight[targets].to(hidden.dtype)).sum(-1) + bias[targets].to(hidden.dtype)
    return target_logits - torch.stack(sums).logsumexp(0)


def _tile_log_probs(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(_wide(logits.dtype))  # bf16 log-softmax rounds at 1e-2: DPO's Δ is a sum of hundreds of them
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
