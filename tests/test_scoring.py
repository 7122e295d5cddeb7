"""Losses of response tokens: the right number at the right token, whatever the batch, and each computed once."""

import shutil
import sqlite3
import warnings
from collections.abc import Mapping
from contextlib import closing
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
from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import encode_rows
from mixdpo.model.adapters import Lora, adapter_state, add_adapters, add_reference, role
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
def model(tiny_model: str) -> Any:
    """Policy and cleaning adapter with different weights; in train mode with dropout, as during a run."""
    base = load_base(tiny_model, quantization="none", dtype="float32")
    model = add_adapters(base, Lora(rank=4, alpha=8, dropout=0.5))
    add_reference(model, "cleaning_reference")
    fill(model, "policy", 1)
    fill(model, "cleaning_reference", 2)
    return model.train()


@pytest.fixture(scope="module")
def expected(tiny_model: str, pool: TokenPool, model: Any) -> dict[str, np.ndarray]:
    plain = plain_model(tiny_model)
    adapters = {name: [name] if name != "base" else [] for name in ("base", "policy", "cleaning_reference")}
    return {
        name: losses_one_by_one(plain, pool.samples, with_adapters(plain, adapter_state(model), *added))
        for name, added in adapters.items()
    }


def computed(model: Any, name: Any, pool: TokenPool, samples: Any = None, **options: Any) -> np.ndarray:
    losses = open_losses(pool)
    add_losses(losses, model, name, pool, range(len(pool.samples)) if samples is None else samples, **options)
    return losses[0]


@pytest.mark.parametrize("name", ["base", "policy", "cleaning_reference"])
def test_each_loss_sits_at_its_token(name, model, pool, expected, tiny_model):
    spans = list(pool.samples["spans"])
    assert any(len(s) > 2 for s in spans) and any(len(s) == 2 for s in spans)  # several turns, and one
    assert np.abs(expected["policy"] - expected["cleaning_reference"]).max() > 0.1
    np.testing.assert_allclose(computed(model, name, pool), expected[name], rtol=0, atol=1e-5)
    responses = [m["content"] for s in make_samples(15) for m in s["messages"] if m["role"] == "assistant"]
    text = " ".join(f"{response} <|im_end|>" for response in responses)
    assert load_tokenizer(tiny_model).decode(pool.target_ids()) == text  # every answer with its end token, in order


@given(some=st.lists(st.integers(0, 14), unique=True), batch_tokens=st.sampled_from([1, 70, 400, 4096]))
@settings(max_examples=10)
def test_order_and_company_change_nothing(some, batch_tokens, model, pool, expected):
    found, (wanted, _) = computed(model, "policy", pool, some, batch_tokens=batch_tokens), open_losses(pool)
    wanted[pool.tokens(some)] = expected["policy"][pool.tokens(some)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # NaN where nobody asked


def test_a_fresh_adapter_has_the_bases_losses_to_the_bit(tiny_model: str, pool: TokenPool) -> None:
    fresh = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))
    add_reference(fresh, "cleaning_reference")
    base = computed(fresh, "base", pool)
    for name in ("policy", "cleaning_reference"):
        assert np.array_equal(base - computed(fresh, name, pool), np.zeros(len(pool)))


def test_only_what_is_missing_is_computed(model: Any, pool: TokenPool) -> None:
    rows: list[int] = []
    hook = model.get_base_model().base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        losses, store = open_losses(pool)
        add_losses((losses, store), model, "policy", pool, [3, 7])
        assert sum(rows) == 2
        known = pool.tokens([3, 7])
        losses[known] = 77.0
        add_losses((losses, store), model, "policy", pool, range(15))
        assert sum(rows) == 17  # batches stay whole, and what is known stays
        assert (losses[known] == 77).all() and (np.delete(losses, known) < 77).all()
        add_losses((losses, store), model, "policy", pool, range(15))
        assert sum(rows) == 17
    finally:
        hook.remove()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path))
    return tmp_path / "token_losses"


def test_stored_losses_belong_to_their_identity(model: Any, pool: TokenPool, cache: Path) -> None:
    losses, store = open_losses(pool, {"model": "a", "data": "d"})
    assert np.isnan(losses).all()
    add_losses((losses, store), model, "policy", pool, [0, 1])
    again, store = open_losses(pool, {"data": "d", "model": "a"})
    np.testing.assert_array_equal(again, losses)
    again[pool.tokens([0, 1])] = 77.0
    add_losses((again, store), model, "policy", pool, [0, 1, 2])
    assert (again[pool.tokens([0, 1])] == 77).all() and (again[pool.tokens([2])] < 77).all()
    assert np.isnan(open_losses(pool, {"model": "b", "data": "d"})[0]).all()
    assert np.isnan(open_losses(pool)[0]).all()


def test_a_kept_loss_that_is_damaged_is_computed_anew(model, pool, expected, cache, monkeypatch):
    losses, store = open_losses(pool, {"model": "a"})
    add_losses((losses, store), model, "policy", pool, [3, 4, 5])
    with closing(sqlite3.connect(store.path)) as database, database:  # by something else
        database.execute("UPDATE entries SET value = zeroblob(length(value)) WHERE key = 4")
    with pytest.warns(UserWarning, match=rf"{cache}/\w+\.sqlite holds damaged token losses"):
        again, store = open_losses(pool, {"model": "a"})
    assert np.array_equal(np.isnan(again), ~np.isin(np.arange(len(pool)), pool.tokens([3, 5])))
    shutil.rmtree(cache)  # a folder that vanishes while tokens are scored
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cache is replaced by memory
        add_losses((again, store), model, "policy", pool, range(len(pool.samples)))
    np.testing.assert_allclose(again, expected["policy"], rtol=0, atol=1e-5)
    log_probs = mixdpo.token_cleaning.scoring.row_log_probs
    infinite = lambda *args, **more: log_probs(*args, **more) - np.inf  # noqa: E731
    monkeypatch.setattr("mixdpo.token_cleaning.scoring.row_log_probs", infinite)
    losses, store = open_losses(pool, {"model": "b"})
    add_losses((losses, store), model, "policy", pool, [0, 1])
    assert np.isnan(losses).all() and not store.get()


def test_scoring_leaves_the_run_as_it_was(model: Any, pool: TokenPool) -> None:
    ids = torch.tensor([pool.samples[0]["input_ids"]])
    random, trainable = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    with role(model, "cleaning_reference"), torch.no_grad():
        before = model.get_base_model()(ids).logits
        computed(model, "base", pool, [0, 1])
        assert torch.equal(before, model.get_base_model()(ids).logits)
    assert torch.equal(random, torch.get_rng_state())  # dropout was off
    assert model.training and [p.requires_grad for p in model.parameters()] == trainable
