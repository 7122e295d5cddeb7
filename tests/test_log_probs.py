import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mixdpo.log_probs import TILE, SequenceLogProbs, token_log_probs

M, H, V = 50, 8, 31
TILES = [1, 7, M, M + 1, 1000]


class RecordingHead(nn.Module):
    """A linear head that remembers how many rows each call had."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, V)
        self.rows = []

    def forward(self, hidden):
        self.rows.append(hidden.shape[0])
        return self.linear(hidden)


def inputs(dtype=torch.float32, positions=M, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(positions, H, generator=generator) * scale).to(dtype).requires_grad_()
    targets = torch.randint(V, (positions,), generator=generator)
    head = nn.Linear(H, V, bias=True)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=generator))
        head.bias.copy_(torch.randn(V, generator=generator))
    return hidden, head.to(dtype), targets


def naive(hidden, head, targets):
    """One position at a time in fp64: the logit of the target less the log of the sum of exponentials."""
    weight, bias = head.weight.double(), head.bias.double()
    rows = []
    for position in range(len(targets)):
        logits = weight @ hidden[position].double() + bias
        rows.append(logits[targets[position]] - logits.exp().sum().log())
    return torch.stack(rows)


@pytest.mark.parametrize("tile", TILES)
def test_values(tile):
    hidden, head, targets = inputs(torch.float64)
    result = token_log_probs(hidden, head, targets, tile)
    assert result.dtype == torch.float64
    assert_close(result, naive(hidden, head, targets), rtol=1e-12, atol=1e-12)


def test_values_in_float32_and_by_default():
    hidden, head, targets = inputs(positions=TILE + 3)
    result = token_log_probs(hidden, head, targets)
    assert result.dtype == torch.float32
    assert result.shape == (TILE + 3,)
    assert_close(result.double(), naive(hidden, head, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(tile, frozen):
    hidden, head, targets = inputs(torch.float64)
    weights = torch.linspace(-1, 2, M, dtype=torch.float64)
    expected = torch.autograd.grad(naive(hidden, head, targets) @ weights, [hidden, head.weight, head.bias])
    head.requires_grad_(not frozen)
    (token_log_probs(hidden, head, targets, tile) @ weights).backward()
    assert_close(hidden.grad, expected[0], rtol=1e-11, atol=1e-12)
    if frozen:
        assert head.weight.grad is None and head.bias.grad is None
    else:
        assert_close(head.weight.grad, expected[1], rtol=1e-11, atol=1e-12)
        assert_close(head.bias.grad, expected[2], rtol=1e-11, atol=1e-12)


def test_only_the_wanted_positions_get_gradient():
    hidden, head, targets = inputs()
    token_log_probs(hidden, head, targets, 7)[[3, 20]].sum().backward()
    touched = hidden.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [3, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_positions(dtype):
    hidden, head, targets = inputs(dtype, positions=0)
    result = token_log_probs(hidden, head, targets)
    assert result.shape == (0,)
    assert result.dtype == torch.float32
    result.sum().backward()
    assert hidden.grad.shape == (0, H)


def test_bfloat16_is_reduced_in_float32():
    hidden, head, targets = inputs(torch.bfloat16)
    result = token_log_probs(hidden, head, targets, 7)
    assert result.dtype == torch.float32
    assert not torch.equal(result, result.bfloat16().float()), "the log-softmax was rounded to bf16"
    logits = head(hidden).float()
    assert_close(result, torch.log_softmax(logits, -1)[torch.arange(M), targets], rtol=1e-5, atol=1e-5)
    result.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_large_logits_stay_finite():
    hidden, head, targets = inputs(scale=1e4)
    result = token_log_probs(hidden, head, targets, 7)
    result.sum().backward()
    assert result.isfinite().all() and hidden.grad.isfinite().all()
    expected = torch.log_softmax(head.double()(hidden.detach().double()), -1)[torch.arange(M), targets]
    assert_close(result.detach().double(), expected, rtol=1e-5, atol=1e-2)


def test_never_more_rows_of_logits_than_a_tile():
    hidden, _, targets = inputs()
    head = RecordingHead()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        result = token_log_probs(hidden, head, targets, 7)
    assert sum(head.rows) == M and max(head.rows) <= 7
    assert [shape for shape in saved if shape and shape[-1] == V] == [], "logits are kept for backward"
    result.sum().backward()
    assert sum(head.rows) == 2 * M and max(head.rows) <= 7, "the logits are computed again in backward, tile by tile"


def test_without_gradients_each_tile_is_computed_once():
    hidden, _, targets = inputs()
    head = RecordingHead()
    with torch.no_grad():
        result = token_log_probs(hidden, head, targets, 7)
    assert not result.requires_grad
    assert sum(head.rows) == M and max(head.rows) <= 7


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), slice(1, 3), torch.tensor([], dtype=torch.int64)])
def test_indexing_keeps_sums_and_lengths_together(index):
    rows = SequenceLogProbs(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([10, 20, 30]))[index]
    assert (rows.lengths.float() * -0.1).tolist() == pytest.approx(rows.sums.tolist())
    assert rows.sums.shape == torch.arange(3)[index].shape
