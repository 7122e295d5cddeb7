"""Margins, weights and blended routes in the objective, against loops written from the equations."""

import math
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from conftest import adapter_weights, build, collate, fit, make_pairs, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from test_preference_module import first_batch, plain_log_prob
from test_routing import fast, options, pairs, plan_route
from torch import Tensor
from torch.nn.functional import logsigmoid

from mixdpo.data.pairs import read_pairs
from mixdpo.errors import InputError
from mixdpo.losses.preference_loss import Pairs, PreferenceLoss
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant

SOURCE_ROWS = [row | {"w": [0.5, 1, 2, 3][i % 4], "one": 1} for i, row in enumerate(make_pairs(11))]
SOFT = Routing(hard_fraction=0.27, hard_action="blend", blend_width=1.0, blend_floor=0.2)  # τ is 2
STEADY = {"schedule": Constant(warmup=0.0)}


class Shifted(PreferenceLoss):
    """−log σ(0.2 Δ − 0.3 m), m standardised."""

    needs_margin = "standardised"

    def loss(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(0.2 * pairs.delta - 0.3 * pairs.margin)


def share_by_hand(margin: float, tau: float, width: float, floor: float) -> float:
    g = 1 / (1 + math.exp(-(margin - tau) / width))
    return 0.0 if g < floor else 1.0 if g > 1 - floor else g


@given(pairs(), options, st.sampled_from([0.1, 1.0, 7.0]), st.sampled_from([0.0, 0.01, 0.3]), st.integers(0, 5))
@fast
def test_shares_against_a_loop_and_in_the_limit(data, option, width, floor, seed):
    margins, ids = data
    assert SOFT.by_margin and Routing(hard_fraction=0, order="shuffled", hard_action="blend", blend_width=1.0).by_margin
    hard, soft, none, tiny = (
        plan_route(margins, ids, seed=seed, hard_action=action, blend_width=t, blend_floor=floor, **option)
        for action, t in (("sft", None), ("blend", width), ("blend", 0.0), ("blend", 1e-9))
    )
    expected = [share_by_hand(m, soft.threshold, width, floor) for m in margins.tolist()]
    assert soft.preference_share.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    assert hard.preference_share.tolist() == none.preference_share.tolist() == (~hard.is_hard).tolist()
    off = abs(margins - hard.threshold) > 1e-6
    assert tiny.preference_share[off].tolist() == (margins >= hard.threshold)[off].tolist()
    for route in (soft, none, tiny):  # what is reported and the order do not blend
        assert (route.is_hard == hard.is_hard).all() and (route.order == hard.order).all()
    both, summary = sum(0 < g < 1 for g in expected), soft.summary()
    assert (summary["blended"], summary["sft"]) == (both, expected.count(0))
    assert summary["mean_preference_share"] == pytest.approx(fmean(expected))
    assert none.fingerprint() == hard.fingerprint() and (soft.fingerprint() != hard.fingerprint()) == bool(both)


def test_a_pair_below_the_floor_costs_what_a_hard_pair_costs():
    texts = {"prompt_ids": [5], "chosen_ids": [6, 8], "rejected_ids": [7]}
    rows, shares = [texts | {"pair_id": i, "margin": i} for i in range(3)], [0.0, 0.25, 1.0]
    batch = collate(rows, [True, True, False], preference_share=shares)
    assert (batch.preference.tolist(), batch.sft.tolist()) == ([1, 2], [0, 1])
    assert batch.rows.lengths.tolist() == [2, 2, 2, 0, 1, 1] and batch.preference_share.tolist() == shares
    assert batch.reference_rows.lengths.tolist() == [0, 2, 2, 0, 1, 1]


@pytest.mark.usefixtures("full_precision_norms")
def test_weighted_blended_steps_are_those_of_a_loop_however_they_are_cut(tiny_model, source, tmp_path):
    """11 pairs in 3 steps: 1 by SFT alone, 5 by both losses, 5 by preference alone, and filler in the last step."""
    setting = {"preference_loss": Shifted(), "sft_weight": 0.7, "dtype": "float64", **STEADY}
    data, trainer = {"routing": SOFT, "weight": "w"}, {"precision": "64-true"}
    built = build(tiny_model, source, tmp_path / "hand", data=data, trainer=trainer, **setting)
    first_batch(*built)
    model, table, policy, losses = built[1].model, built[2].train_pairs, built[1].learning(), []
    lm, margins = model.get_base_model(), [row["margin"] for row in SOURCE_ROWS]
    assert (built[2].route.summary()["blended"], built[2].route.is_sft.sum()) == (5, 1)
    for step in built[2]._steps():
        total = weights = 0.0
        for pair, row in ((table[i], SOURCE_ROWS[table[i]["row"] - 1]) for i in step):
            prompt, *sides = (pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            with torch.no_grad(), model.disable_adapter():
                r_w, r_l = (plain_log_prob(lm, prompt, side) for side in sides)
            for parameter in policy:
                parameter.requires_grad_(True)
            s_w, s_l = (plain_log_prob(lm, prompt, side) for side in sides)
            shift = 0.3 * (row["margin"] - fmean(margins)) / pstdev(margins)
            preference = -torch.log(torch.sigmoid(0.2 * ((s_w - r_w) - (s_l - r_l)) - shift))
            g = share_by_hand(row["margin"], 2.0, 1.0, 0.2)
            total = total + row["w"] * (g * preference - (1 - g) * 0.7 * s_w / len(sides[0]))
            weights += row["w"]
        losses.append(float(total.detach() / weights))
        gradients = torch.autograd.grad(total / weights, policy)
        with torch.no_grad():
            for parameter, gradient in zip(policy, gradients, strict=True):
                parameter -= 0.1 * gradient
    for pack, cut in ((0, 1), (64, 2), (8192, 4)):
        options = {"data": data | {"pack": pack}, "trainer": trainer | {"accumulate_grad_batches": cut}}
        rows, weights_after = logged(tiny_model, source, tmp_path / str(cut), **options, **setting)
        for key, value in adapter_weights(built[1]).items():
            torch.testing.assert_close(weights_after[key], value, rtol=0, atol=1e-10)
        assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-10)


def logged(model: str, source: str, folder: Path, **options: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """The rows of metrics.csv, and the trained adapter."""
    rows: list[Any] = []
    trainer, module, data = build(model, source, folder, **options)
    module._log_step = rows.append
    trainer.fit(module, data)
    return rows, adapter_weights(module)


def test_width_0_is_the_hard_route_and_weights_of_1_are_none_bit_for_bit(tiny_model, source, tmp_path):
    hard = Routing(threshold=2.25)
    blends = [Routing(threshold=2.25, hard_action="blend", blend_width=width) for width in (0.0, 1e-9)]
    same = [{"routing": hard}, *({"routing": blend} for blend in blends), {"routing": hard, "weight": "one"}]
    settings, trainer = [*same, {"routing": hard, "weight": "w"}, {"routing": SOFT}], {"accumulate_grad_batches": 2}
    made = (tmp_path / str(i) for i in range(len(settings)))
    runs = [logged(tiny_model, source, next(made), data=data, trainer=trainer) for data in settings]
    for i, (rows, weights) in enumerate(runs):
        assert (rows == runs[0][0]) == (i < len(same))
        assert all(torch.equal(value, runs[0][1][key]) for key, value in weights.items()) == (i < len(same))


def margin_itself(kind: Any) -> Any:
    loss: Any = lambda chosen, rejected, *, margin: margin + 0 * chosen.sums  # noqa: E731
    loss.needs_margin, loss.needs_reference = kind, False
    return loss


@pytest.mark.parametrize("kind", ["raw", "standardised"])
def test_a_loss_gets_the_margins_of_its_pairs(kind, tiny_model, source, tmp_path):
    options = {"data": {"validation": 0.3, "routing": Routing(hard_fraction=0)}, "preference_loss": margin_itself(kind)}
    trainer, module, data = build(tiny_model, source, tmp_path, **options)
    batch, trained = first_batch(trainer, module, data), list(data.train_pairs["margin"])
    mean, sd = (fmean(trained), pstdev(trained)) if kind == "standardised" else (0.0, 1.0)
    losses, *_ = module.route_losses(batch, *module.policy_and_reference(batch))
    margin = dict(zip(data.train_pairs["pair_id"], trained, strict=True))
    assert losses.tolist() == pytest.approx([(margin[i] - mean) / sd for i in batch.ids.tolist()], rel=1e-12)
    filler = collate([data.train_pairs[0]], [False], weight=0.0)
    assert module.route_losses(filler, *module.policy_and_reference(filler))[0].tolist() == [0]
    trainer.fit(module, data)
    held_out = fmean((m - mean) / sd for m in data.validation_pairs["margin"])
    assert float(trainer.callback_metrics["val/all/preference_loss"]) == pytest.approx(held_out, rel=1e-6)


def test_missing_and_equal_margins_are_refused_before_training(tiny_model, tmp_path):
    run = {"data": {"routing": Routing(hard_fraction=0, order="shuffled")}}
    for margins, says in (([None, 1, 2, 3], "row 1: the margin's"), ([], "no column"), ([0.1] * 4, "all 4 are 0.1")):
        rows = [{k: v for k, v in row.items() if k != "margin"} for row in make_pairs(4)]
        rows = [row | {"margin": m} for row, m in zip(rows, margins, strict=True)] if margins else rows
        source = write_pairs(tmp_path / "rows.jsonl", rows)
        with pytest.raises(InputError, match=says):
            fit(tiny_model, source, tmp_path / "run", preference_loss=Shifted(), **run)
    with pytest.raises(InputError, match="must be one of no, raw, standardised, not 'standard'"):
        build(tiny_model, source, tmp_path, preference_loss=margin_itself("standard"))


def test_weights_are_read_or_refused_with_file_and_row_and_belong_to_the_run(tiny_model, source, tmp_path):
    rows = [row | {"weight": 2 * (i > 1)} for i, row in enumerate(make_pairs(5))]  # a column that is refused unread
    for value in (None, -1, math.nan, 1e7, 1e-7, True, "much"):
        path = write_pairs(tmp_path / "rows.jsonl", [rows[0], rows[1] | {"weight": value}])
        with pytest.raises(InputError, match=r"rows\.jsonl, row 2: the column 'weight' .* 0 or a number"):
            read_pairs(path, weight="weight")
    table = read_pairs(write_pairs(tmp_path / "a.jsonl", rows), weight="weight")
    assert table.dropped == {"weight_0": 2} and table.dataset["pair_weight"][:] == [2, 2, 2]
    with pytest.raises(InputError, match=r"no usable pair .*'weight_0': 2"):
        read_pairs(write_pairs(tmp_path / "b.jsonl", rows[:2]), weight="weight")
    fit(tiny_model, source, tmp_path / "cut", data={"weight": "one"}, trainer={"max_steps": 1}, **STEADY)
    rest = partial(fit, tiny_model, source, ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt"), **STEADY)
    rest(tmp_path / "rest")  # weights of 1 are none
    with pytest.raises(InputError, match=r"another run \(data\.weight: "):
        rest(tmp_path / "other", data={"weight": "w"})
