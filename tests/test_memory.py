"""What is said about cost: the floor against a figure by hand, and which micro-batches are recomputed."""

from typing import Any

import pytest
import torch
from conftest import build, fit, same
from test_preference_module import first_batch

from mixdpo.batches.rows import build_rows
from mixdpo.model.adapters import Lora, add_adapters
from mixdpo.model.loading import load_base
from mixdpo.model.memory import floor_flops, linear_sizes, matrix_rate
from mixdpo.routing.route import Routing


@pytest.fixture
def model(tiny_model: str) -> Any:
    return add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=4, alpha=8))


def pair(prompt: int, chosen: int, rejected: int) -> dict[str, list[int]]:
    return {"prompt_ids": [5] * prompt, "chosen_ids": [6] * chosen, "rejected_ids": [7] * rejected}


def test_the_floor_by_hand(tiny_model: str, model: Any) -> None:
    """Llama-3.1-8B has 6.98e9 weights in its layers and 0.525e9 in its head: 20.4 TFLOP a pair, attention included."""
    rows = build_rows([pair(121, 288, 288)], [True], [True])
    assert 0.97 < floor_flops((6_979_321_856, 525_336_576), rows) / 20.4e12 < 1.03
    layer, head = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3, 64 * model.get_base_model().config.vocab_size
    for base in (model.get_base_model(), load_base(tiny_model, quantization="nf4", dtype="float32")):
        assert linear_sizes(base) == (2 * layer, head)  # whatever holds it
    # padding and a second prompt are no part
    pairs, layouts = [pair(10, 4, 6), pair(3, 1, 1)], [(True, 0), (True, 100), (False, 0)]
    floors = [floor_flops((10, 1), build_rows(pairs, [True] * 2, [True] * 2, *layout)) for layout in layouts]
    assert floors == [4 * (10 * (20 + 5) + 12), 4 * (10 * (20 + 5) + 12), 4 * (10 * (30 + 8) + 12)]


def test_the_matrix_rate_is_of_random_data_and_leaves_the_runs_random_numbers(monkeypatch) -> None:
    drawn, randn, before = [], torch.randn, torch.get_rng_state()
    monkeypatch.setattr("torch.randn", lambda *size, **more: drawn.append(randn(*size, **more)) or drawn[-1])
    assert matrix_rate(8, torch.device("cpu"), torch.bfloat16, seconds=0.01) > 0
    assert [tuple(each.shape) for each in drawn] == [(512, 8), (8, 32)]
    assert all(0.8 < each.float().std() < 1.2 and each.dtype == torch.bfloat16 for each in drawn)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("asked", "expected"), [(True, 3), (False, 0), (45, 1), ("auto", 0)])
def test_long_micro_batches_alone_are_recomputed(asked, expected, tiny_model, source, tmp_path, monkeypatch):
    """So many of the three longest. A layer that is recomputed runs twice; auto has all the memory of this machine."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    calls, forward = [], LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda *given, **more: calls.append(1) or forward(*given, **more))
    options = {"activation_checkpointing": asked, "reference_cache": False}
    data = {"routing": Routing(hard_fraction=1.0), "batch_size": 1}
    trainer, module, pairs = build(tiny_model, source, tmp_path / "run", data=data, **options)
    first_batch(trainer, module, pairs)
    batches = sorted(pairs.train_dataloader(), key=lambda batch: -batch.rows.tokens)
    if asked != "auto":
        assert module._recompute_above == (0 if isinstance(asked, bool) else asked)
    if asked == 45:
        module._recompute_above = batches[0].rows.tokens - 1
    for number, batch in enumerate(batches[:3]):
        calls.clear()
        module.recompute_if_long(batch.rows)
        policy, _ = module.policy_and_reference(batch)
        policy.sums.sum().backward()
        assert len(calls) == (4 if number < expected else 2)


def test_auto_recomputes_what_does_not_fit(tiny_model, source, tmp_path, monkeypatch):
    module = fit(tiny_model, source, tmp_path / "much", activation_checkpointing="auto")
    assert module._recompute_above > 10_000
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1e7})())
    little = fit(tiny_model, source, tmp_path / "little", activation_checkpointing="auto")
    assert 0 < little._recompute_above < 1000
    assert same(module, little)


def test_a_run_logs_its_share_of_the_floor(tiny_model, source, tmp_path, monkeypatch):
    from lightning_modules.callbacks.logging import Throughput

    monkeypatch.setattr("lightning_modules.callbacks.logging.matrix_rate", lambda *_: 1e9)
    rows: list[dict[str, float]] = []
    trainer, module, pairs = build(tiny_model, source, tmp_path / "run", trainer={"first": (Throughput(),)})
    module._log_step = rows.append  # type: ignore[method-assign]
    trainer.fit(module, pairs)
    body, head = linear_sizes(module.model.get_base_model())
    per_token = [row["floor_share"] * 1e9 / row["tokens_per_second"] for row in rows if row["memory/peak_gb"] > 0.1]
    assert len(rows) == len(per_token) == 3 and all(4 * body < each <= 4 * (body + head) for each in per_token)
