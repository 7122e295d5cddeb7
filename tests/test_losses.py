"""Every loss against its equation, one pair and one token at a time, in Python floats; and over two processes."""

import inspect
import itertools
import math
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mixdpo import losses
from mixdpo.errors import InputError
from mixdpo.losses.preference_loss import PreferenceLoss
from mixdpo.losses.sft import sft
from mixdpo.model.fused_head import SequenceLogProbs
from mixdpo.options import options


def log_sigma(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


def sigma(x):
    return 1 / (1 + math.exp(-x))


def log_odds(m):
    return m - math.log(1 - math.exp(m))


def smoothed(x, eps, sign):
    return -(1 - eps) * log_sigma(x) + sign * eps * log_sigma(-x)


def orpo(p, lam):
    return -p.m_w - lam * log_sigma(log_odds(p.m_w) - log_odds(p.m_l))


def ld(p, beta, alpha):
    """DPO with tokens past min(L_w, L_l) weighted α, token by token."""
    shared = min(p.L_w, p.L_l)

    def total(tokens):
        return sum(value if i < shared else alpha * value for i, value in enumerate(tokens))

    return -log_sigma(beta * ((total(p.w) - total(p.ref_w)) - (total(p.l) - total(p.ref_l))))


def squares(p, beta):
    return (p.h_w - 1 / (2 * beta)) ** 2 + (p.h_l + 1 / (2 * beta)) ** 2


def madpo(p, beta, most, least, lam, tau):
    c = least + (most - least) / (1 + (most - 1) / (1 - least) * math.exp(lam * (abs(p.rho) - tau)))
    return -(sigma(c * p.rho) / sigma(p.rho) if p.rho > -tau else 1) * log_sigma(beta * p.delta)


def amapo(p, beta):
    gamma = beta * math.exp(p.mean_x * (p.mean_x - p.x) / p.deviation_x) if p.x < p.mean_x else 0
    return -log_sigma(beta * p.x - gamma)


# class, its hyper-parameters in the equation's order and the table's defaults, others to try, needs reference, equation
TABLE = {
    "dpo": ("DPO", {"beta": 0.1}, {"beta": 0.01}, True, lambda p, b: -log_sigma(b * p.delta)),
    "cdpo": ("CDPO", {"beta": 0.1, "label_smoothing": 0.1}, {"label_smoothing": 0.3}, True,
             lambda p, b, e: smoothed(b * p.delta, e, -1)),
    "robust": ("Robust", {"beta": 0.1, "label_smoothing": 0.1}, {"label_smoothing": 0.4}, True,
               lambda p, b, e: smoothed(b * p.delta, e, +1) / (1 - 2 * e)),
    "ipo": ("IPO", {"beta": 0.1}, {"beta": 0.4}, True, lambda p, b: (p.h_w / p.L_w - p.h_l / p.L_l - 1 / (2 * b)) ** 2),
    "hinge": ("Hinge", {"beta": 0.05}, {"beta": 1.0}, True, lambda p, b: max(0, 1 - b * p.delta)),
    "slic": ("SLiC", {"delta": 1.0, "nll_weight": 0.1}, {"delta": 7.0, "nll_weight": 0.3}, False,
             lambda p, d, lam: max(0, d - p.s_w + p.s_l) - lam * p.s_w),
    "simpo": ("SimPO", {"beta": 2.0, "gamma_ratio": 0.5}, {"beta": 2.5, "gamma_ratio": 0.3}, False,
              lambda p, b, ratio: -log_sigma(b * (p.m_w - p.m_l) - ratio * b)),
    "orpo": ("ORPO", {"odds_weight": 0.1}, {"odds_weight": 1.0}, False, orpo),
    "cpo": ("CPO", {"beta": 0.1, "nll_weight": 1.0}, {"nll_weight": 0.2}, False,
            lambda p, b, lam: -log_sigma(b * (p.s_w - p.s_l)) - lam * p.m_w),
    "irpo": ("IRPO", {"beta": 0.1, "nll_weight": 1.0}, {"nll_weight": 0.2}, True,
             lambda p, b, a: -log_sigma(b * p.delta) - a * p.m_w),
    "rdpo": ("RDPO", {"beta": 0.1, "length_penalty": 0.05}, {"length_penalty": 0.5}, True,
             lambda p, b, a: -log_sigma(b * p.delta + a * (p.L_w - p.L_l))),
    "dpop": ("DPOP", {"beta": 0.3, "drop_penalty": 50.0}, {"drop_penalty": 5.0}, True,
             lambda p, b, lam: -log_sigma(b * (p.delta - lam * max(0, -p.h_w)))),
    "kto_pair": ("KTOPair", {"beta": 0.1}, {"beta": 0.7}, True,
                 lambda p, b: 0.5 * (1 - sigma(b * (p.h_w - p.K_l)) + 1 - sigma(b * (p.K_w - p.h_l)))),
    "apo_zero": ("APOZero", {"beta": 0.1}, {"beta": 0.7}, True, lambda p, b: 1 - sigma(b * p.h_w) + sigma(b * p.h_l)),
    "apo_down": ("APODown", {"beta": 0.1}, {"beta": 0.7}, True,
                 lambda p, b: sigma(b * p.h_w) + 1 - sigma(b * p.delta)),
    "sppo": ("SPPO", {"beta": 0.001}, {"beta": 0.1}, True, squares),
    "dpo_norm": ("DPONorm", {"beta": 5.0}, {"beta": 1.0}, True,
                 lambda p, b: -log_sigma(b * (p.h_w / p.L_w - p.h_l / p.L_l))),
    "ld_dpo": ("LDDPO", {"beta": 0.1, "tail_weight": 0.5}, {"tail_weight": 0.1}, True, ld),
    "beta_dpo": ("BetaDPO", {"beta": 0.1, "sensitivity": 0.6}, {"beta": 0.2}, True,  # in validation, where β is β₀
                 lambda p, b, a: -log_sigma(b * p.delta)),
    "cal_dpo": ("CalDPO", {"beta": 0.001}, {"beta": 0.1}, True, lambda p, b: -log_sigma(p.delta) + squares(p, b)),
    "hypo": ("HyPO", {"beta": 0.1}, {"beta": 0.7}, True,
             lambda p, b: -log_sigma(b * (p.s_w - p.s_l - max(0, sum(p.ref_w) - sum(p.ref_l))))),
    "odpo": ("ODPO", {"beta": 0.1, "offset_weight": 1.0}, {"offset_weight": 0.3}, True,
             lambda p, b, a: -log_sigma(b * p.delta - a * math.log(max(p.rho, 1e-6)))),
    "madpo": ("MADPO", {"beta": 0.1, "largest_factor": 2.0, "smallest_factor": 0.5, "steepness": 1.0,
                        "neutral_margin": 2.0}, {"largest_factor": 4.0, "steepness": 0.3, "neutral_margin": 0.5}, True,
              madpo),
    "amapo": ("AMaPO", {"beta": 2.0}, {"beta": 0.7}, False, amapo),
}  # fmt: skip
NAMES = list(TABLE)


def make(name, training=False, **options):
    loss = getattr(losses, TABLE[name][0])(**options)
    return loss.train(training) if isinstance(loss, torch.nn.Module) else loss


def margins(loss, values):
    """The keyword of a loss that reads margins: one of the values for each pair."""
    return {"margin": torch.tensor(values, dtype=torch.float64)} if loss.needs_margin else {}


def draw_pairs(longest=9, count=7):
    """Pairs of token log-probs of lengths 1 to 9 whose chosen responses gain and whose rejected ones lose, mostly."""
    random_ = random.Random(0)
    pairs = []
    for _ in range(count):
        p = SimpleNamespace(L_w=random_.randint(1, longest), L_l=random_.randint(1, longest))
        for side in "wl":
            reference = [-random_.uniform(0.1, 6) for _ in range(getattr(p, f"L_{side}"))]
            policy = [min(value + random_.uniform(-2, 3), -0.05) for value in reference]
            s, r = sum(policy), sum(reference)
            values = {side: policy, f"ref_{side}": reference, f"s_{side}": s, f"m_{side}": s / len(policy)}
            vars(p).update(values | {f"h_{side}": s - r})
        p.delta, p.x = p.h_w - p.h_l, p.m_w - p.m_l
        pairs.append(p)
    gaps = [p.x for p in pairs]
    for p, p.rho in zip(pairs, (3.0, -2.5, 0.0, 0.4, -1.0, 9.0, -0.3), strict=True):
        p.mean_x, p.deviation_x = mean(gaps), stdev(gaps)
        p.K_w, p.K_l = (max(0, sum(getattr(q, h) for q in pairs) / count) for h in ("h_w", "h_l"))
    return pairs


def sequences(pairs, needs_reference):
    """The four arguments of a loss: a naive sum, length and shared sum of each response."""
    sides = []
    for tokens in ("w", "l", "ref_w", "ref_l") if needs_reference else ("w", "l"):
        rows = [(getattr(p, tokens), min(p.L_w, p.L_l)) for p in pairs]
        sums = [[sum(row) for row, _ in rows], [sum(row[:shared]) for row, shared in rows]]
        whole, shared = torch.tensor(sums, dtype=torch.float64)
        sides.append(SequenceLogProbs(whole, torch.tensor([len(row) for row, _ in rows]), shared))
    return sides


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changed", [False, True])
def test_equation(name, changed):
    """With the table's defaults and with other hyper-parameters. Plain tensors are responses of one token."""
    _, defaults, others, needs_reference, equation = TABLE[name]
    options = {**defaults, **(others if changed else {})}
    loss = make(name, **(others if changed else {}))
    assert {option: getattr(loss, option) for option in options} == options
    assert loss.needs_reference == needs_reference
    for longest in (9, 1):
        pairs = draw_pairs(longest)
        assert any(p.K_w > 0 for p in pairs) and (longest == 1 or {p.L_w > p.L_l for p in pairs} == {True, False})
        expected = torch.tensor([equation(p, *options.values()) for p in pairs], dtype=torch.float64)
        responses, rho = sequences(pairs, needs_reference), margins(loss, [p.rho for p in pairs])
        assert_close(loss(*responses, **rho), expected, rtol=1e-12, atol=1e-12)
        if longest == 1:
            assert torch.equal(loss(*(response.sums for response in responses), **rho), loss(*responses, **rho))


def as_arguments(sums, lengths, needs_reference, shared):
    """sums: (4, B) of chosen, rejected, and the reference's."""
    used = sums[: 4 if needs_reference else 2]
    return [SequenceLogProbs(s, n, s * shared) for s, n in zip(used, lengths * 2, strict=False)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "amapo"])  # its detached γ follows every pair
def test_gradients_are_those_of_the_values(name):
    generator = torch.Generator().manual_seed(3)
    lengths = [torch.arange(1, 7), torch.arange(6, 0, -1)]
    policy = -torch.rand(2, 6, dtype=torch.float64, generator=generator) * 4 - 0.3
    # all log-ratios negative where K is detached: its value is then 0 on both sides of the finite difference
    drop = 0.25 if name == "kto_pair" else 1
    reference = policy + torch.rand(2, 6, dtype=torch.float64, generator=generator) * drop

    def loss_of(*policy_sums):
        sides = as_arguments([*policy_sums, *reference], lengths, TABLE[name][3], shared=0.7)
        return make(name)(*sides, **margins(make(name), [3.0, -2.5, 0.0, 0.4, -1.0, 9.0]))

    assert torch.autograd.gradcheck(loss_of, [side.clone().requires_grad_() for side in policy])


def test_k_is_detached():
    """d/dh_w ½ σ(β(K_l − h_w)) = −½ β σ(1 − σ), with K a number."""
    beta, h = 0.7, torch.tensor([[2.0, 1.0, -0.5], [0.5, 3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    zero = SequenceLogProbs(torch.zeros(3), torch.ones(3))
    losses.KTOPair(beta)(*(SequenceLogProbs(side, torch.ones(3)) for side in h), zero, zero).sum().backward()
    (h_w, h_l), k_w, k_l = h.detach(), 2.5 / 3, 4.5 / 3
    for side, x in ((h.grad[0], beta * (k_l - h_w)), (-h.grad[1], beta * (h_l - k_w))):
        assert_close(side, -beta / 2 * torch.sigmoid(x) * torch.sigmoid(-x))


def test_gamma_is_detached():
    """d/dx −log σ(βx − γ) = −β σ(γ − βx), with γ a number: here μ = 0.5 and s = 1.5. A pair alone has no γ."""
    gap, zero = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True), torch.zeros(3)
    losses.AMaPO(0.7)(gap, zero).sum().backward()
    gamma = torch.tensor([0, 0.7 * math.exp(0.5 * 1.5 / 1.5), 0], dtype=torch.float64)
    assert_close(gap.grad, -0.7 * torch.sigmoid(gamma - 0.7 * gap.detach()))
    assert_close(losses.AMaPO(0.7)(gap[1:2], zero[:1]).item(), -log_sigma(-0.7))
    assert losses.AMaPO()(torch.tensor([1e4, 0.0]), zero[:2]).isfinite().all()  # its exponent would be 3,536


def test_margin_losses_by_hand():
    """A tie has next to no ODPO loss, ρ = e the bar 1; a margin of τ has MADPO's weight 1."""
    zero, rho = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, math.e, -3.0, 1.0], dtype=torch.float64)
    bars = losses.ODPO()(*[zero] * 4, margin=rho)
    assert_close(bars, torch.tensor([1e-6, -log_sigma(-1), 1e-6, math.log(2)], dtype=torch.float64), rtol=1e-6, atol=0)
    weights = losses.MADPO(neutral_margin=1.0)(*[zero] * 4, margin=rho) / math.log(2)
    assert weights[1] < 1 and weights[2] == 1 and weights[3].item() == pytest.approx(1) and weights[0] == 1
    assert losses.MADPO(neutral_margin=1.0)(*[zero] * 4, margin=rho / 4)[3] > math.log(2)
    assert losses.ODPO()(*[zero] * 4, margin=rho * math.nan).isnan().all()


def test_sum():
    """What its losses need, and their weighted sum; those without a reference are called without one."""
    parts, pairs = [losses.DPO(0.3), losses.SimPO(), losses.MADPO(), losses.BetaDPO()], draw_pairs()
    loss, sides, rho = losses.Sum(parts, [1.0, 0.5, 2.0, 0.0]).eval(), sequences(pairs, True), [p.rho for p in pairs]
    of = [part(*sides[: 4 if part.needs_reference else 2], **margins(part, rho)) for part in parts]
    assert_close(loss(*sides, **margins(loss, rho)), of[0] + 0.5 * of[1] + 2 * of[2])
    assert (loss.needs_margin, loss.needs_reference, loss.averaged, loss.batch_statistics) == ("raw", True, True, True)
    assert loss.describe().startswith("1.0 DPO(beta=0.3, label_smoothing=0.0) + 0.5 SimPO(beta=2.0, gamma_ratio=")
    assert losses.Sum([losses.IPO(), losses.Sum([losses.CPO()], [3.0])], [2.0, 1.0]).sft_weight == 17
    free = losses.Sum([losses.SimPO(), losses.CPO()], [1.0, 1.0])
    assert (free.needs_margin, free.needs_reference, free.batch_statistics) == (False, False, False)
    assert_close(free(*sides[:2]), losses.SimPO()(*sides[:2]) + losses.CPO()(*sides[:2]))
    own = type("Own", (), {"needs_reference": False, "__call__": lambda self, chosen, rejected: chosen.sums})()
    assert_close(losses.Sum([losses.DPO(), own], [1.0, 1.0])(*sides), losses.DPO()(*sides) + sides[0].sums)
    with pytest.raises(InputError, match="need raw and standardised margins"):
        losses.Sum([losses.ODPO(), SimpleNamespace(needs_margin="standardised")], [1.0, 1.0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_extreme_values_stay_finite(name, training):
    """fp32, length 1: all log-probs in {0, −1e-8, −1, −1e4} under policy and reference, log-ratios up to 1e4."""
    sums = torch.tensor(list(itertools.product([0.0, -1e-8, -1.0, -1e4], repeat=4))).T.clone().requires_grad_()
    loss = make(name, training=training)
    for batch in (sums, *sums.split(1, dim=1)[::37]):
        one = torch.ones(batch.shape[1], dtype=torch.int64)
        rho = margins(loss, ([0.0, 1e4, -1.0, -1e4, 2.0] * 52)[: len(one)])
        result = loss(*as_arguments(batch, [one, one], TABLE[name][3], shared=1.0), **rho)
        (gradient,) = torch.autograd.grad(result.sum(), sums, retain_graph=True)
        assert result.isfinite().all() and gradient.isfinite().all()
        assert result.shape == batch.shape[1:] and result.dtype == torch.float32


def test_the_clamp_of_orpo():
    """Below −1e-6 nothing is clamped; at and above it the odds stand still, and the log-likelihood does not."""
    m = torch.tensor([-1e-4, -1e-9, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = SequenceLogProbs(torch.full((3,), -1.0, dtype=torch.float64), torch.ones(3))
    losses.ORPO(odds_weight=0.0)(SequenceLogProbs(m, torch.ones(3)), rejected).sum().backward()
    assert_close(m.grad, torch.full((3,), -1.0, dtype=torch.float64))
    m.grad = None
    result = losses.ORPO(odds_weight=1.0)(SequenceLogProbs(m, torch.ones(3)), rejected)
    result.sum().backward()
    assert m.grad[0] < -1 and torch.equal(m.grad[1:], torch.full((2,), -1.0, dtype=torch.float64))
    expected = orpo(SimpleNamespace(m_w=-1e-4, m_l=-1.0), 1.0)
    assert result[0].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_no_pair(name, training):
    """An empty subset has an empty loss, no NaN in any state, and a gradient of 0."""
    sums = torch.ones(4, 5, requires_grad=True)
    loss = make(name, training=training)
    before = {key: value.clone() for key, value in getattr(loss, "state_dict", dict)().items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    sides = as_arguments(sums[:, nothing], [nothing, nothing], TABLE[name][3], shared=1.0)
    result = loss(*sides, **margins(loss, []))
    assert result.shape == (0,)
    result.sum().backward()
    assert torch.equal(sums.grad[:2], torch.zeros(2, 5))
    assert all(torch.equal(loss.state_dict()[key], value) for key, value in before.items())


def test_beta_dpo_by_hand():
    """Two batches: moving averages first, then a draw of 80 % (4 of 5), then β_b from what is drawn."""
    torch.manual_seed(5)
    loss, mean, deviation, sizes = losses.BetaDPO(beta=0.3, sensitivity=0.8), 0.0, 1.0, []
    for deltas in ([4.0, -1.0, 2.5, 0.5, 9.0], [1.0, 2.0, -6.0]):
        average = sum(deltas) / len(deltas)
        spread = math.sqrt(sum((d - average) ** 2 for d in deltas) / len(deltas))
        mean, deviation = 0.9 * mean + 0.1 * average, 0.9 * deviation + 0.1 * spread
        sums = torch.tensor(deltas, dtype=torch.float64, requires_grad=True)
        zero = SequenceLogProbs(torch.zeros(len(deltas), dtype=torch.float64), torch.ones(len(deltas)))
        result = loss(SequenceLogProbs(sums, zero.lengths), zero, zero, zero)
        drawn = [d for d, value in zip(deltas, result.tolist(), strict=True) if value > 0]
        sizes.append(len(drawn))
        beta = max(1e-3, 0.3 * (1 + 0.8 * (sum(drawn) / len(drawn) - mean)))
        expected = [-log_sigma(beta * d) if d in drawn else 0.0 for d in deltas]
        assert result.tolist() == pytest.approx(expected, rel=1e-6)
        result.sum().backward()
        gradient = [-beta * sigma(-beta * d) if d in drawn else 0.0 for d in deltas]  # β_b is detached
        assert sums.grad.tolist() == pytest.approx(gradient, rel=1e-6)
    assert sizes == [4, 2]
    assert (loss.mean.item(), loss.deviation.item()) == pytest.approx((mean, deviation), rel=1e-6)
    bad = SequenceLogProbs(torch.tensor([math.nan, 1.0]), zero.lengths[:2])
    loss(bad, *[SequenceLogProbs(torch.zeros(2), zero.lengths[:2])] * 3)  # a step that is not finite may be skipped
    assert (loss.mean.item(), loss.deviation.item()) == pytest.approx((mean, deviation), rel=1e-6)


def test_beta_dpo_draws_by_weight():
    """Of three pairs two are drawn, one after the other without replacement: how often each is left out."""
    loss, deltas = losses.BetaDPO(), torch.tensor([0.0, 1.0, 2.5])
    loss.mean, loss.deviation = torch.tensor(0.3), torch.tensor(1.2)
    weights = [math.exp(-0.5 * ((d - 0.3) / 1.2) ** 2) for d in deltas.tolist()]
    expected, total = [0.0] * 3, sum(weights)
    for i, j, left in itertools.permutations(range(3)):
        expected[left] += weights[i] / total * weights[j] / (total - weights[i])
    noise = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    left_out = [3 - sum(loss.draw(deltas, n).tolist()) for n in noise]
    assert [left_out.count(i) / 2000 for i in range(3)] == pytest.approx(expected, abs=0.03)
    assert min(expected) < 0.2 < 0.5 < max(expected)


def test_sft_weights_keep_the_papers_balance():
    """The pull on s_w at h = 0, per token of 280, over that of DPO at β = 0.01: what the docstring derives."""
    for name in ("ipo", "slic", "sppo", "cal_dpo"):
        s_w = torch.full((1,), -280.0, dtype=torch.float64, requires_grad=True)
        start = SequenceLogProbs(s_w.detach(), torch.tensor([280]))
        sides = [SequenceLogProbs(s_w, start.lengths), *([start] * (3 if TABLE[name][3] else 1))]
        make(name)(*sides).sum().backward()
        assert make(name).sft_weight == pytest.approx(-s_w.grad.item() / 0.005, rel=0.03)
    assert all(make(name).sft_weight == 1 for name in NAMES if name not in ("ipo", "slic", "sppo", "cal_dpo"))


def test_sft_is_a_mean_per_sequence():
    chosen = SequenceLogProbs(torch.tensor([-12.0, -1.0, -30.0]), torch.tensor([4, 1, 60]))
    assert_close(sft(chosen), torch.tensor([3.0, 1.0, 0.5]))


@pytest.mark.parametrize("name", NAMES)
def test_every_class_documents_itself(name, capsys):
    options(f"mixdpo.losses.{TABLE[name][0]}")
    printed = capsys.readouterr().out
    assert inspect.cleandoc(getattr(losses, TABLE[name][0]).__doc__) in printed
    assert "arXiv" in printed or name == "cdpo"
    assert ("2305.18290" in printed) == (name == "dpo") and ("Mitchell" in printed) == (name == "cdpo")
    for option, value in TABLE[name][1].items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"    {option}: ")]
        assert line.endswith((f" {value} if null.", f" {value:g} if null."))


def test_a_loss_of_ones_own():
    """The class that the base class's docstring shows."""
    shown = inspect.cleandoc(PreferenceLoss.__doc__).partition("class path:\n\n")[2].partition("Attributes")[0]
    own = {"dataclass": dataclass, "logsigmoid": torch.nn.functional.logsigmoid}
    exec(code := textwrap.dedent(shown), names := {**vars(inspect.getmodule(PreferenceLoss)), **own})
    assert len(code.strip().splitlines()) <= 10
    loss, sides = names["Mine"](slope=0.3), torch.tensor([[-1.0], [-3.0], [-2.0], [-1.0]])
    assert_close(loss(*sides), losses.DPO(0.3)(*sides))
    assert (loss.needs_reference, loss.averaged, loss.batch_statistics, loss.sft_weight) == (True, False, False, 1.0)


# Two processes with a part of the pairs each compute what one computes with all.
BATCHES = [(3, 4), (5, 0), (0, 0), (0, 2), (1, 1)]  # pairs of rank 0 and rank 1; every rank calls the loss every time


def losses_of(batches: list[torch.Tensor]) -> dict[str, Any]:
    """KTOPair, AMaPO and BetaDPO over batches of h (2, B), their gradients and the state at the end."""
    torch.manual_seed(0)
    beta_dpo, results = losses.BetaDPO(), []
    for h in batches:
        h.requires_grad_()
        sides = [*h, *torch.zeros_like(h)]
        both = torch.stack([losses.KTOPair()(*sides), losses.AMaPO()(*h), beta_dpo(*sides)])
        results.append((both.detach(), torch.autograd.grad(both.sum(), h)[0]))
    return {"batches": results, "state": beta_dpo.state_dict()}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(2, sum(parts), dtype=torch.float64, generator=generator) + 1 for parts in BATCHES]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mine = [h.split(parts, dim=1)[rank].clone() for h, parts in zip(batches(), BATCHES, strict=True)]
    torch.save(losses_of(mine), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    one = losses_of(batches())
    assert one["state"]["batches"] == 4  # the batch without a pair is none
    for rank in ranks:
        assert_close(rank["state"], one["state"], rtol=1e-6, atol=0)
    for number, (values, gradient) in enumerate(one["batches"]):
        joined = [torch.cat([rank["batches"][number][i] for rank in ranks], dim=1) for i in range(2)]
        assert_close(joined, [values, gradient], rtol=1e-6, atol=1e-12)
    apart = losses_of([h[:, :3].detach() for h in batches()[:1]])["batches"][0][0]
    assert not torch.allclose(apart[0], one["batches"][0][0][0, :3])  # the other rank's pairs do count
