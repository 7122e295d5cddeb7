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
from test_preference_module import first_batch, perturb_policy

import mixdpo.model.forward
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.preference import PreferenceModule
from mixdpo import losses
from mixdpo.errors import InputError
from mixdpo.losses import BetaDPO, SimPO
from mixdpo.metrics import pair_values
from mixdpo.model.adapters import adapter_layers
from mixdpo.model.forward import sequence_log_probs
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant

SOURCE_ROWS = make_pairs(8)
EASY, HALF, HARD = ({"routing": Routing(hard_fraction=fraction)} for fraction in (0.0, 0.5, 1.0))


def test_a_loss_over_that_of_a_config(build_cli: Any) -> None:  # noqa: F811
    alone = build_cli("configs/demo.yaml", "--model.preference_loss", "mixdpo.losses.SPPO").model.preference_loss
    assert alone.beta == 0.001  # its own: jsonargparse would hand on a number that the signature of DPO has


@pytest.mark.parametrize("name", ["hypo", "odpo", "madpo", "amapo", "sum"])
def test_the_preset_of_a_loss(name: str, build_cli: Any) -> None:  # noqa: F811
    """The overlay sets the loss with its own hyper-parameters, and nothing of the DPO below it."""
    built = build_cli("configs/demo.yaml", "--config", f"configs/losses/{name}.yaml")
    expected = losses.Sum([losses.DPO(), SimPO()], [1.0, 0.5]) if name == "sum" else make(name)
    assert built.model.preference_loss.describe() == expected.describe() and built.config.fit.name == name


IN_RUNS = ["dpo", "ipo", "ld_dpo", "kto_pair", "beta_dpo", "cal_dpo", "slic", "orpo", "hypo", "amapo", "exo"]


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
    roles: list[bool] = []
    real = mixdpo.model.forward.predicting_states

    def counted(model: Any, *arguments: Any) -> Any:
        if hasattr(model, "active_adapter"):  # loading tries packed rows on the bare base
            roles.append(model.active_adapter == "policy" and not adapter_layers(model)[0]._disable_adapters)
        return real(model, *arguments)

    monkeypatch.setattr(mixdpo.model.forward, "predicting_states", counted)
    data = {"routing": Routing(hard_fraction=0.3), "batch_size": 2, "validation": 0.25, "eval_batch_size": 1}
    loss = getattr(losses, TABLE[name][0])()
    trainer, module, pairs = build(tiny_model, source, tmp_path / "run", data=data, preference_loss=loss, lr=1e-6)
    trainer.fit(module, pairs)
    assert roles == [True] * (len(pairs._steps()) + len(pairs.validation_pairs))


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
def test_beta_dpo_resumes_exactly_and_validation_leaves_it_alone(
    summed: bool, tiny_model: str, source: str, tmp_path: Path
) -> None:
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


def test_what_does_not_go_with_a_loss_is_refused(tiny_model: str, source: str, tmp_path: Path) -> None:
    # of KTOPair in bad_input/options.py
    with pytest.raises(InputError, match="takes means, but gets one pair: halve"):
        fit(tiny_model, source, tmp_path / "run", preference_loss=BetaDPO(), trainer={"accumulate_grad_batches": 4})
    trainer = {"first": (RefreshReference(role="reference", every=1),)}
    with pytest.raises(InputError, match="neither the scorer nor the loss reads a"):
        fit(tiny_model, source, tmp_path / "run", preference_loss=SimPO(), trainer=trainer)
