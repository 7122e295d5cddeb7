"""Losses in the PreferenceModule: forwards, weights, sides, filler, gradient norms, state, and the command line."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter_weights, build, collate, fit, make_pairs
from test_configs import build as build_cli  # noqa: F401  (a fixture, and the one that it takes)
from test_configs import cli  # noqa: F401
from test_losses import TABLE, make
from test_preference_module import first_batch, forwards, perturb_policy, plain_log_prob
from transformers import AutoModelForCausalLM

from lightning_modules.callbacks.logging import Throughput
from lightning_modules.preference import PreferenceModule
from mixdpo import losses
from mixdpo.errors import InputError
from mixdpo.losses import DPO, SimPO
from mixdpo.metrics import PAIRWISE, VALIDATION, NamedMeans, by_difficulty, pair_values
from mixdpo.model.forward import sequence_log_probs
from mixdpo.model.fused_head import SequenceLogProbs
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant

SOURCE_ROWS = make_pairs(8)
EASY, HALF, HARD = ({"routing": Routing(hard_fraction=fraction)} for fraction in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("name", ["hypo", "odpo", "madpo", "amapo", "sum"])
def test_the_preset_of_a_loss(name: str, build_cli: Any) -> None:  # noqa: F811
    """The overlay sets the loss with its own hyper-parameters, and nothing of the DPO below it."""
    built = build_cli("configs/demo.yaml", "--config", f"configs/losses/{name}.yaml")
    expected = losses.Sum([losses.DPO(), SimPO()], [1.0, 0.5]) if name == "sum" else make(name)
    assert built.model.preference_loss.describe() == expected.describe() and built.config.fit.name == name


IN_RUNS = ["dpo", "ipo", "ld_dpo", "kto_pair", "beta_dpo", "cal_dpo", "slic", "orpo", "hypo", "amapo", "odpo", "madpo"]


@pytest.mark.parametrize("name", IN_RUNS)
def test_two_steps(name: str, tiny_model: str, source: str, tmp_path: Path) -> None:
    """One step of easy pairs, one of hard ones: finite, and the policy moves in both; validation as well."""
    loss, data = getattr(losses, TABLE[name][0])(), {**HALF, "batch_size": 3, "validation": 0.25}
    trainer, module, pairs = build(tiny_model, source, tmp_path / "run", data=data, preference_loss=loss, lr=1e-6)
    rows: list[dict[str, float]] = []
    module._log_step = rows.append  # type: ignore[method-assign]
    trainer.fit(module, pairs)
    assert [row["train/hard_fraction"] for row in rows] == [0.0, 1.0]
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert all(math.isfinite(value) for each in (values, *rows) for value in each.values()), values
    assert "val/all/preference_loss" in values and "val/all/rewards/accuracy" in values
    assert ("val/all/displacement/chosen" in values) == TABLE[name][3]
    weights = adapter_weights(module)
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.any() for key, value in weights.items() if "lora_B" in key)


@pytest.mark.parametrize("name", ["simpo", "slic"])
def test_reference_free_losses_never_run_the_reference(name, tiny_model, source, tmp_path, monkeypatch) -> None:
    """Neither in training nor in validation; 3 forwards of each are the policy's."""
    grads = forwards(monkeypatch)
    data = {"routing": Routing(hard_fraction=0.3), "batch_size": 2, "validation": 0.25, "eval_batch_size": 1}
    loss = getattr(losses, TABLE[name][0])()
    trainer, module, pairs = build(tiny_model, source, tmp_path / "run", data=data, preference_loss=loss, lr=1e-6)
    trainer.fit(module, pairs)
    assert (grads.count(True), grads.count(False)) == (len(pairs._steps()), len(pairs.validation_pairs))


def test_rewards_of_reference_free_losses(tiny_model: str, source: str, tmp_path: Path) -> None:
    """β times what the loss compares: m for simpo, s for cpo."""
    for loss, averaged in ((SimPO(beta=2.5), True), (losses.CPO(beta=0.3), False)):
        run = build(tiny_model, source, tmp_path / type(loss).__name__, data=EASY, preference_loss=loss)
        batch = first_batch(*run)
        policy, reference = run[1].policy_and_reference(batch)
        assert reference is None
        values = pair_values(policy, None, run[1].preference_loss)
        compared = policy.sums / policy.lengths if averaged else policy.sums
        torch.testing.assert_close(values["rewards/chosen"], loss.beta * compared[:4].detach())
        torch.testing.assert_close(values["rewards/rejected"], loss.beta * compared[4:].detach())
        assert "displacement/chosen" not in values


@pytest.mark.parametrize("share_prompt", [True, False])
def test_shared_sums(share_prompt: bool, tiny_model: str, source: str, tmp_path: Path) -> None:
    """The sum over the first min(L_w, L_l) tokens is that of the responses cut to this length."""
    run = build(tiny_model, source, tmp_path / "run", data={**EASY, "batch_size": 8, "share_prompt": share_prompt})
    batch = first_batch(*run)
    module, pairs = run[1], run[2].train_pairs
    perturb_policy(module)
    found = sequence_log_probs(module.model, batch.rows)
    cut = []
    for index in run[2].micro_batches()[0][0]:
        pair = dict(pairs[index])
        shared = min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        cut.append(pair | {"chosen_ids": pair["chosen_ids"][:shared], "rejected_ids": pair["rejected_ids"][:shared]})
    expected = sequence_log_probs(module.model, collate(cut, [False] * 8, share_prompt=share_prompt).rows)
    assert (found.lengths != expected.lengths).sum() >= 4
    torch.testing.assert_close(found.shared_sums, expected.sums)
    torch.testing.assert_close(expected.shared_sums, expected.sums)
    index = torch.tensor([9, 0, 3])
    assert torch.equal(found[index].shared_sums, found.shared_sums[index])
    hard = collate(cut, [True, False] * 4, share_prompt=share_prompt)
    without = sequence_log_probs(module.model, hard.rows)
    torch.testing.assert_close(without.shared_sums[hard.preference], expected.sums[hard.preference])
    assert not without.shared_sums[hard.sft].any() and not without.shared_sums[hard.sft + 8].any()


def test_sft_weight_belongs_to_the_loss(tiny_model: str) -> None:
    assert PreferenceModule(tiny_model).sft_weight == 1.0
    assert PreferenceModule(tiny_model, losses.SPPO()).sft_weight == 2e5
    assert PreferenceModule(tiny_model, losses.SPPO(), sft_weight=0.5).sft_weight == 0.5
    assert PreferenceModule(tiny_model, lambda *sides: sides[0].sums).sft_weight == 1.0  # anybody's own


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
def test_sft_sides_and_easy_sft_weight(sides: tuple[int, ...], tiny_model: str, source: str, tmp_path: Path) -> None:
    """Hard: sft_weight · mean of −s/L over the sides. Easy: preference loss + λ (−s_w/L_w)."""
    options = {"sft_weight": 0.7, "easy_sft_weight": 0.3, "preference_loss": losses.DPO(beta=0.2)}
    run = build(tiny_model, source, tmp_path / "run", data={**HALF, "batch_size": 8}, **options)
    first_batch(*run)
    module, data = run[1:]
    perturb_policy(module)
    pairs = [data.train_pairs[i] for i in range(8)]
    is_hard = torch.tensor([bool(hard) for hard in data.route.is_hard])
    whole = collate(pairs, is_hard.tolist(), evaluation=True)
    batch = replace(whole, sft_sides=sides)
    policy, reference = module.policy_and_reference(batch)
    assert reference is not None
    found, preference, sft_losses = module.route_losses(batch, policy, reference)
    nll = (-policy.sums / policy.lengths).view(2, 8)
    h = (policy.sums - reference.sums).view(2, 8)
    dpo = -torch.log(torch.sigmoid(0.2 * (h[0] - h[1])))
    of_hard = sum(nll[side] for side in sides) / len(sides)
    torch.testing.assert_close(found, torch.where(is_hard, 0.7 * of_hard, dpo + 0.3 * nll[0]))
    torch.testing.assert_close(preference, dpo[~is_hard])
    torch.testing.assert_close(sft_losses, of_hard[is_hard])
    assert batch.to(torch.device("cpu")).sft_sides == sides and whole.sft_sides == (0,)


CASES = {"dpo": None, "dpo_plus_nll": "mean", "irpo": "mean", "cpo": "mean", "slic": "sum", "sum": "sum"}


@pytest.mark.parametrize("name", CASES)
def test_the_nll_term_has_its_column(name: str, tiny_model: str, source: str, tmp_path: Path) -> None:
    """−log p of the chosen responses of the easy pairs, one token after the other, without the term's weight."""
    made = losses.Sum([losses.DPO(), losses.SLiC()], [1.0, 0.5]) if name == "sum" else make(name.split("_")[0])
    options = {"data": {**HALF, "batch_size": 8}, "preference_loss": made, "easy_sft_weight": 0.3 * ("_" in name)}
    trainer, module, data = build(tiny_model, source, tmp_path / "run", **options)
    rows: list[dict[str, float]] = []
    module._log_step = rows.append  # type: ignore[method-assign]
    trainer.fit(module, data)
    values, model = [], AutoModelForCausalLM.from_pretrained(tiny_model)
    for index in (~data.route.is_hard).nonzero()[0]:
        pair = data.train_pairs[int(index)]
        with torch.no_grad():
            nll = -float(plain_log_prob(model, pair["prompt_ids"], pair["chosen_ids"]))
        values.append(nll / (len(pair["chosen_ids"]) if CASES[name] == "mean" else 1))
    assert len(values) == 4 and ("train/nll" in rows[0]) == (name != "dpo")
    assert name == "dpo" or rows[0]["train/nll"] == pytest.approx(sum(values) / 4, rel=1e-5)


@pytest.mark.parametrize("name", ["kto_pair", "beta_dpo"])
def test_filler_pairs_are_in_no_statistic(name: str, tiny_model: str, source: str, tmp_path: Path) -> None:
    loss = getattr(losses, TABLE[name][0])()
    run = build(tiny_model, source, tmp_path / "run", data=EASY, preference_loss=loss)
    batch = first_batch(*run)
    module = run[1]
    perturb_policy(module, 3.0)
    state = {key: value.clone() for key, value in module.state_dict().items() if "preference_loss" in key}
    filler = replace(batch, weight=torch.zeros(4), count=0)
    policy, reference = module.policy_and_reference(filler)
    value, preference, _ = module.route_losses(filler, policy, reference)
    assert torch.equal(value, torch.zeros(4)) and torch.equal(preference, torch.zeros(4))
    assert value.requires_grad  # a rank with nothing but filler still takes part in the backward
    assert all(torch.equal(v, module.state_dict()[key]) for key, v in state.items())
    module.route_losses(batch, policy, reference)
    assert not state or any(not torch.equal(v, module.state_dict()[key]) for key, v in state.items())


@pytest.mark.parametrize("summed", [False, True])
def test_beta_dpo_resumes_exactly_and_validation_leaves_it_alone(summed, tiny_model, source, tmp_path) -> None:
    """Stopped after 2 of 4 steps: the same draws, moving averages and adapter as without the stop, bit for bit; with
    validation after every step as without. The same inside a sum."""
    within = "parts.0." if summed else ""
    data = {"routing": Routing(hard_fraction=0.2), "batch_size": 3, "validation": 0.25}

    def train(name: str, ckpt_path: str | None = None, **trainer: Any) -> Any:
        options = {"data": data, "trainer": {"max_epochs": 2, **trainer}, "lr": 1.0, "schedule": Constant(warmup=0.0)}
        loss = losses.Sum([losses.BetaDPO(), SimPO()], [1.0, 0.5]) if summed else losses.BetaDPO()
        options |= {"ckpt_path": ckpt_path, "preference_loss": loss}
        return fit(tiny_model, source, tmp_path / name, **options)

    whole = train("whole")
    state = whole.preference_loss.state_dict()
    assert whole.trainer.global_step == 4 and 3 <= int(state[f"{within}batches"]) <= 4
    assert state[f"{within}mean"] != 0 and state[f"{within}mean"].dtype == torch.float64
    train("cut", max_steps=2)
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    buffers = {f"preference_loss.{within}{name}" for name in ("mean", "deviation", "batches")}
    assert {key for key in saved if "lora_" not in key} == buffers
    resumed = train("rest", ckpt_path=str(checkpoint))
    unseen = train("unseen", limit_val_batches=0)
    for other in (resumed, unseen):
        for key, value in {**adapter_weights(whole), **whole.preference_loss.state_dict()}.items():
            assert torch.equal(value, {**adapter_weights(other), **other.preference_loss.state_dict()}[key]), key
    with pytest.raises(InputError, match="preference_loss"):
        fit(tiny_model, source, tmp_path / "other", ckpt_path=str(checkpoint), data=data, trainer={"max_epochs": 2})


def weighted(values, weights):
    return torch.tensor(values, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)


def of(means):
    return {name: value.item() for name, value in means.compute().items()}


def test_means_over_batches_of_any_size():
    """a: (1·1 + 3·2 + 10·1) / 4; b has one value of weight ½; c has none. Reset forgets all of them."""
    means = NamedMeans(("a", "b", "c"))
    means.update({"a": weighted([1.0, 3.0], [1.0, 2.0])})
    means.update({"a": weighted([10.0], [1.0]), "b": weighted([5.0], [0.5])})
    means.update({})
    assert of(means) == {"a": 4.25, "b": 5.0}
    means.reset()
    means.update({"b": weighted([2.0], [1.0])})
    assert of(means) == {"b": 2.0}


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_seen_only_where_it_counts(hole):
    means = NamedMeans(("a", "b"))
    means.update({"a": weighted([2.0, hole, 4.0], [1.0, 0.0, 1.0]), "b": weighted([hole], [0.0])})
    assert of(means) == {"a": 3.0}
    means.update({"b": weighted([2.0, hole], [1.0, 1.0])})
    assert not math.isfinite(of(means)["b"])


def test_means_are_not_rounded_by_a_move_to_bfloat16():
    """Counts in bfloat16 stop growing at 256."""
    means = NamedMeans(("a",)).to(torch.bfloat16)
    for _ in range(300):
        means.update({"a": (torch.ones(1), torch.ones(1))})
    assert means.counts.item() == 300 and means.counts.dtype == torch.float64


# two pairs and a tie; chosen first, then rejected
POLICY = SequenceLogProbs(torch.tensor([-10.0, -20.0, -6.0, -12.0, -15.0, -8.0]), torch.tensor([5, 10, 2, 4, 5, 2]))
REFERENCE = SequenceLogProbs(torch.tensor([-11.0, -18.0, -7.0, -10.0, -15.0, -9.0]), POLICY.lengths)


def test_pair_values_by_hand():
    """h_w = (1, −2, 1), h_l = (−2, 0, 1), β = .5."""
    values = pair_values(POLICY, REFERENCE, DPO(beta=0.5))
    expected = {
        "rewards/chosen": [0.5, -1.0, 0.5], "rewards/rejected": [-1.0, 0.0, 0.5], "rewards/margin": [1.5, -1.0, 0.0],
        "rewards/accuracy": [1.0, 0.0, 0.5], "log_probs/chosen": [-2.0, -2.0, -3.0],
        "log_probs/rejected": [-3.0, -3.0, -4.0], "displacement/chosen": [1.0, -2.0, 1.0],
    }  # fmt: skip
    assert set(values) == set(expected) == set(PAIRWISE)
    for name, numbers in expected.items():
        assert values[name].tolist() == pytest.approx(numbers), name


def test_values_by_difficulty():
    """Means over all, easy and hard pairs, filler not counted; a group without pairs is left out."""
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    pairs = [ids | {"margin": margin, "pair_id": index} for index, margin in enumerate([3.0, 0.0, 2.0])]
    batch, means = collate(pairs, [False, True, False], evaluation=True), NamedMeans(VALIDATION)
    means.update(by_difficulty({"rewards/margin": torch.tensor([1.0, 4.0, 10.0])}, batch))
    filler = collate(pairs[:2], [False, True], weight=0.0, evaluation=True)
    means.update(by_difficulty({"rewards/margin": torch.tensor([math.nan, 100.0])}, filler))
    assert of(means) == {f"val/{group}/rewards/margin": v for group, v in (("all", 5.0), ("easy", 5.5), ("hard", 4.0))}
    means.reset()
    means.update(by_difficulty({"sft_loss": torch.tensor([2.0])}, collate(pairs[:1], [False], evaluation=True)))
    assert of(means) == {"val/all/sft_loss": 2.0, "val/easy/sft_loss": 2.0}


def test_no_step_is_logged_with_0(tiny_model: str, source: str, tmp_path: Path) -> None:
    trainer = {"log_every_n_steps": 0, "first": (Throughput(),)}
    module = fit(tiny_model, source, tmp_path / "run", trainer=trainer)
    assert module.trainer.global_step == 2 and not module.trainer.callback_metrics
