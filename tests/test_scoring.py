"""Losses of response tokens: the right number at the right token, whatever the batch, and each computed once."""

import copy
import shutil
import sqlite3
import warnings
from collections.abc import Mapping
from contextlib import closing
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_samples, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixdpo.token_cleaning.scoring
from mixdpo.batches.rows import sample_rows
from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import encode_rows
from mixdpo.model import adapters
from mixdpo.model.adapters import Lora, adapter_state, add_adapters, add_reference, copy_adapter, role, stack_policy
from mixdpo.model.export import merged_copy, save_adapter
from mixdpo.model.forward import row_log_probs
from mixdpo.model.fused_layers import fuse
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.model.loading import load_base, load_tokenizer
from mixdpo.token_cleaning.scoring import add_losses, open_losses

SCALE = 2.0  # α / r of the adapters here


def plain_model(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def changed_model(model: str, folder: Path) -> str:
    """A copy of which one weight is another one."""
    changed = plain_model(model)
    changed.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-3
    changed.save_pretrained(shutil.copytree(model, folder))
    return str(folder)


def one_by_one(plain: Any, sample: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """log p of a sample's response tokens, independent of the project's code: one forward, one loop over the spans."""
    ids, spans = torch.tensor([sample["input_ids"]]), sample["spans"]
    log_probs = torch.func.functional_call(plain, dict(weights or {}), (ids,)).logits[0].log_softmax(-1)
    places = [t for start, end in zip(spans[::2], spans[1::2], strict=True) for t in range(start, end)]
    return torch.stack([log_probs[t - 1, ids[0, t]] for t in places])


def with_adapters(plain: Any, adapters: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The plain model's weights W + α/r · ΣBA, from the adapters' tensors by their name."""
    weights = dict(plain.state_dict())
    for key, a in adapters.items():
        if any(f".lora_A.{name}." in key for name in names):
            path = key.split("base_model.model.", 1)[1].split(".lora_A")[0] + ".weight"
            weights[path] = weights[path] + SCALE * adapters[key.replace("lora_A", "lora_B")] @ a
    return weights


def losses_one_by_one(plain: Any, samples: Any, weights: Mapping[str, Tensor] | None = None) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([-one_by_one(plain, sample, weights) for sample in samples]).numpy()


def fill(model: nn.Module, name: str, seed: int, scale: float = 0.3) -> None:
    """B starts at 0, where an adapter is the base and half of the mistakes cannot show."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * scale


@pytest.fixture(scope="module")
def pool(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> TokenPool:
    path = write_pairs(tmp_path_factory.mktemp("data") / "samples.jsonl", make_samples(15))
    encoded, _ = encode_rows(read_samples(path).dataset, load_tokenizer(tiny_model), max_length=64)
    return TokenPool.of(encoded, {})


@pytest.fixture(scope="module")
def tuned(tiny_model: str) -> Any:
    """Policy and cleaning adapter with different weights; in train mode with dropout, as during a run."""
    base = load_base(tiny_model, quantization="none", dtype="float32")
    tuned = add_adapters(base, Lora(rank=4, alpha=8, dropout=0.5))
    add_reference(tuned, "cleaning_reference")
    fill(tuned, "policy", 1)
    fill(tuned, "cleaning_reference", 2)
    return tuned.train()


@pytest.fixture(scope="module")
def expected(tiny_model: str, pool: TokenPool, tuned: Any) -> dict[str, np.ndarray]:
    plain = plain_model(tiny_model)
    names = ("base", "policy", "cleaning_reference")  # there is no adapter of the first name
    weights = {name: with_adapters(plain, adapter_state(tuned), name) for name in names}
    return {name: losses_one_by_one(plain, pool.samples, of) for name, of in weights.items()}


def computed(tuned: Any, name: Any, pool: TokenPool, samples: Any = None, **options: Any) -> np.ndarray:
    losses = open_losses(pool)
    add_losses(losses, tuned, name, pool, range(len(pool.samples)) if samples is None else samples, **options)
    return losses[0]


@pytest.mark.parametrize("name", ["base", "policy", "cleaning_reference"])
def test_each_loss_sits_at_its_token(name, tuned, pool, expected, tiny_model):
    spans = list(pool.samples["spans"])
    assert any(len(s) > 2 for s in spans) and any(len(s) == 2 for s in spans)  # several turns, and one
    assert np.abs(expected["policy"] - expected["cleaning_reference"]).max() > 0.1
    np.testing.assert_allclose(computed(tuned, name, pool), expected[name], rtol=0, atol=1e-5)
    responses = [m["content"] for s in make_samples(15) for m in s["messages"] if m["role"] == "assistant"]
    text = " ".join(f"{response} <|im_end|>" for response in responses)
    assert load_tokenizer(tiny_model).decode(pool.target_ids()) == text  # every answer with its end token, in order


@given(some=st.lists(st.integers(0, 14), unique=True), batch_tokens=st.sampled_from([1, 70, 400, 4096]))
@settings(max_examples=10)
def test_order_and_company_change_nothing(some, batch_tokens, tuned, pool, expected):
    found, (wanted, _) = computed(tuned, "policy", pool, some, batch_tokens=batch_tokens), open_losses(pool)
    wanted[pool.tokens(some)] = expected["policy"][pool.tokens(some)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # NaN where nobody asked


def test_a_fresh_adapter_has_the_bases_losses_to_the_bit(tiny_model: str, pool: TokenPool) -> None:
    fresh = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))
    add_reference(fresh, "cleaning_reference")
    base = computed(fresh, "base", pool)
    for name in ("policy", "cleaning_reference"):
        assert np.array_equal(base - computed(fresh, name, pool), np.zeros(len(pool)))


def test_only_what_is_missing_is_computed(tuned: Any, pool: TokenPool) -> None:
    rows: list[int] = []
    hook = tuned.get_base_model().base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        losses, store = open_losses(pool)
        add_losses((losses, store), tuned, "policy", pool, [3, 7])
        assert sum(rows) == 2
        known = pool.tokens([3, 7])
        losses[known] = 77.0
        add_losses((losses, store), tuned, "policy", pool, range(15))
        assert sum(rows) == 17  # batches stay whole, and what is known stays
        assert (losses[known] == 77).all() and (np.delete(losses, known) < 77).all()
        add_losses((losses, store), tuned, "policy", pool, range(15))
        assert sum(rows) == 17
    finally:
        hook.remove()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    return tmp_path / "token_losses"


def test_stored_losses_belong_to_their_identity(tuned: Any, pool: TokenPool, cache: Path) -> None:
    losses, store = open_losses(pool, {"model": "a", "data": "d"})
    assert np.isnan(losses).all()
    add_losses((losses, store), tuned, "policy", pool, [0, 1])
    again, store = open_losses(pool, {"data": "d", "model": "a"})
    np.testing.assert_array_equal(again, losses)
    again[pool.tokens([0, 1])] = 77.0
    add_losses((again, store), tuned, "policy", pool, [0, 1, 2])
    assert (again[pool.tokens([0, 1])] == 77).all() and (again[pool.tokens([2])] < 77).all()
    assert np.isnan(open_losses(pool, {"model": "b", "data": "d"})[0]).all()
    assert np.isnan(open_losses(pool)[0]).all()


def test_a_kept_loss_that_is_damaged_is_computed_anew(tuned, pool, expected, cache, monkeypatch):
    losses, store = open_losses(pool, {"model": "a"})
    add_losses((losses, store), tuned, "policy", pool, [3, 4, 5])
    with closing(sqlite3.connect(store.path)) as database, database:  # by something else
        database.execute("UPDATE entries SET value = zeroblob(length(value)) WHERE key = 4")
    with pytest.warns(UserWarning, match=rf"{cache}/\w+\.sqlite holds damaged token losses"):
        again, store = open_losses(pool, {"model": "a"})
    assert np.array_equal(np.isnan(again), ~np.isin(np.arange(len(pool)), pool.tokens([3, 5])))
    shutil.rmtree(cache)  # a folder that vanishes while tokens are scored
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cache is replaced by memory
        add_losses((again, store), tuned, "policy", pool, range(len(pool.samples)))
    np.testing.assert_allclose(again, expected["policy"], rtol=0, atol=1e-5)
    log_probs = mixdpo.token_cleaning.scoring.row_log_probs
    infinite = lambda *args, **more: log_probs(*args, **more) - np.inf  # noqa: E731
    monkeypatch.setattr("mixdpo.token_cleaning.scoring.row_log_probs", infinite)
    losses, store = open_losses(pool, {"model": "b"})
    add_losses((losses, store), tuned, "policy", pool, [0, 1])
    assert np.isnan(losses).all() and not store.get()


def test_scoring_leaves_the_run_as_it_was(tuned: Any, pool: TokenPool) -> None:
    ids = torch.tensor([pool.samples[0]["input_ids"]])
    random, trainable = torch.get_rng_state(), [p.requires_grad for p in tuned.parameters()]
    with role(tuned, "cleaning_reference"), torch.no_grad():
        before = tuned.get_base_model()(ids).logits
        computed(tuned, "base", pool, [0, 1])
        assert torch.equal(before, tuned.get_base_model()(ids).logits)
    assert torch.equal(random, torch.get_rng_state())  # dropout was off
    assert tuned.training and [p.requires_grad for p in tuned.parameters()] == trainable


# Adapters and roles: whose weights count when, what is frozen, and what leaves as a file; a run with stages.
SAMPLES = [
    {"input_ids": [2, 4, 6, 7, 3, 2, 5, 8, 9, 3, 2, 4, 11, 3, 2, 5, 12, 13, 3], "spans": [7, 10, 16, 19]},
    {"input_ids": [2, 4, 20, 3, 2, 5, 21, 22, 23, 24, 3], "spans": [6, 11]},
]


@pytest.fixture
def model(tiny_model: str) -> Any:
    """A policy that is not the base, without dropout in it but with dropout asked for."""
    torch.manual_seed(0)
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))
    fill(model, "policy", 1)
    return model


def as_role(model: Any, name: Any = "policy") -> Tensor:
    with torch.no_grad(), role(model, name):
        return row_log_probs(model, sample_rows(SAMPLES))


def alone(plain: Any, weights: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([one_by_one(plain, sample, weights) for sample in SAMPLES])


def saved_adapter(base: str, folder: Path, **lora: Any) -> str:
    """A PEFT folder whose adapter changes the base."""
    model = add_adapters(load_base(base, quantization="none", dtype="float32"), Lora(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    save_adapter(model, folder)
    return str(folder)


def close(found: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_role_is_its_own_function(model: Any, plain: Any) -> None:
    for seed, name in enumerate(("reference", "cleaning_reference", "previous")):
        add_reference(model, name)
        fill(model, name, 10 + seed)
    seen = []
    for name in ("policy", "reference", "cleaning_reference", "previous", "base"):
        names = [] if name == "base" else [name]
        close(as_role(model, name), alone(plain, with_adapters(plain, adapter_state(model), *names)))
        seen.append(as_role(model, name))
    assert min((a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]) > 0.01
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".policy." in name}


def test_references_are_copies_that_stay_and_have_no_dropout(tiny_model: str) -> None:
    base = load_base(tiny_model, quantization="none", dtype="float32")
    model = add_adapters(base, Lora(rank=4, alpha=8, dropout=0.5)).train()
    fill(model, "policy", 1)
    random = torch.get_rng_state()
    add_reference(model, "cleaning_reference")
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.equal(as_role(model), as_role(model))  # train mode: the policy drops out
    reference = as_role(model, "cleaning_reference")
    fill(model, "policy", 2)
    assert torch.equal(as_role(model, "cleaning_reference"), reference)
    fill(model, "policy", 1)
    close(as_role(model.eval()), reference, 1e-6)


def test_a_saved_reference_is_what_was_saved(model: Any, tmp_path: Path) -> None:
    wanted = as_role(model)
    save_adapter(model, tmp_path / "adapter")
    fill(model, "policy", 2)
    random = torch.get_rng_state()
    add_reference(model, "cleaning_reference", str(tmp_path / "adapter"))
    assert torch.equal(random, torch.get_rng_state()), "a reference must not shift the run's random numbers"
    close(as_role(model, "cleaning_reference"), wanted, 1e-6)
    assert (as_role(model) - wanted).abs().max() > 0.01
    assert all(".policy." in name for name in trainable(model))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_copy_is_an_average_of_matrices(decay: float, model: Any) -> None:
    add_reference(model, "cleaning_reference")
    fill(model, "cleaning_reference", 2)
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    copy_adapter(model, "policy", "cleaning_reference", decay=decay)
    for key, value in adapter_state(model).items():
        new = before[key.replace(".cleaning_reference.", ".policy.")]
        close(value, decay * before[key] + (1 - decay) * new if ".cleaning_reference." in key else before[key], 1e-7)


def test_the_distance_of_an_average_of_factors_from_one_of_weights(tiny_model: str) -> None:
    """By whole matrices, in layers of two scales."""
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))
    add_reference(model, "reference")
    model.requires_grad_(False)
    layers = adapters.adapter_layers(model)
    for layer in layers[::2]:
        layer.scaling["policy"] = layer.scaling["reference"] = 7.0

    def weights(name: str) -> Tensor:
        return torch.cat([layer.get_delta_weight(name).double().flatten() for layer in layers])

    assert isnan(adapters.factor_distance(model, "policy", "reference", 0.3))  # of two bare bases
    for _ in range(2):  # from the base, and from an adapter
        for matrix in (each["policy"] for layer in layers for each in (layer.lora_A, layer.lora_B)):
            matrix.weight.normal_()
        average = 0.3 * weights("reference") + 0.7 * weights("policy")
        found = adapters.factor_distance(model, "policy", "reference", 0.3)
        copy_adapter(model, "policy", "reference", decay=0.3)
        wanted = float((weights("reference") - average).norm() / average.norm())
        assert 0.1 < found == pytest.approx(wanted, rel=1e-4)


def test_rslora_is_the_same_in_every_role_stage_and_file(tiny_model: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = load_base(tiny_model, quantization="none", dtype="float32")
    model = add_adapters(copy.deepcopy(base), Lora(rank=4, alpha=8, rslora=True)).eval()
    for stages in ("1", "2"):
        fill(model, "policy", int(stages))
        assert {layer.scaling["policy"] for layer in adapters.adapter_layers(model)} == {8 / 4**0.5}
        save_adapter(model, tmp_path / stages)
        saved = alone(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / stages)).eval().get_base_model())
        close(as_role(model), saved)
        close(alone(merged_copy(model)), saved)
        assert Lora.of(str(tmp_path / stages)).rslora
        fuse(model, ["lora"])
        close(as_role(model), saved)
        stack_policy(model)


def test_stacking_changes_weights_but_not_the_function(model: Any, plain: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    for stage in (1, 2):
        before = as_role(model)
        learned = {k: v.clone() for k, v in adapter_state(model).items() if ".policy." in k}
        stack_policy(model)
        close(as_role(model), before, 1e-6)
        state = adapter_state(model)
        for key, value in learned.items():
            assert torch.equal(state[key.replace(".policy.", f".stage_{stage}.")], value)
            assert state[key].any() == ("lora_A" in key) and not torch.equal(state[key], value)
        assert trainable(model) == set(learned)
        fill(model, "policy", 30 + stage)
    close(as_role(model), alone(plain, with_adapters(plain, adapter_state(model), "stage_1", "stage_2", "policy")))
    close(as_role(model, "base"), alone(plain))

    save_adapter(model, tmp_path / "adapter")
    saved = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter")).eval()
    close(alone(saved.get_base_model()), as_role(model))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # nothing temporary stays
    close(alone(merged_copy(model)), as_role(model))


def test_merged_copies_of_each_role_draw_no_random_numbers(model: Any, tiny_model: str) -> None:
    add_reference(model, "cleaning_reference")
    fill(model, "cleaning_reference", 2)
    random = torch.get_rng_state()
    for name in ("policy", "cleaning_reference", "base"):
        close(alone(merged_copy(model, name)), as_role(model, name))
    assert torch.equal(random, torch.get_rng_state())
    quantised = load_base(tiny_model, quantization="nf4", dtype="float32")
    model = add_adapters(quantised, Lora(rank=4, targets=["q_proj"]))  # layers without an adapter are dequantised too
    fill(model, "policy", 1)
    close(alone(merged_copy(model)), as_role(model))


def test_reference_of_a_stacked_policy_is_the_whole_stack(model: Any) -> None:
    add_reference(model, "cleaning_reference")
    stack_policy(model)
    fill(model, "policy", 2)
    whole = as_role(model)
    copy_adapter(model, "policy", "cleaning_reference")
    close(as_role(model, "cleaning_reference"), whole, 1e-6)
    stack_policy(model)
    fill(model, "policy", 3)
    close(as_role(model, "cleaning_reference"), whole, 1e-6)
    assert (as_role(model) - whole).abs().max() > 0.01


def test_fingerprints_change_with_what_they_are_of(model: Any) -> None:
    add_reference(model, "cleaning_reference")
    base, policy = base_fingerprint(model), adapter_fingerprint(model, "policy")
    assert adapter_fingerprint(model, "base") == "none" and adapter_fingerprint(model, "cleaning_reference") == policy
    fill(model, "policy", 2)
    now = adapter_fingerprint(model, "policy")
    assert now != policy == adapter_fingerprint(model, "cleaning_reference")
    stack_policy(model)
    assert adapter_fingerprint(model, "policy") not in (now, policy)
    assert base_fingerprint(model) == base


CHANGES: dict[str, Any] = {
    "a bit": lambda base: base.model.norm.weight[5].mul_(1 + 2**-23),
    "a layer": lambda base: base.model.layers[1].mlp.up_proj.weight.mul_(2),
    "the order": lambda base: base.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight.flip(0)),
    "a setting": lambda base: setattr(base.config, "rms_norm_eps", 1e-3),
    "nf4 offset": lambda base: base.model.layers[1].mlp.up_proj.weight.quant_state.offset.mul_(2),
    "nf4 scale of scales": lambda base: base.model.layers[1].mlp.up_proj.weight.quant_state.state2.absmax.mul_(2),
    "int8 scale": lambda base: base.model.layers[1].mlp.up_proj.state.SCB.mul_(2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_base_is_its_weights_their_scales_and_its_configuration(name: str, tiny_model: str) -> None:
    quantization = name.split()[0] if name.startswith(("nf4", "int8")) else "none"
    prints = []
    for change in (lambda base: None, lambda base: None, CHANGES[name]):
        base = load_base(tiny_model, quantization=quantization, dtype="float32")
        change(base)
        prints.append(base_fingerprint(add_adapters(base, Lora(rank=2))))
    assert prints[0] == prints[1] != prints[2]
