"""What a GPU would show, on a CPU: `meta` in CUDA's place as default device, sums that have no order, its errors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter_weights, build, build_sft, fit, make_pairs, make_samples, same, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies.strategy import Strategy
from test_margins_file import predict
from test_scoring import saved_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from mixdpo.batches.rows import build_rows
from mixdpo.batches.steps import Slices
from mixdpo.model.adapters import Lora, add_adapters, add_reference, stack_policy
from mixdpo.model.export import generation_dtype, merged_copy
from mixdpo.model.fused_head import run_sums
from mixdpo.model.loading import load_base
from mixdpo.model.memory import is_out_of_memory
from mixdpo.routing.route import Routing
from mixdpo.signals.margins_file import read_margins
from mixdpo.signals.signals import CHES, ImplicitReward, PolicyLogProb
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.scorers import ExcessLoss
from mixdpo.token_cleaning.scoring import fit_adapter
from mixdpo.token_cleaning.selection import Selection

DROPOUT: dict[str, Any] = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "optimizer": torch.optim.AdamW, "lr": 1e-2}
MIXED = {"routing": Routing(hard_fraction=0.5, order="interleaved"), "validation": 0.3}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", make_pairs(20))


@pytest.fixture
def samples(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "samples.jsonl", make_samples(24))


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning makes the run's device the default one around `configure_model`: here one that holds no numbers."""
    original = Strategy.tensor_init_context

    @contextmanager
    def on_meta(self: Strategy, empty_init: bool | None = None) -> Iterator[None]:
        with original(self, empty_init), torch.device("meta"):
            yield

    yield lambda: monkeypatch.setattr(Strategy, "tensor_init_context", on_meta)


@pytest.mark.parametrize("kind", ["pairs", "samples"])
def test_the_default_device_changes_nothing(kind, tiny_model, pairs, samples, other_device, tmp_path):
    """Rows of the probes are made on the CPU, adapters drawn by its generator; dropout is on, so a draw would show."""
    make, source = (build, pairs) if kind == "pairs" else (build_sft, samples)
    given = saved_adapter(tiny_model, tmp_path / "given", rank=4)  # a second adapter draws initial weights as well
    cleaning = Cleaning(ExcessLoss(), Selection(0.6), reference=given)
    options = {"cleaning": cleaning, "make": make, "trainer": {"max_steps": 2}} | DROPOUT
    expected = fit(tiny_model, source, tmp_path / "cpu", **options)
    other_device()
    assert same(expected, fit(tiny_model, source, tmp_path / "other", **options))


def test_a_fresh_adapter_is_drawn_by_the_cpu_wherever_it_lives(tiny_model, monkeypatch):
    """A tensor on `meta` draws nothing from the CPU's generator itself."""
    monkeypatch.setattr("mixdpo.model.adapters.copy_adapter", lambda *_: None)  # there is nothing to copy
    states = []
    for device in ("cpu", "meta"):
        model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=2)).to(device)
        torch.manual_seed(1)
        stack_policy(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_only_what_lies_on_the_cpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [4]}
    rows, pinned = build_rows([pair], [True], [True]), []
    tensors = {name: part for name, part in vars(rows).items() if isinstance(part, torch.Tensor)}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.device.type) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    rows.to(torch.device("cuda"))
    replace(rows, **{name: part.new_empty(1, device="meta") for name, part in tensors.items()}).to(torch.device("cuda"))
    assert len(tensors) == 5 and pinned == ["cpu"] * 7  # with the index of attention, and in both once more


class Ordered(TorchDispatchMode):
    """Fails on what adds floating-point numbers in no fixed order on CUDA."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__.strip("_")
        given = [value for value in args if isinstance(value, torch.Tensor)]
        floating = any(value.is_floating_point() for value in given[:1])
        adds = name in ("index_add", "scatter_add", "cumsum", "embedding_dense_backward", "segment_reduce")
        if name in ("index_put", "index_put_impl") and bool([*args[3:4], kwargs.get("accumulate")][0]):
            adds |= any(len(index.unique()) < len(index) for index in args[1] if index is not None)
        adds |= name == "scatter_reduce" and args[4] in ("sum", "mean", "prod")
        assert not (adds and floating), f"{func} of {[tuple(value.shape) for value in given]}"
        Ordered.calls += 1
        return func(*args, **kwargs)


ONLINE = Cleaning(ExcessLoss("policy", "base"), Selection(0.6, scope="batch"))
RUNS: dict[str, dict[str, Any]] = {
    "pairs, mixed, packed": {"data": MIXED, "trainer": {"accumulate_grad_batches": 2}},
    "both routes, recomputed": {"data": MIXED | {"pack": 0, "share_prompt": False}, "activation_checkpointing": True},
    "hard pairs cleaned": {"data": MIXED, "cleaning": Cleaning(selection=Selection(0.6), reference_lr=0.01)},
    "samples, weighed in the step": {"make": build_sft, "data": {"validation": 0.3}, "cleaning": ONLINE},
    "samples in slices": {"make": build_sft, "data": {"slices": Slices(2)}, "stage_start": "fresh_adapter"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_adds_in_a_fixed_order(name: str, tiny_model: str, pairs: str, samples: str, tmp_path: Path) -> None:
    """Steps and validations: a first loss of exactly ln 2, and a continued run that is the same, need it."""
    options = {"lora": Lora(rank=4, alpha=8), **RUNS[name]}
    before = Ordered.calls
    with Ordered():
        fit(tiny_model, samples if "make" in options else pairs, tmp_path / "run", **options)
    assert Ordered.calls > before + 1000


@pytest.mark.parametrize("signal", [CHES(), CHES(normalised=True), PolicyLogProb(), ImplicitReward()], ids=repr)
def test_a_signal_adds_in_a_fixed_order(signal: Any, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    given = saved_adapter(tiny_model, tmp_path / "given", rank=4) if signal.needs == "adapter" else None
    with Ordered():
        found = read_margins(predict(tiny_model, pairs, tmp_path / "m", signal, adapter=given)).pairs
    assert len(found) == 20 and len(set(found.values())) == 20


runs = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@given(runs, st.integers(0, 3), st.randoms(use_true_random=False))
def test_sums_of_runs_against_exact_ones(sizes: list[int], missing: int, draw: Any) -> None:
    """In the order of the runs, 0 where there is none; `math.fsum` is exact."""
    numbers = list(range(len(sizes) + missing))
    draw.shuffle(numbers)
    given_runs = tuple(zip(numbers, sizes, strict=False))
    values = [draw.uniform(-1e4, 1e4) for _ in range(sum(sizes))]
    tensor = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = run_sums(tensor, given_runs, len(numbers))
    assert run_sums(torch.tensor([1e8, 1.0, -1e8]), ((0, 3),), 1).tolist() == [1.0]  # wide: what CHES is made of
    expected, weights, start = [0.0] * len(numbers), [0.0] * len(values), 0
    for number, size in given_runs:
        expected[number] = math.fsum(values[start : start + size])
        weights[start : start + size] = [number + 1.0] * size
        start += size
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    (found * torch.arange(1.0, len(numbers) + 1)).sum().backward()
    assert tensor.grad.tolist() == weights


def test_the_order_of_the_rows_changes_no_bit(tiny_model: str, tmp_path: Path) -> None:
    """Many pairs of one length; steps cut in two; hard ones cleaned against a reference fitted to the easy ones."""
    rows = make_pairs(24)
    for row in rows:
        row |= {side: " ".join(str(row[side]).split()[:2]) for side in ("chosen", "rejected")}
    cleaning = Cleaning(selection=Selection(0.6), reference_lr=0.01)
    trainer = {"accumulate_grad_batches": 2}
    data = {"routing": Routing(hard_fraction=0.5, order="interleaved"), "batch_size": 6}
    found, shuffled = [], [rows[i] for i in np.random.default_rng(0).permutation(24)]
    for name, order in (("as they lie", rows), ("shuffled", shuffled)):
        source = write_pairs(tmp_path / f"{name}.jsonl", order)
        options = {"trainer": trainer, "data": data, "cleaning": cleaning} | DROPOUT
        found.append(fit(tiny_model, source, tmp_path / name, **options))
    assert same(*found)


def test_a_reference_is_fitted_the_same_where_casts_are_kept(tiny_model: str) -> None:
    sample = {"input_ids": [2, 4, 7, 8, 9, 3], "spans": [3, 6], "response_weights": [1.0]}
    found = []
    for keeps in (False, True):
        torch.manual_seed(0)
        model = add_adapters(load_base(tiny_model, quantization="none", dtype="bfloat16"), Lora(rank=2))
        add_reference(model, "cleaning_reference")
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            fit_adapter(model, "cleaning_reference", [sample] * 6, learning_rate=0.05, batch_size=1)
            assert torch.is_autocast_cache_enabled() == keeps
        named = {name: value.clone() for name, value in model.named_parameters()}
        found.append({name: value for name, value in named.items() if ".cleaning_reference." in name})
    assert any(value.any() for name, value in found[0].items() if "lora_B" in name)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_how_a_device_says_that_it_is_out_of_memory() -> None:
    for error, expected in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
    ):
        assert is_out_of_memory(error) == expected, error


def test_what_generates(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a copy in the head's dtype where 1.1 times its bytes are free. fp32 (4 bytes a parameter) on a CPU."""
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="bfloat16"), Lora(rank=2))
    assert generation_dtype(model, None) == generation_dtype(model, True) == torch.float32
    assert generation_dtype(model, False) is None
    need = 1.1 * 2 * sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)

    class OnGpu:
        """The head of a model on a GPU."""

        device, dtype = torch.device("cuda"), torch.bfloat16

        def element_size(self) -> int:
            return 2

    head = type("Layer", (), {"weight": OnGpu()})
    monkeypatch.setattr(model.get_base_model(), "get_output_embeddings", lambda: head)
    for free, expected in ((need * 1.2, torch.bfloat16), (need * 0.8, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * need))
        assert generation_dtype(model, None) == expected
        assert generation_dtype(model, True) == torch.float32


class NoDraws(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func.overloadpacket.__name__ in ("normal_", "uniform_", "randn", "rand", "random_", "trunc_normal_")
        assert not drawn or args[0].device.type == "meta", f"{func} {args[0].shape}"
        return func(*args, **(kwargs or {}))


def test_a_merged_copy_draws_no_model_first(tiny_model: str) -> None:
    """Of 8B that would take 32 GB of the host's memory."""
    model = add_adapters(load_base(tiny_model, quantization="none", dtype="float32"), Lora(rank=2))
    with NoDraws():
        copied = merged_copy(model, dtype=torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in [*copied.parameters(), *copied.buffers()])
    shared = merged_copy(model).get_input_embeddings().weight  # not adapted, and in fp32 already
    assert shared.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_float16_with_a_gradient_scaler(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """`16-mixed`, which Lightning turns into bf16-mixed on a CPU: the adapter stays in fp32 and learns as in fp32."""
    found = {}
    for dtype in ("float16", "float32"):
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if dtype == "float16" else []
        options = {"trainer": {"plugins": plugins, "max_steps": 3, "gradient_clip_val": 1.0}, "dtype": dtype, "lr": 0.5}
        found[dtype] = adapter_weights(fit(tiny_model, pairs, tmp_path / dtype, **options))
    half, full = (torch.cat([v.flatten() for n, v in each.items() if "lora_B" in n]) for each in found.values())
    assert half.dtype == torch.float32 and full.norm() > 0
    assert 0 < (half - full).norm() < 0.02 * full.norm()


def test_a_run_that_goes_on_elsewhere_says_what_is_not_exact(tiny_model, pairs, tmp_path, monkeypatch):
    trainer = {"max_steps": 4}
    fit(tiny_model, pairs, tmp_path / "begun", trainer={"max_steps": 2}, schedule_steps=4)
    checkpoint = str(tmp_path / "begun/checkpoints/last.ckpt")
    fit(tiny_model, pairs, tmp_path / "here", trainer=trainer, schedule_steps=4, ckpt_path=checkpoint)
    monkeypatch.setattr("lightning_modules.callbacks.checkpoint._processor", lambda _: "NVIDIA GeForce RTX 4090")
    with pytest.warns(UserWarning, match=r"computed on cpu with \w+, and the run continues on NVIDIA GeForce RTX 4090"):
        fit(tiny_model, pairs, tmp_path / "there", trainer=trainer, schedule_steps=4, ckpt_path=checkpoint)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pairs", "samples"])
def test_a_continued_run_is_exact_on_a_gpu(kind, tiny_model, pairs, samples, tmp_path):
    """With deterministic kernels, which attention's backward needs; all else adds in a fixed order anyway."""
    make, source = (build, pairs) if kind == "pairs" else (build_sft, samples)
    trainer = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "deterministic": True, "max_steps": 4}
    options = {"make": make, "schedule_steps": 4, "dtype": "bfloat16"} | DROPOUT
    try:
        whole = fit(tiny_model, source, tmp_path / "whole", trainer=trainer, **options)
        fit(tiny_model, source, tmp_path / "half", trainer=trainer | {"max_steps": 2}, **options)
        checkpoint = str(tmp_path / "half/checkpoints/last.ckpt")
        rest = fit(tiny_model, source, tmp_path / "rest", trainer=trainer, ckpt_path=checkpoint, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(whole, rest)
