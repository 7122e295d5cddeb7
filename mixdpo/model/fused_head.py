"""Hidden states + output head + targets -> log-probabilities per token, without a sequence's logits in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

TILE = 256
"""Positions whose logits exist at one time: 256 × 128k vocabulary in fp32 is 134 MB."""


VOCABULARY_TILE = 16_384


Statistic = Callable[[Tensor, Tensor], Tensor]
"""log p of the whole vocabulary (m, V) and the targets (m,) of m positions -> a number for each position (m,)."""


class Comparison(partial):
    """A statistic that gets log p of the whole vocabulary under the base (m, V) as a third argument."""


@dataclass(frozen=True)
class Head:
    """The frozen output head: logits cap · tanh(x / cap) of x = hidden Wᵀ + b.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        cap: limit of the logits in models that cap logits softly (Gemma 2); None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None

    def shaped(self, x: Tensor) -> Tensor:
        """Logits of the linear layer's output `x`."""
        return x if self.cap is None else self.cap * torch.tanh(x / self.cap)

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """(m, V) in `dtype`. bf16 log-softmax rounds at 1e-2: DPO's Δ is a sum of hundreds of them."""
        return self.shaped(linear(hidden, self.weight, self.bias).to(dtype))


@dataclass(frozen=True)
class SequenceLogProbs:
    """Summed log-probabilities and lengths of B completions.

    Attributes:
        sums: (B,) summed log-probability of the completion's tokens given what stands before them, in nats, fp64.
        lengths: (B,) number of these tokens, the end token counted.
        shared_sums: (B,) `sums` over the first min(L_w, L_l) tokens, as many as both completions of the pair have. Only
            the loss `LDDPO` reads these sums.
    """

    sums: Tensor
    lengths: Tensor
    shared_sums: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "SequenceLogProbs":
        """The completions at `index`, each at most once: backward then adds no gradients, whose order would vary."""
        shared = None if self.shared_sums is None else self.shared_sums[index]
        return SequenceLogProbs(self.sums[index], self.lengths[index], shared)

    @property
    def means(self) -> Tensor:
        """(B,) mean log-probability per token, in nats; 0 for a completion without tokens."""
        return self.sums / torch.where(self.lengths > 0, self.lengths, 1)


def gathered(hidden: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Rows [start, end) of hidden (N, …), one span after the other (M, …). Spans may overlap. One span is not copied.

    Its gradient is that of `split` and `cat`: sums in a fixed order, unlike those of indexing on CUDA.
    """
    cuts = sorted({0, len(hidden), *chain.from_iterable(spans)})
    pieces, place = hidden.split([b - a for a, b in pairwise(cuts)]), {cut: i for i, cut in enumerate(cuts)}
    wanted = [piece for start, end in spans for piece in pieces[place[start] : place[end]]]
    return wanted[0] if len(wanted) == 1 else torch.cat(wanted)


def run_sums(values: Tensor, runs: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Sums over runs of values (M,) or (M, H), in fp64: entry c is that of the run (c, tokens), 0 where there is none.

    Each token run is summed by itself, in a fixed order. `index_add` would sum in an order that varies on CUDA: DPO's
    first loss would then not be exactly ln 2, and training that is resumed would not repeat bit for bit.

    Args:
        runs: (c, tokens), in the order of the values; each c in [0, count) once.
    """
    parts = values.split([tokens for _, tokens in runs])
    sums = {c: part.sum(0, dtype=torch.float64) for (c, _), part in zip(runs, parts, strict=True)}
    nothing = values.new_zeros(values.shape[1:], dtype=torch.float64)
    return torch.stack([sums.get(c, nothing) for c in range(count)])


def token_log_probs(hidden: Tensor, head: Head, targets: Tensor, tile: int = TILE, *, exact: bool = False) -> Tensor:
    """log p(target | hidden) for M positions, (M,), in float32 (float64 for float64 input).

    The head is applied to `tile` positions at a time. Their part of the gradient to `hidden` is computed while their
    logits exist. So memory is that of one tile and one more tensor like `hidden`, and nothing is computed twice.

    Args:
        hidden: (M, H), the hidden states that predict the targets.
        head: the frozen output head.
        targets: (M,) token ids.
        exact: no gradients, and the logits of a bf16 head in fp32. The head's rows are widened
            16,384 at a time: a 128k × 4096 head in fp32 would take 2.1 GB.
    """
    if not exact:
        return _TokenLogProbs.apply(hidden, head, targets, tile, (), None)[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if head.weight.dtype == wide:
            return token_log_probs(hidden.to(wide), head, targets, tile)
        pieces = zip(hidden.split(tile), targets.split(tile), strict=True)
        return torch.cat([_exact_tile(states.to(wide), head, target) for states, target in pieces])


def entropy(log_probs: Tensor, targets: Tensor, top: int | None = None) -> Tensor:
    """−Σ p ln p (m,) in nats, of the `top` likeliest tokens with their probabilities renormalised, or of all tokens."""
    if top is not None:
        log_probs = log_probs.topk(min(top, log_probs.shape[-1])).values.log_softmax(-1)
    return -torch.linalg.vecdot(log_probs.exp(), log_probs)


def is_top(log_probs: Tensor, targets: Tensor) -> Tensor:
    """1 where the target is the likeliest token, else 0 (m,)."""
    return log_probs.argmax(-1) == targets


@Comparison
def divergence(log_probs: Tensor, targets: Tensor, base: Tensor) -> Tensor:
    """KL(base ‖ policy) = Σ b (ln b − ln p) over the whole vocabulary (m,), in nats."""
    return torch.linalg.vecdot(base.exp(), base - log_probs).clamp_min(0)  # rounding can fall below


anchor = Comparison(divergence)
"""The `divergence` as a term of the loss: if it is the first of the statistics, it has a gradient."""


def target_statistics(
    hidden: Tensor, head: Head, targets: Tensor, statistics: Sequence[Statistic], tile: int = TILE, base: Any = None
) -> tuple[Tensor, ...]:
    """`token_log_probs` (M,), and each of the statistics (M,) from the same logits. Only `token_log_probs` and an
    `anchor` have a gradient.

    Args:
        base: (M, H), the base's hidden states, for a `Comparison`. A tile then holds the base's logits as well.
    """
    return _TokenLogProbs.apply(hidden, head, targets, tile, statistics, base)


class _TokenLogProbs(torch.autograd.Function):
    """d log p / d hidden = (e_target − p) W and d KL(base ‖ policy) / d hidden = (p − b) W, times the slope of
    `Head.shaped`; a position's is scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, tile: int, statistics: Any, base: Any) -> Any:
        if head.weight.requires_grad:
            raise ValueError("the output head must be frozen: set its weight.requires_grad to False")
        positions, wide = len(targets), torch.promote_types(hidden.dtype, torch.float32)
        log_probs, *measured = (hidden.new_empty(positions, dtype=wide) for _ in range(1 + len(statistics)))
        anchored = anchor in statistics[:1]
        gradients = [torch.empty_like(hidden) for _ in range(1 + anchored)] if ctx.needs_input_grad[0] else []
        for start in range(0, positions, tile):
            at = slice(start, start + tile)
            target = targets[at, None]
            logits = head.logits(hidden[at], wide)
            normaliser = logits.logsumexp(-1, keepdim=True)
            log_probs[at] = (logits.gather(-1, target) - normaliser).squeeze(-1)
            slope = None if head.cap is None or not gradients else 1 - (logits / head.cap) ** 2
            if statistics or gradients:
                logits.sub_(normaliser)
            of_base = () if base is None else (head.logits(base[at], wide).log_softmax(-1),)
            with torch.autocast(hidden.device.type, enabled=False):  # it would round some of them to bf16
                for values, statistic in zip(measured, statistics, strict=True):
                    values[at] = statistic(logits, targets[at], *(of_base if isinstance(statistic, Comparison) else ()))
            if gradients:
                of_logits = logits.exp_().neg_()
                of_kl = [log_b.exp_().add_(of_logits).neg_() for log_b in of_base[:anchored]]
                of_logits.scatter_(-1, target, of_logits.gather(-1, target) + 1)
                for gradient, slopes in zip(gradients, (of_logits, *of_kl), strict=True):
                    slopes = slopes if slope is None else slopes.mul_(slope)
                    gradient[at] = slopes.to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*measured[anchored:])
        return log_probs, *measured

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *of_values: Any) -> Any:
        first, *more = (gradient * of[:, None] for gradient, of in zip(ctx.saved_tensors, of_values, strict=False))
        return sum(more, first).to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def _exact_tile(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    pieces = zip(head.weight.split(VOCABULARY_TILE), bias.split(VOCABULARY_TILE), strict=True)
    sums = [head.shaped(linear(hidden, w.to(hidden.dtype), b.to(hidden.dtype))).logsumexp(-1) for w, b in pieces]
    of_target = (hidden * head.weight[targets].to(hidden.dtype)).sum(-1) + bias[targets].to(hidden.dtype)
    return head.shaped(of_target) - torch.stack(sums).logsumexp(0)
