"""Fused layers against those of PEFT and transformers: numbers, gradients, roles, casts, and what backward keeps."""

import copy
import gc
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import adapter_weights, fit, write_tiny
from test_scoring import SAMPLES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixdpo.batches.rows import Piece, sample_rows, token_rows
from mixdpo.model.adapters import Lora, adapter_layers, adapter_state, add_adapters, add_reference, role, stack_policy
from mixdpo.model.forward import predicting_states, row_log_probs
from mixdpo.model.fused_layers import _CASTS, _SwiGLU, fuse
from mixdpo.model.loading import load_base
from mixdpo.token_cleaning.scoring import fit_adapter

ALL = ("lora", "norm", "swiglu")
FULL = {"quantization": "none", "dtype": "float32"}
BF16: dict[str, Any] = {"dtype": "bfloat16", "trainer": {"precision": "bf16-mixed"}}


def made(base: str, parts: Any = (), dtype: str = "float64", dropout: float = 0.0, **options: Any) -> Any:
    """A model in train mode whose policy is drawn with seed 1, fused first."""
    lora = Lora(rank=4, alpha=8, dropout=dropout)
    model = add_adapters(load_base(base, dtype=dtype, **{"quantization": "none", **options}), lora).train()
    fuse(model, parts)
    if dtype == "float64":
        model.double()
    draw(model, 1)
    return model


def draw(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter_state(model).values():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.1)


def losses(model: Any) -> Tensor:
    torch.manual_seed(0)  # dropout
    return row_log_probs(model, sample_rows(SAMPLES))


def gradients(model: Any) -> Tensor:
    model.zero_grad()
    losses(model).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("parts", [("lora",), ("swiglu",), ("lora", "swiglu"), ("norm",)], ids=",".join)
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # qwen3 has norms of the heads as well
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_numbers_are_those_of_peft_and_transformers(name: str, parts: Any, dropout: float, tmp_path: Path) -> None:
    base = str(write_tiny(name, tmp_path))
    own, fused = (made(base, each, dropout=dropout) for each in ((), parts))
    for layer in (*adapter_layers(own), *adapter_layers(fused)):
        layer.scaling["policy"] = 1.5  # not alpha / rank: as of an adapter saved with rsLoRA
    assert [*own.state_dict()] == [*fused.state_dict()] and repr(own) == repr(fused)
    atol = 1e-6 if "norm" in parts else 1e-12  # transformers' norms round to fp32 even in double precision
    torch.testing.assert_close(losses(fused), losses(own), rtol=0, atol=atol)
    expected = gradients(own)
    assert expected.norm() > 0 and (gradients(fused) - expected).norm() < atol * expected.norm()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_layers(quantization: str, tiny_model: str) -> None:
    own, fused = (made(tiny_model, each, "float32", quantization=quantization) for each in ((), ALL))
    torch.testing.assert_close(losses(fused), losses(own), rtol=0, atol=1e-5)
    expected = gradients(own)
    assert expected.norm() > 0 and (gradients(fused) - expected).norm() < 1e-5 * expected.norm()


def test_roles_and_stages_added_later(tiny_model: str) -> None:
    """A reference and two stages are added after the layers were fused; the gradient is the policy's alone."""
    own, fused = (made(tiny_model, each) for each in ((), ("lora", "swiglu")))
    for model in (own, fused):
        add_reference(model.double(), "reference")
        stack_policy(model)
        stack_policy(model)
        draw(model.double(), 2)
    seen = []
    for name in ("policy", "reference", "base"):
        with role(own, name), role(fused, name):
            seen.append(losses(own).detach())
            torch.testing.assert_close(losses(fused).detach(), seen[-1], rtol=0, atol=1e-12)
    assert min((seen[i] - seen[i - 1]).abs().max() for i in range(3)) > 0.01
    torch.testing.assert_close(gradients(fused), gradients(own), rtol=1e-10, atol=1e-12)
    assert not [n for n, p in fused.named_parameters() if p.grad is not None and ".policy." not in n]


def test_half_precision_is_off_by_no_more_than_before(tiny_model: str) -> None:
    """Against double precision, under autocast with an adapter in fp32, and with a base of fp32 as well."""
    exact = made(tiny_model)
    for dtype in ("bfloat16", "float32"):
        errors = []
        for parts in ((), ALL):
            with torch.autocast("cpu", torch.bfloat16):
                model = made(tiny_model, parts, dtype)
                found = losses(model).double(), gradients(model)
            assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            both = zip(found, (losses(exact), gradients(exact)), strict=True)
            errors.append([float((a - b).detach().norm()) for a, b in both])
        assert all(0 < mine < 1.3 * before for before, mine in zip(*errors, strict=True)), errors
    own, fused = (made(tiny_model, each, "bfloat16") for each in ((), ("lora",)))  # a wider adapter, and no autocast
    assert torch.equal(losses(fused), losses(own))


class Casts(TorchDispatchMode):
    """Counts how often an adapter of rank 4 in fp32 is cast to bf16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_cast = func.overloadpacket.__name__ == "_to_copy" and result.dtype == torch.bfloat16
        self.count += is_cast and args[0].dtype == torch.float32 and args[0].ndim == 2 and 4 in args[0].shape
        return result


CHANGES: dict[str, Any] = {
    "step": lambda of: torch.optim.AdamW([p for p in of.parameters() if p.requires_grad], lr=0.1).step(),
    "copy": lambda model: draw(model, 2),
    "checkpoint": lambda of: of.load_state_dict({n: 2 * w for n, w in adapter_state(of).items()}, strict=False),
}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_casts_are_made_once_until_a_weight_changes(change: str, recomputed: bool, tiny_model: str) -> None:
    model = made(tiny_model, ALL, "bfloat16")
    if recomputed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    seen = torch.zeros(())
    for without_gradient in (torch.inference_mode, torch.no_grad):
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            with without_gradient():
                validated = losses(model)
            assert torch.equal(losses(model), validated)  # training reads what a validation has cast
            for _ in range(2):  # micro-batches
                losses(model).sum().backward()
            assert all(p.grad is not None for name, p in model.named_parameters() if ".policy." in name)
            assert casts.count == 2 * 2 * 7  # A and B of seven layers in two blocks
            assert torch.equal(losses(copy.deepcopy(model)), validated) and (validated - seen).abs().max() > 0.01
        CHANGES[change](model)
        model.zero_grad()
        seen = validated


class ByPointer(torch.optim.SGD):
    """As kernels of bitsandbytes: writes without autograd's knowledge."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for weight in self.param_groups[0]["params"]:
            weight.data.add_(weight.grad, alpha=-self.param_groups[0]["lr"])
        return loss


class Start(L.Callback):
    """Writes the start of the run once `auto` has computed with another one."""

    def __init__(self, by_pointer: bool) -> None:
        self.by_pointer = by_pointer

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for weight in adapter_state(pl_module.model).values():  # a detached tensor, which shares the weight's version
            (weight.data if self.by_pointer else weight).add_(0.01)


def test_a_run_hears_of_weights_written_by_pointer(tiny_model: str, source: str, tmp_path: Path) -> None:
    kinds = (torch.optim.SGD, ByPointer, partial(torch.optim.AdamW, fused=True), torch.optim.AdamW)
    runs = []
    for number, (optimizer, parts) in enumerate([*((kind, ALL) for kind in kinds), (torch.optim.SGD, ())]):
        options = {**BF16, "trainer": BF16["trainer"] | {"callbacks": [Start(number != 0)]}}
        options |= {"optimizer": optimizer, "fused_layers": parts, "lr": 1.0 if number in (0, 1, 4) else 0.02}
        module = fit(tiny_model, source, tmp_path / str(number), **options)
        runs.append(torch.cat([weight.flatten() for weight in adapter_weights(module).values()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    for one, other in ((2, 3), (0, 4)):
        assert (runs[one] - runs[other]).norm() < 0.02 * runs[other].norm()


def test_a_frozen_adapter_that_was_asked_can_be_fitted(tiny_model: str) -> None:
    model = made(tiny_model, ALL, "bfloat16")
    add_reference(model, "cleaning_reference")
    with torch.autocast("cpu", torch.bfloat16):
        with role(model, "cleaning_reference"):
            before = losses(model)
        sample = {"input_ids": [2, 4, 7, 8, 9, 3], "spans": [3, 6], "response_weights": [1.0]}
        fit_adapter(model, "cleaning_reference", [sample] * 4, learning_rate=0.05, batch_size=2)
        with role(model, "cleaning_reference"):
            assert (losses(model) - before).abs().max() > 0.01


class OnePlus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


def test_what_looks_alike_is_left_alone(tmp_path: Path) -> None:
    for module in (OnePlus(), Clamped(), nn.LayerNorm(8, bias=False), nn.Linear(4, 4, bias=False), nn.Embedding(4, 4)):
        assert fuse(module, ALL).endswith("this model has no layer for lora, norm, swiglu\n")
        assert "forward" not in vars(module)
    gemma = add_adapters(load_base(str(write_tiny("gemma2", tmp_path)), attention="eager", **FULL), Lora())
    assert fuse(gemma, ALL) == "model.fused_layers: this model has no layer for norm, swiglu\n"
    assert fuse(gemma, ()) == ""


def test_a_model_can_be_copied_and_pickled(tiny_model: str) -> None:
    model = made(tiny_model, ALL, "float32")
    expected = losses(model).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_base_model()))):
        draw(model, 3)  # of which the copy knows nothing
        assert torch.equal(losses(other), expected) and not torch.equal(losses(model), expected)
        draw(model, 1)


def test_swiglu_alone() -> None:
    sizes = (2, 3, 5), (2, 3, 5), (2, 5)
    gate, up, a = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes)
    product, h = _SwiGLU.apply(gate, up, a)
    assert torch.equal(product, nn.functional.silu(gate) * up) and torch.equal(h, product @ a.T)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up, a))
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))


def kept(model: Any, tokens: int = 64) -> float:
    """Bytes a token that wait for backward, but for weights."""
    storages, known = {}, {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    known |= {cast.untyped_storage().data_ptr() for _, cast in _CASTS.values()}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: storages.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage()}) or tensor,
        lambda tensor: tensor,
    )
    with hooks:
        predicting_states(model, token_rows([[Piece([5] * tokens, 0, (1, tokens))]], 1))
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known) / tokens


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.75), ("bfloat16", 0.7)])
def test_a_quarter_less_is_kept(dtype: str, most: float, tmp_path: Path) -> None:
    """In a block as wide as those of SmolLM2-135M."""
    gc.collect()  # casts of simulated models, which have no address
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    base = str(write_tiny("llama", tmp_path, **shape, head_dim=64, num_hidden_layers=1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        found = {parts: kept(made(base, parts, dtype)) for parts in ((), *((part,) for part in ALL), ALL)}
    assert found[ALL] < most * found[()] and max(found.values()) == found[()]
