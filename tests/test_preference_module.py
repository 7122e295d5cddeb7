"""Training steps on a tiny model: what is computed, what gets a gradient, and what never may."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter_weights, build, fit, make_pairs, same, write_pairs
from test_scoring import fill

from lightning_modules import preference as preference_module
from lightning_modules.preference import PreferenceModule
from mixdpo import losses
from mixdpo.batches.batch import Batch
from mixdpo.model import reference_cache
from mixdpo.model.adapters import adapter_layers, role
from mixdpo.model.forward import sequence_log_probs
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant


def first_batch(trainer: Any, module: PreferenceModule, data: Any) -> Batch:
    """Load weights and data as `fit` does, without training."""
    trainer.strategy._lightning_module = module
    trainer._data_connector.attach_data(module, datamodule=data)
    module.trainer = data.trainer = trainer
    data.setup("fit")
    with trainer.init_module():  # sets the default dtype, as `fit` does
        module.configure_model()
    return next(iter(data.train_dataloader()))


def perturb_policy(module: PreferenceModule, scale: float = 0.5) -> None:
    """LoRA's B starts at 0, where policy and reference are equal and half of the mistakes cannot show."""
    fill(module.model, "policy", 1, scale)


def plain_log_prob(causal_lm: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Independent of the project's code: one forward of prompt + completion, one loop over its tokens."""
    ids = torch.tensor([prompt + completion])
    log_probs = causal_lm(ids).logits[0].log_softmax(-1)
    return torch.stack([log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]).sum()


def step_by_hand(module: PreferenceModule, data: Any, indices: list[int], beta: float, lr: float) -> None:
    """One SGD step, one pair at a time, from the equations."""
    policy = [p for p in module.model.parameters() if p.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    causal_lm = module.model.get_base_model()
    for i in indices:
        pair = data.train_pairs[i]
        prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        if data.route.is_hard[i]:
            total = total - plain_log_prob(causal_lm, prompt, chosen) / len(chosen)
            continue
        with torch.no_grad(), module.model.disable_adapter():
            r_w, r_l = (plain_log_prob(causal_lm, prompt, side) for side in (chosen, rejected))
        for parameter in policy:
            parameter.requires_grad_(True)
        s_w, s_l = (plain_log_prob(causal_lm, prompt, side) for side in (chosen, rejected))
        total = total - torch.log(torch.sigmoid(beta * ((s_w - r_w) - (s_l - r_l))))
    gradients = torch.autograd.grad(total / len(indices), policy)
    with torch.no_grad():
        for parameter, gradient in zip(policy, gradients, strict=True):
            parameter -= lr * gradient


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What will list every forward pass of the module: True for the policy's in training, which keep a gradient."""
    grads: list[bool] = []

    def counted(real: Any) -> Any:
        def forward(*arguments: Any) -> Any:
            grads.append(torch.is_grad_enabled())
            return real(*arguments)

        return forward

    for module, name in ((preference_module, "sequence_log_probs"), (reference_cache, "row_log_probs")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return grads


CUTS = [
    {"accumulate": 1, "reference_cache": False}, {"accumulate": 4}, {"accumulate": 2, "share_prompt": False},
    {"accumulate": 2, "attention": "eager"}, {"accumulate": 1, "activation_checkpointing": True},
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.usefixtures("full_precision_norms")
def test_update_is_the_mean_over_the_step_whatever_the_cut(cut, tiny_model, source, tmp_path) -> None:
    """10 training pairs in steps of 4, 4 and 2, mixed micro-batches among them, against a loop in this file."""
    cut = dict(cut)
    trainer = {"accumulate_grad_batches": cut.pop("accumulate"), "precision": "64-true", "max_epochs": 2}
    data = {"limit": 10, "share_prompt": cut.pop("share_prompt", True), "routing": Routing(hard_fraction=0.3)}
    options = {"dtype": "float64", "schedule": Constant(warmup=0.0), "preference_loss": losses.DPO(beta=0.5), **cut}
    module = fit(tiny_model, source, tmp_path / "run", trainer=trainer, data=data, **options)

    fitter, by_hand, pairs = build(tiny_model, source, tmp_path / "hand", trainer=trainer, data=data, **options)
    first_batch(fitter, by_hand, pairs)
    order = pairs.route.order.tolist()
    for _ in range(2):
        for start in range(0, 10, 4):
            step_by_hand(by_hand, pairs, order[start : start + 4], beta=0.5, lr=0.1)
    ours, theirs = adapter_weights(module), adapter_weights(by_hand)
    assert max(value.abs().max() for key, value in ours.items() if "lora_B" in key) > 1e-3  # B starts at 0
    for key in ours:
        close = 1e-6 if "attention" in cut else 1e-11  # eager attention takes its softmax in fp32
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=close)


def test_only_the_policy_gets_a_gradient_and_nothing_else_moves(tiny_model: str, source: str, tmp_path: Path) -> None:
    """The reference is the frozen start, not the base."""
    trained = fit(tiny_model, source, tmp_path / "first", lr=1.0)
    run = build(tiny_model, source, tmp_path / "second", adapter=str(tmp_path / "first" / "adapter"))
    rows, module, sums = first_batch(*run).rows, run[1], {}
    for name in ("reference", "base"):
        with torch.no_grad(), role(module.model, name):
            sums[name] = sequence_log_probs(module.model, rows).sums
    assert torch.equal(sums["reference"], sequence_log_probs(trained.model, rows).sums.detach())
    assert (sums["reference"] - sums["base"]).abs().max() > 1e-3
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for key, value in adapter_weights(trained).items():  # starts from the trained adapter, which is its reference
        assert torch.equal(value, before[key])
        assert torch.equal(value, before[key.replace(".policy.", ".reference.")])
    run[0].fit(module, run[2])
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (".policy." in name), name
    after = module.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".policy." in key for key in changed)
    assert {key for key in before if ".policy." in key} == changed


def test_roles_restore_what_was_even_after_an_error(tiny_model: str, source: str, tmp_path: Path) -> None:
    run = build(tiny_model, source, tmp_path / "run")
    batch = first_batch(*run)
    module = run[1]
    perturb_policy(module)
    trainable = [p.requires_grad for p in module.parameters()]
    policy = sequence_log_probs(module.model, batch.rows).sums
    with pytest.raises(KeyError), role(module.model, "base"):
        raise KeyError
    assert torch.equal(policy, sequence_log_probs(module.model, batch.rows).sums)
    assert [p.requires_grad for p in module.parameters()] == trainable
    with role(module.model, "base"):
        ours = sequence_log_probs(module.model, batch.rows).sums
    with module.model.disable_adapter():
        peft = sequence_log_probs(module.model, batch.rows).sums
    assert torch.equal(ours, peft) and not torch.equal(ours, policy)


def with_random_rejected(rows: list[dict[str, Any]], hard: bool, threshold: float) -> list[dict[str, Any]]:
    """Replace the rejected text of all hard pairs, or of one easy pair."""
    changed = [dict(row) for row in rows]
    picked = [row for row in changed if (row["margin"] < threshold) == hard]
    for row in picked if hard else picked[:1]:
        row["rejected"] = "snow snow bird fish fish salt " + row["rejected"][:3]
    return changed


@pytest.mark.parametrize(("hard", "accumulate"), [(True, 1), (True, 4), (False, 4)])
def test_hard_pairs_rejected_text_is_not_there(hard: bool, accumulate: int, tiny_model: str, tmp_path: Path) -> None:
    """12 pairs in three steps of which the middle one mixes both routes (5 hard)."""
    rows = make_pairs(12)
    options: dict[str, Any] = {"trainer": {"accumulate_grad_batches": accumulate}}
    options["data"] = {"routing": Routing(threshold=3.0)}
    a = fit(tiny_model, write_pairs(tmp_path / "a.jsonl", rows), tmp_path / "a", **options)
    other = write_pairs(tmp_path / "b.jsonl", with_random_rejected(rows, hard, 3.0))
    b = fit(tiny_model, other, tmp_path / "b", **options)
    assert same(a, b) == hard


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 3), (1 / 3, 2), (1.0, 0)])
def test_steps_of_hard_pairs_never_run_the_reference(fraction, expected, tiny_model, source, tmp_path, monkeypatch):
    grads = forwards(monkeypatch)
    fit(tiny_model, source, tmp_path / "run", data={"routing": Routing(hard_fraction=fraction)})
    assert grads.count(True) == 3 and grads.count(False) == expected


@pytest.mark.parametrize("precision,dtype,cast", [("32-true", "float32", True), ("bf16-mixed", "bfloat16", False)])
def test_autocast_makes_no_wide_copy_of_an_adapters_input(precision, dtype, cast, tiny_model, source, tmp_path) -> None:
    """And the adapter itself stays in fp32 and learns."""
    module = fit(tiny_model, source, tmp_path / "run", trainer={"precision": precision}, dtype=dtype)
    assert {layer.cast_input_dtype_enabled for layer in adapter_layers(module.model)} == {cast}
    weights = adapter_weights(module)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
