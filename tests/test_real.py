"""The real model in 4 bits: SmolLM2-135M-Instruct from the PyPI package, one step; and what only a GPU can show."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import collate, write_pairs
from test_preference_module import plain_log_prob
from test_scoring import fill

from mixdpo.batches.batch import Batch
from mixdpo.data.encoding import encode_rows
from mixdpo.data.pairs import read_pairs
from mixdpo.losses import DPO
from mixdpo.model.adapters import Lora, add_adapters, role
from mixdpo.model.export import merged_copy, save_adapter
from mixdpo.model.forward import sequence_log_probs
from mixdpo.model.loading import load_base, load_tokenizer
from mixdpo.model.packaged import PACKAGED

pytestmark = [pytest.mark.real, pytest.mark.long]
TEXTS = [
    ("Name three fruits.", "Apples, pears and plums are three fruits.", "Fruits are healthy."),
    ("What is the capital of France? Response in one word.", "Paris.", "France is in Europe; its capital is Lyon."),
]
NAMES = ("prompt", "chosen", "rejected")
ROWS = [dict(zip(NAMES, texts, strict=True)) | {"margin": 2.0 - i} for i, texts in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The two pairs, encoded with the model's own chat template."""
    source = write_pairs(tmp_path_factory.mktemp("real") / "pairs.jsonl", ROWS)
    tokenizer = load_tokenizer(PACKAGED)
    pairs, counts = encode_rows(read_pairs(source).dataset, tokenizer, max_length=128, max_prompt_length=64)
    assert not any(counts.values())
    assert [tokenizer.decode(pair["chosen_ids"][-1]) for pair in pairs] == ["<|im_end|>"] * 2
    return list(pairs)


def fresh_model(device: str, dtype: str) -> Any:
    torch.manual_seed(0)
    return add_adapters(load_base(PACKAGED, quantization="nf4", dtype=dtype, device=device), Lora(rank=8, alpha=16))


@pytest.fixture(scope="module")
def cpu_model() -> Any:
    return fresh_model("cpu", "float32")


@pytest.fixture
def model(cpu_model: Any) -> Iterator[Any]:
    """The one loaded model, with its adapter put back after the test."""
    before = {name: value.detach().clone() for name, value in cpu_model.named_parameters() if ".policy." in name}
    yield cpu_model
    for name, value in cpu_model.named_parameters():
        if ".policy." in name:
            value.data.copy_(before[name])
            value.grad = None


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Weights, quantisation constants and buffers of the base: everything that must not move."""
    tensors = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    return {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def step_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the easy pair by DPO and of the hard one by SFT, from the equations; pair 0 is easy and pair 1 hard."""
    with torch.no_grad(), role(model, "reference"):
        reference = sequence_log_probs(model, batch.reference_rows)
    policy = sequence_log_probs(model, batch.rows)
    sides = torch.tensor([[0], [2]], device=policy.sums.device)  # of 2B = 4: chosen and rejected of pair 0
    easy = DPO(beta=0.1)(*(each[side] for each in (policy, reference) for side in sides))
    return easy[0], -policy.sums[1] / policy.lengths[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_step_in_four_bits_moves_the_policy_only(device, encoded, request) -> None:
    import bitsandbytes as bnb

    model = request.getfixturevalue("model" if device == "cpu" else "gpu_model")
    four_bit = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 30 * 7 and all(m.weight.dtype == torch.uint8 for m in four_bit)
    assert {m.weight.quant_type for m in four_bit} == {"nf4"}
    before, autocast = frozen(model), torch.autocast(device, torch.bfloat16, device == "cuda", cache_enabled=False)
    easy_only = collate(encoded, [False, False]).to(torch.device(device))
    with torch.no_grad(), autocast:
        policy = sequence_log_probs(model, easy_only.rows)
        with role(model, "reference"):
            reference = sequence_log_probs(model, easy_only.reference_rows)
    assert torch.equal(policy.sums, reference.sums)  # of the same rows: the first loss is exactly ln 2
    with autocast:
        easy, hard = step_loss(model, collate(encoded, [False, True]).to(torch.device(device)))
    # the reference's rows lack the hard pair, and products of another shape round otherwise in bf16
    assert easy.item() == pytest.approx(0.6931472, abs=1e-6 if device == "cpu" else 0.1)
    assert 0.1 < hard.item() < 10
    ((easy + hard) / 2).backward()
    learning = {name: p for name, p in model.named_parameters() if ".policy." in name}
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(learning)
    assert all(torch.isfinite(p.grad).all() for p in learning.values())
    torch.optim.SGD(learning.values(), lr=0.1).step()
    after = frozen(model)
    assert before.keys() == after.keys() and len(before) > 30 * 7
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    learnt = [p for name, p in learning.items() if "lora_B" in name]
    assert len(learnt) == 30 * 7 and all(p.any() for p in learnt)  # B starts at 0


@pytest.mark.parametrize("scale", [0.0, 0.02])
def test_merged_copy_equals_the_four_bit_model(scale: float, model: Any, encoded: list[dict[str, Any]]) -> None:
    fill(model, "policy", 7, scale)
    rows = collate(encoded, [False, False]).rows
    with torch.no_grad():
        policy = sequence_log_probs(model, rows).sums
        with role(model, "base"):
            base = sequence_log_probs(model, rows).sums
    merged = merged_copy(model, "policy")
    sequences = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in encoded]
    with torch.no_grad():
        found = [float(plain_log_prob(merged, *sequence)) for sequence in sequences]
    assert found == pytest.approx(policy.tolist(), rel=1e-3)
    assert (policy - base).abs().max() > 0.1 if scale else torch.equal(policy, base)


@pytest.fixture(scope="module")
def gpu_model() -> Any:
    return fresh_model("cuda", "bfloat16")


@pytest.mark.gpu
def test_roles_on_a_gpu_and_of_an_adapter_saved_there(gpu_model, encoded, tmp_path):
    fill(gpu_model, "policy", 7, 0.02)
    save_adapter(gpu_model, tmp_path / "adapter")
    base = load_base(PACKAGED, quantization="nf4", dtype="bfloat16", device="cuda")
    again = add_adapters(base, Lora(), str(tmp_path / "adapter"))
    rows = collate(encoded, [False, False]).rows.to(torch.device("cuda"))

    def sums(model: Any, name: Any = "policy") -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False), role(model, name):
            return sequence_log_probs(model, rows).sums

    policy, reference = sums(gpu_model), sums(gpu_model, "reference")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False), gpu_model.disable_adapter():
        base_sums = sequence_log_probs(gpu_model, rows).sums
    assert torch.equal(reference, base_sums)  # started from none: the reference is the base
    assert torch.equal(policy, sums(gpu_model)) and (policy - reference).abs().max() > 0.1
    torch.testing.assert_close(policy, sums(again), rtol=0, atol=1e-3)
    assert torch.equal(sums(again), sums(again, "reference"))
