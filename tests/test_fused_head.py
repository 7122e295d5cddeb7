"""The head in tiles: values, gradients and statistics of naive logits in fp64, and no tensor larger than a tile."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mixdpo.model import fused_head
from mixdpo.model.fused_head import TILE, VOCABULARY_TILE, Head, entropy, is_top, target_statistics, token_log_probs

M, H, V = 50, 8, 31
anchor, divergence = fused_head.anchor, fused_head.divergence


class Largest(TorchDispatchMode):
    """Remembers the most elements that an operation returned, and how many times a head of V tokens was applied."""

    numel = positions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and result.shape[-1] == V:
                self.positions += len(result)
        return result


def inputs(dtype=torch.float32, positions=M, magnitude=1.0, bias=True, vocabulary=V, **shape):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(positions, H, generator=generator) * magnitude).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    weight = torch.randn(vocabulary, H, generator=generator).to(dtype)
    constant = torch.randn(vocabulary, generator=generator).to(dtype)
    return hidden, Head(weight, constant if bias else None, **shape), targets


def naive_logits(hidden, head):
    """(M, V) in fp64."""
    logits = hidden.double() @ head.weight.double().T + (0.0 if head.bias is None else head.bias.double())
    return logits if head.cap is None else torch.tanh(logits / head.cap) * head.cap


def naive(hidden, head, targets):
    """One position at a time: the logit of the target less the log of the sum of exponentials."""
    logits = naive_logits(hidden, head)
    rows = [(row[target] - row.exp().sum().log())[None] for row, target in zip(logits, targets, strict=True)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *rows])


SHAPES = st.fixed_dictionaries(
    {"positions": st.sampled_from([1, 2, 13, M]), "bias": st.booleans(), "cap": st.sampled_from([None, 2.0, 30.0])}
)


@given(SHAPES, st.sampled_from([1, 7, M, M + 1, 1000]))
@settings(max_examples=60)
def test_values_and_gradients_against_a_loop_in_double_precision(shape, tile):
    hidden, head, targets = inputs(torch.float64, **shape)
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    expected = naive(hidden, head, targets)
    (gradient,) = torch.autograd.grad(expected @ weights, [hidden])
    result = token_log_probs(hidden, head, targets, tile)
    assert result.dtype == torch.float64
    assert_close(result, expected, rtol=1e-12, atol=1e-12)
    (result @ weights).backward()
    assert_close(hidden.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [{}, {"cap": 2.0}], ids=str)
def test_gradcheck(shape):
    hidden, head, targets = inputs(torch.float64, positions=5, **shape)
    assert torch.autograd.gradcheck(lambda h: token_log_probs(h, head, targets, 2), [hidden])


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_values_in_float32_and_by_default(magnitude):
    hidden, head, targets = inputs(positions=TILE + 3, magnitude=magnitude)
    result = token_log_probs(hidden, head, targets)
    assert (result.dtype, result.shape) == (torch.float32, (TILE + 3,))
    result.sum().backward()
    assert result.isfinite().all() and hidden.grad.isfinite().all()
    expected = naive_logits(hidden, head).log_softmax(-1)[torch.arange(TILE + 3), targets]
    assert_close(result.double(), expected, rtol=1e-5, atol=1e-5 if magnitude == 1 else 1e-2)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tile", [7, 1000])
def test_statistics_of_a_prediction(tile, cap):
    """Entropy of the vocabulary, of the four likeliest and of more than there are, and top 1; a user's own as well."""
    hidden, head, targets = inputs(torch.float64, cap=cap)
    p = (logits := naive_logits(hidden, head)).softmax(-1)
    targets[::2] = logits.argmax(-1)[::2]
    own = lambda log_probs, targets: log_probs.exp()[:, 3] * targets  # noqa: E731
    statistics = (entropy, partial(entropy, top=4), partial(entropy, top=V + 9), is_top, own)
    log_probs, *found = target_statistics(hidden, head, targets, statistics, tile)
    assert torch.equal(log_probs, token_log_probs(hidden, head, targets, tile))
    of_four = []
    for row in p.tolist():
        best = sorted(row)[-4:]
        of_four.append(-sum(q / sum(best) * math.log(q / sum(best)) for q in best))
    full, four = -(p * p.log()).sum(-1), torch.tensor(of_four, dtype=torch.float64)
    top_1 = (logits.argmax(-1) == targets).double()
    assert top_1[::2].all() and not top_1.all()
    for value, wanted in zip(found, (full, four, full, top_1, p[:, 3] * targets), strict=True):
        assert_close(value, wanted.double().detach(), rtol=1e-10, atol=1e-12)
        assert not value.requires_grad and log_probs.requires_grad


@given(SHAPES, st.sampled_from([1, 7, 1000]))
@settings(max_examples=30)
def test_divergence_from_the_base_and_its_gradient(shape, tile):
    """Beside statistics of the policy alone and a user's own comparison; 0 where the policy is the base."""
    hidden, head, targets = inputs(torch.float64, **shape)
    base, of_log_p, of_kl = hidden.detach().flip(1) * 1.5, *torch.randn(2, len(targets), dtype=torch.float64)
    log_p, log_b = (naive_logits(states, head).log_softmax(-1) for states in (hidden, base))
    p, kl = log_p.exp(), (log_b.exp() * (log_b - log_p)).sum(-1)
    (gradient,) = torch.autograd.grad(kl @ of_kl + naive(hidden, head, targets) @ of_log_p, [hidden])
    reverse = fused_head.Comparison(lambda log_p, targets, log_b: (log_p.exp() * (log_p - log_b)).sum(-1))
    log_probs, *found = target_statistics(hidden, head, targets, [anchor, entropy, divergence, reverse], tile, base)
    for value, wanted in zip(found, (kl, -(p * log_p).sum(-1), kl, (p * (log_p - log_b)).sum(-1)), strict=True):
        assert_close(value.detach(), wanted.detach(), rtol=1e-10, atol=1e-12)
    assert [value.requires_grad for value in found] == [True, False, False, False]
    (found[0] @ of_kl + log_probs @ of_log_p).backward()
    assert_close(hidden.grad, gradient, rtol=1e-10, atol=1e-12)
    same = target_statistics(hidden, head, targets, [divergence], tile, hidden.detach())[1]
    assert (same >= 0).all() and same.max() < 1e-12 and not same.requires_grad


def test_divergence_under_autocast_is_reduced_in_float32():
    hidden, head, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        _, kl = target_statistics(hidden, head, targets, [anchor], 7, base := hidden.detach().flip(1))
        log_p, log_b = (linear(states, head.weight, head.bias).double().log_softmax(-1) for states in (hidden, base))
    assert kl.dtype == torch.float32 and not torch.equal(kl, kl.bfloat16().float())
    assert_close(kl.double(), (log_b.exp() * (log_b - log_p)).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_positions(dtype):
    hidden, head, targets = inputs(dtype, positions=0)
    for result in (token_log_probs(hidden, head, targets, exact=True), token_log_probs(hidden, head, targets)):
        assert (result.dtype, result.shape) == (torch.float32, (0,))
    result.sum().backward()
    assert hidden.grad.shape == (0, H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
def test_bfloat16_is_reduced_in_float32(dtype):
    """Whether the hidden states are bf16 or autocast makes the product it."""
    hidden, head, targets = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        result = token_log_probs(hidden, head, targets, 7)
        logits = linear(hidden, head.weight, head.bias)
    assert result.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert not torch.equal(result, result.bfloat16().float()), "the log-softmax was rounded to bf16"
    assert_close(result, torch.log_softmax(logits.float(), -1)[torch.arange(M), targets], rtol=1e-5, atol=1e-5)
    result.sum().backward()
    assert hidden.grad.dtype == dtype
    double = hidden.detach().double().requires_grad_()
    naive(double, head, targets).sum().backward()
    assert (hidden.grad - double.grad).norm() < 0.01 * double.grad.norm()


@pytest.mark.parametrize("vocabulary", [37, VOCABULARY_TILE + 5])
@pytest.mark.parametrize(("bias", "cap"), [(True, None), (False, 3.0)])
def test_exact_log_probs_of_a_bf16_head(vocabulary, bias, cap):
    hidden, head, targets = inputs(torch.bfloat16, bias=bias, vocabulary=vocabulary, cap=cap)
    targets[0], targets[1] = 0, vocabulary - 1
    wanted = naive_logits(hidden, head).log_softmax(-1)[torch.arange(M), targets]
    for tile in (7, 256):
        found = token_log_probs(hidden, head, targets, tile, exact=True)
        assert found.dtype == torch.float32
        assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert (token_log_probs(hidden, head, targets).double() - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("statistics", [(), (entropy, is_top, partial(entropy, top=5)), (anchor, entropy, divergence)])
def test_no_tensor_is_larger_than_a_tile_of_logits_or_the_hidden_states(statistics):
    hidden, head, targets = inputs(positions=200, cap=3.0)
    saved, with_base = [], 1 + (anchor in statistics)
    measure = partial(target_statistics, statistics=statistics, base=hidden.detach() if with_base > 1 else None)
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = (measure if statistics else token_log_probs)(hidden, head, targets, tile=7)
        sum(each.sum() for each in (found[:with_base] if statistics else [found])).backward()
    assert seen.numel == 200 * H < 200 * V
    assert seen.positions == 200 * with_base, "the head is applied once: nothing is computed again in backward"
    assert [tuple(x.shape) for x in saved] == [(200, H)] * with_base
