"""The memory that is predicted against the memory that a real step takes, and what is decided by it."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import estimate as benchmark
import pytest
import torch
import transformers
from conftest import build, make_pairs, write_pairs
from test_scoring import saved_adapter

from lightning_modules.cli import run
from lightning_modules.memory import memory_model
from mixdpo.errors import InputError
from mixdpo.model import estimate
from mixdpo.model.adapters import Lora
from mixdpo.model.estimate import MemoryModel
from mixdpo.token_cleaning.cleaning import Cleaning

LOADING = {"quantization": "nf4", "dtype": "bfloat16", "attention": "auto"}
OPTIONS = {"accelerator": "cpu", "precision": "bf16-mixed"}


def llama(**options: Any) -> Any:
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.AutoConfig.for_model(options.pop("kind", "llama"), **shape | options)


def model(config: Any = None, rank: int = 4, optimizer: Any = torch.optim.AdamW, **options: Any) -> MemoryModel:
    loading = LOADING | {name: options.pop(name) for name in [*options] if name in LOADING}
    return MemoryModel(config or llama(), Lora(rank=rank, alpha=8), optimizer, loading, **{"device": "cpu"} | options)


WAYS = [(kind, q, again) for kind in ("llama", "qwen2", "mistral") for q in ("nf4", "none") for again in (False, True)]
WAYS += [("smollm2", "none", False), ("smollm2", "nf4", True)]  # its head is the embedding
SHORT = [("llama", "nf4", True), ("qwen2", "none", False)]
MORE = [pytest.param(*way, marks=pytest.mark.long) for way in WAYS if way not in SHORT]


@pytest.mark.parametrize(("kind", "quantization", "recomputed"), [*SHORT, *MORE])
def test_the_peak_is_that_of_a_real_step(kind: str, quantization: str, recomputed: bool) -> None:
    """Six layers, predicted from two and four; measured by torch.profiler."""
    measured, predicted = benchmark.compared(kind, quantization, recomputed)
    assert 0.95 < predicted / measured < 1.05


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_peak_is_that_of_a_gpu(recomputed: bool) -> None:
    measured, predicted = benchmark.compared("smollm2", "nf4", recomputed, "cuda")
    assert 0.93 < predicted / measured < 1.07


def test_weights_adapters_and_moments_by_hand() -> None:
    """A Llama layer has q, o (64 × 64), k, v (32 × 64), gate, up, down (64 × 96), and two norms."""
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    wide = 2 * 100 * 64 * 2 + (2 * 2 + 1) * 64 * 2 + 8 * 4 * 2  # embeddings, head, norms, angles (twice)
    matrices = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    at = {name: model(quantization=name).at(1000, False) for name in ("nf4", "none")}
    assert at["none"]["weights"] == wide + 2 * weights
    assert 0 <= at["nf4"]["weights"] - (wide + weights / 2) < 30_000
    tied = model(llama(tie_word_embeddings=True), quantization="none").at(1000, False)
    assert tied["weights"] == at["none"]["weights"] - 100 * 64 * 2
    assert {each["adapters"] for each in at.values()} == {4 * matrices}
    assert abs(at["nf4"]["moments"] - 8 * matrices) < 200  # and the number of steps
    assert at["nf4"]["loaded"] == at["nf4"]["weights"] + 8 * matrices + at["nf4"]["moments"]  # gradients are held


def test_8_bit_and_paged_optimizers() -> None:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    wide = llama(hidden_size=512, intermediate_size=4096)
    found = {}
    for name, kind in {"fp32": torch.optim.AdamW, "8 bit": AdamW8bit, "paged": PagedAdamW8bit}.items():
        at = model(wide, 32, kind, device="cuda").at(1000, False)
        found[name] = at["moments"] / at["adapters"]
    assert 2 <= found["fp32"] < 2.01
    assert 0.5 < found["8 bit"] < 0.53 and found["paged"] < found["8 bit"]
    unfused = model(wide, 32, partial(torch.optim.AdamW, foreach=True), device="cuda").at(1000, False)
    assert model(wide, 32, device="cuda").at(1000, False)["optimizer"] < unfused["optimizer"]  # _foreach_sqrt


def test_more_tokens_layers_and_adapters_take_more() -> None:
    plain, deep = model(), model(llama(num_hidden_layers=12))
    for again in (False, True):
        assert plain.peak(2000, again) < plain.peak(3000, again) < deep.peak(3000, again)
        for memory in (1e8, 5e8):
            most = deep.most_tokens(memory, again)
            assert deep.peak(most, again)[0] <= memory < deep.peak(most + 1, again)[0]
    assert deep.peak(3000, True) < deep.peak(3000, False) and deep.most_tokens(1e4, True) == 0
    more = model(frozen_adapters=2)
    assert more.peak(2000, True)[0] - plain.peak(2000, True)[0] == pytest.approx(2 * plain.at(0, True)["adapters"])
    direct = estimate._steps(deep, 12, False)[0]
    assert list(deep.at(direct[0], False).values()) == pytest.approx(direct.tolist(), rel=0.002)


def test_a_simulation_is_made_once_and_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.random.get_rng_state()
    first = model(llama(vocab_size=77)).peak(10, False)
    assert torch.equal(before, torch.random.get_rng_state())
    monkeypatch.setattr(estimate, "_simulate", None)
    assert model(llama(vocab_size=77)).peak(10, False) == first


class Unknown(torch.optim.SGD):
    pass


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer Unknown cannot be estimated"):
        model(optimizer=Unknown).peak(10, False)
    with pytest.raises(InputError, match="an int8 base cannot be estimated"):
        model(quantization="int8").peak(10, False)
    uneven = llama(kind="deepseek_v3", num_hidden_layers=8, first_k_dense_replace=3, n_routed_experts=4, n_group=1)
    with pytest.raises(InputError, match="cannot be estimated"):
        model(uneven, quantization="none").peak(10, False)


@pytest.mark.parametrize(("asked", "gigabytes", "recomputed"), [
    (True, 9.0, True), (False, 9.0, False), ("auto", 9.0, False), ("auto", 0.05, True), (10**9, 9.0, False),
    (10, 9.0, True),
])  # fmt: skip
def test_the_limit_of_a_micro_batch(asked: Any, gigabytes: float, recomputed: bool) -> None:
    deep = model(llama(num_hidden_layers=12))
    limit = deep.micro_batch_limit(gigabytes * 1e9, asked, longest=100)
    assert limit == deep.most_tokens(gigabytes * 1e9, recomputed) > 0
    too_long = deep.most_tokens(gigabytes * 1e9, False) + 1
    again = deep.micro_batch_limit(gigabytes * 1e9, asked, too_long)
    assert again == (deep.most_tokens(gigabytes * 1e9, True) if asked == "auto" else limit)


def test_a_gpu_has_its_total_memory_less_the_allowance(tiny_model, source, tmp_path, monkeypatch) -> None:
    trainer, module, data = build(tiny_model, source, tmp_path / "run", activation_checkpointing="auto")
    module.trainer = trainer
    trainer.strategy.connect(module)
    assert module.micro_batch_limit(9) is None
    total = type("Properties", (), {"total_memory": 8e9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0), broadcast=int)
    module._trainer = SimpleNamespace(strategy=strategy, precision="32-true", datamodule=data, callbacks=[])
    expected = memory_model(module, "cuda")
    assert module.micro_batch_limit(9) == expected.most_tokens(8e9 - 1e9 - 0.05 * 8e9, False) > 10_000
    module.adapter, module.cleaning = saved_adapter(tiny_model, tmp_path / "start", rank=8), Cleaning()
    assert memory_model(module, "cuda").frozen_adapters == 2  # the reference and the cleaning reference
    module.optimizer = partial(Unknown, lr=0.1)
    with pytest.raises(InputError, match=r"micro_batch_tokens auto: .* Unknown .* Or give data.micro_batch_tok"):
        module.micro_batch_limit(9)


def test_an_architecture_that_cannot_be_simulated_is_recomputed_and_says_so(tiny_model, source, tmp_path, capsys):
    trainer, module, data = build(tiny_model, source, tmp_path / "run", optimizer=partial(Unknown, lr=0.1))
    module.activation_checkpointing = "auto"
    trainer.fit(module, data)
    assert module._recompute_above == 0 and "optimizer Unknown cannot be estimated" in capsys.readouterr().out


def test_the_verb(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", make_pairs(12))
    words = ["estimate", "configs/own_pairs.yaml", "--model.base", tiny_model, "--data.source", source]
    words += ["--out", str(tmp_path / "out.json"), "--card", "12", "--data.batch_size", "4", "--data.validation", "0"]
    run(words)
    found, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    card = found["cards"]["12"]
    assert found["steps"] == 3 and card["fits"] and "rank 16: 3 steps" in printed
    assert found["longest"] < card["tokens"] == found["step"] == found["micro_batch"] < card["most_kept"]
    lengths = ["--lengths", "10,20,30", "--rows", "9", "--model.lora.rank", "8"]
    run([*words, *lengths, "--data.micro_batch_tokens", "130", "--model.activation_checkpointing", "100"])
    assert "rank 8: 3 steps, 720 tokens" in capsys.readouterr().out
    by_lengths = json.loads((tmp_path / "out.json").read_text())
    assert by_lengths["adapters"] == found["adapters"] / 2 and by_lengths["longest"] == 60
    card = by_lengths["cards"]["12"]
    assert card["tokens"] == 130 and card["recomputed"]
    rate = by_lengths["tflop"]["recomputed"] / card["hours"] / 3600
    assert rate == pytest.approx(0.4 * 165.2)  # a card of so many GB without a name
    with pytest.raises(SystemExit, match="--lengths must be PROMPT,CHOSEN,REJECTED"):
        run([*words, "--lengths", "10,20"])
    moving = {"class_path": "lightning_modules.callbacks.RefreshReference", "init_args": {"role": "reference"}}
    run([*words, "--trainer.callbacks", json.dumps([moving])])
    more = json.loads((tmp_path / "out.json").read_text())["cards"]["12"]["peak"] - found["cards"]["12"]["peak"]
    assert more == pytest.approx(1.5 * found["adapters"])  # and its cast
    assert not Path("runs/own_pairs").exists()


@pytest.mark.slow
def test_the_tables_of_cards_are_what_the_verb_says() -> None:
    """Every config for a GPU; docs/memory.md has memory and hours, configs/own_pairs.yaml one of the numbers."""
    page, made = benchmark.PAGE.read_text("utf-8"), benchmark.cards()
    assert benchmark.remade(page, made) == page, "run python benchmarks/estimate.py cards"
    assert sorted(name for _, name, _ in benchmark.MARK.findall(page)) == sorted(made)
    tokens = made["own_pairs"].splitlines()[2].split(" | ")[1].split()[0]
    assert f"(12 GB, r 16: {tokens})" in Path("configs/own_pairs.yaml").read_text("utf-8")
    shipped = {path for path in Path("configs").rglob("*.yaml") if "micro_batch_tokens: auto" in path.read_text()}
    assert {f"configs/{name.split()[0]}.yaml" for name in benchmark.CONFIGS} == {str(path) for path in shipped}


def test_a_changed_estimate_is_found() -> None:
    page = benchmark.PAGE.read_text("utf-8")
    tables = {name: old for _, name, old in benchmark.MARK.findall(page)}
    assert benchmark.remade(page, tables) == page
    assert benchmark.remade(page, tables | {"own_pairs": tables["own_pairs"].replace("7,943", "7,944")}) != page
