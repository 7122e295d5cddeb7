import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.testing import assert_close

from mixdpo.errors import InputError
from mixdpo.losses import DPO
from mixdpo.losses.functions import Pairs, cdpo, dpo, sft
from mixdpo.model.fused_head import SequenceLogProbs


def sequences(*sums, lengths=None, dtype=torch.float32):
    return SequenceLogProbs(torch.tensor(sums, dtype=dtype), torch.tensor(lengths or [1] * len(sums)))


# Δ = h_w − h_l, pair by pair: (0 − 0, .1 + 9.9, −.9 + 20.9) = (0, 10, 20)
POLICY = sequences(-0.5, -10.0, -1.0), sequences(-0.1, -30.0, -21.0)
REFERENCE = sequences(-0.5, -10.1, -0.1), sequences(-0.1, -20.1, -0.1)


def pairs_of(delta):
    """Pairs of this Δ, the chosen response's log-ratio."""
    chosen, zero = (SequenceLogProbs(sums, torch.ones(len(delta))) for sums in (delta, torch.zeros_like(delta)))
    return Pairs(chosen, zero, zero, zero)


def scalar_cdpo(delta, beta, epsilon):
    """The equation of METHOD §3, one pair at a time, by its definition through σ."""
    probability = 1 / (1 + math.exp(-beta * delta))
    return -(1 - epsilon) * math.log(probability) - epsilon * math.log(1 - probability)


def test_closed_form():
    losses = DPO(beta=0.1)(*POLICY, *REFERENCE)
    assert_close(losses, torch.tensor([0.6931, 0.3133, 0.1269]), atol=5e-5, rtol=0)


def test_log_ratio_difference():
    assert_close(Pairs(*POLICY, *REFERENCE).delta, torch.tensor([0.0, 10.0, 20.0]))


def test_the_defaults_are_those_of_the_table():
    assert (DPO().beta, DPO().label_smoothing) == (0.1, 0.0)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_label_smoothing_follows_the_equation(beta, epsilon):
    deltas = [-20.0, -3.0, -0.1, 0.0, 0.5, 7.0, 20.0]
    expected = torch.tensor([scalar_cdpo(delta, beta, epsilon) for delta in deltas], dtype=torch.float64)
    delta = torch.tensor(deltas, dtype=torch.float64)
    assert_close(cdpo(pairs_of(delta), beta=beta, label_smoothing=epsilon), expected, rtol=1e-7, atol=1e-10)
    chosen, zero = SequenceLogProbs(delta, torch.ones(7)), SequenceLogProbs(0 * delta, torch.ones(7))
    assert_close(DPO(beta, epsilon)(chosen, zero, zero, zero), expected, rtol=1e-7, atol=1e-10)


def test_no_smoothing_is_dpo_bit_for_bit():
    delta = pairs_of(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100)
    assert torch.equal(cdpo(delta, beta=0.07, label_smoothing=0.0), dpo(delta, beta=0.07))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_gradient_at_zero(epsilon):
    """d/ds_w −log σ(βΔ) = −β σ(−βΔ) = −β/2 at Δ = 0; smoothing scales it by (1 − ε) − ε. s_l gets the opposite."""
    beta = 0.03
    sums = [torch.full((2,), -7.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    policy = [SequenceLogProbs(s, torch.tensor([3, 4])) for s in sums]
    reference = [SequenceLogProbs(s.detach(), torch.tensor([3, 4])) for s in sums]
    DPO(beta, epsilon)(*policy, *reference).sum().backward()
    expected = torch.full((2,), -beta / 2 * (1 - 2 * epsilon), dtype=torch.float64)
    assert_close(sums[0].grad, expected)
    assert_close(sums[1].grad, -expected)


def test_gradients_are_those_of_the_values():
    generator = torch.Generator().manual_seed(1)
    delta = (torch.randn(6, dtype=torch.float64, generator=generator) * 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: dpo(pairs_of(d), beta=0.3), delta)
    assert torch.autograd.gradcheck(lambda d: cdpo(pairs_of(d), beta=0.3, label_smoothing=0.1), delta)
    assert torch.autograd.gradcheck(lambda s: sft(SequenceLogProbs(s, torch.arange(1, 7))), delta)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_extreme_log_ratios_stay_finite(beta, epsilon):
    """For large |x|, −log σ(x) is 0 or |x|: the loss is ε·β|Δ| on the right side and (1 − ε)·β|Δ| on the wrong."""
    delta = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = cdpo(pairs_of(delta), beta=beta, label_smoothing=epsilon)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([epsilon, 1 - epsilon]) * beta * 1e4, rtol=1e-5, atol=1e-4)
    assert_close(delta.grad, torch.tensor([epsilon, epsilon - 1]) * beta, rtol=1e-5, atol=1e-6)


def test_swapping_the_sides_flips_the_preference():
    """−log σ(−x) + log σ(x) = x, so the loss of the swapped pair is larger by βΔ."""
    (chosen, rejected), (reference_chosen, reference_rejected) = POLICY, REFERENCE
    objective = DPO(beta=0.1)
    right = objective(chosen, rejected, reference_chosen, reference_rejected)
    wrong = objective(rejected, chosen, reference_rejected, reference_chosen)
    assert_close(wrong - right, torch.tensor([0.0, 1.0, 2.0]))
    delta = torch.tensor([-3.0, 0.0, 5.0])
    assert_close(
        cdpo(pairs_of(-delta), beta=0.5, label_smoothing=0.2),
        0.8 * dpo(pairs_of(-delta), beta=0.5) + 0.2 * dpo(pairs_of(delta), beta=0.5),
    )


@pytest.mark.parametrize("objective", [DPO(), DPO(0.01, 0.1), DPO(2.0, 0.4)])
def test_first_step_is_ln_2(objective):
    losses = objective(*POLICY, *POLICY)
    assert_close(losses, torch.full((3,), math.log(2)))


def test_sft_is_a_mean_per_sequence():
    chosen = sequences(-12.0, -1.0, -30.0, lengths=[4, 1, 60])
    assert_close(sft(chosen), torch.tensor([3.0, 1.0, 0.5]))


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": -0.1},
        {"beta": math.nan},
        {"label_smoothing": -0.01},
        {"label_smoothing": 0.5},
        {"label_smoothing": 1.0},
        {"label_smoothing": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        DPO(**options)


def test_the_objective_cannot_change_during_a_run():
    objective = DPO()
    with pytest.raises(FrozenInstanceError):
        objective.beta = 1.0
