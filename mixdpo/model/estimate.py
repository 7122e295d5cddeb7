"""Memory of a training step, predicted from the model's configuration: no weights, no data, no GPU.

A step of the real architecture runs on fake tensors by our own functions, with 2 and 4 layers and a few numbers of
tokens. Memory is linear in the layers, and in the tokens between and beyond these numbers. The storages that are alive
are added up, with what kernels take in passing. `allowance` stands for what is not simulated: CUDA's context,
workspaces of cuBLAS, fragmentation. int8 bases are refused.
"""

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public name for it
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from mixdpo.batches.rows import TokenRows, build_rows
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, adapter_layers, add_adapters, role
from mixdpo.model.forward import sequence_log_probs
from mixdpo.model.fused_layers import fuse
from mixdpo.model.live_bytes import PHASES, LiveBytes, kernels_of
from mixdpo.model.memory import linear_sizes, recompute
from mixdpo.model.optimizer import choose_kernels

NAMES = ("tokens", "weights", "adapters", "gradients", "moments", "kept", *PHASES)


DEPTHS = (2, 4)
DOCUMENTS = {False: (1, 2), True: (1, 2, 5)}
"""In the simulated micro-batches, by whether activations are recomputed. The peak of a small recomputed micro-batch is
not in its activations: memory is linear in the tokens from 4 documents on, and from the first if they are kept."""


WORTHWHILE = 2048
"""Tokens of a micro-batch from which on `auto` does not recompute, as that adds a third to a half of the operations."""


_simulated: dict[tuple[str, Any, bool], np.ndarray] = {}  # of the process: what decides the memory -> `_simulate`


def allowance(card: float) -> float:
    """Bytes of a card of `card` bytes that training cannot have: 1 GB for CUDA's context, 5 % for fragmentation."""
    return 1e9 + 0.05 * card


@dataclass(frozen=True)
class MemoryModel:
    """Memory of a step in bytes, by the tokens of its heaviest micro-batch. What is asked for is simulated once in a
    process. A step is taken to have several micro-batches, so gradients are held while later ones run.

    Args:
        optimizer: makes the optimizer from its parameters.
        loading: as for `load_base`: `quantization`, `dtype` and `attention`; and `fused_layers`, the parts that `fuse`
            gets.
        device: "cuda" or "cpu": whose kernels, allocator and optimizer defaults are simulated.
        precision: of Lightning's Trainer.
        with_reference: a reference runs before the policy.
        frozen_adapters: number of adapters beside the policy, such as a reference or earlier stages.
        length: longest prompt + response in tokens. It matters only to sdpa and eager.

    Raises:
        InputError: at any question, if the architecture, its layers or the optimizer cannot be simulated.
    """

    config: PretrainedConfig
    lora: Lora
    optimizer: Callable[..., Any]
    loading: Mapping[str, Any]
    device: str = "cuda"
    precision: str = "bf16-mixed"
    with_reference: bool = True
    frozen_adapters: int = 0
    length: int = 1024

    def at(self, tokens: float, recomputed: bool) -> dict[str, float]:
        """The peak of each of `PHASES`; `weights`, the policy's `adapters` and `gradients`, the optimizer's `moments`
        on the device; `kept`, what is kept until backward."""
        if (key := (repr(self), self.optimizer, recomputed)) not in _simulated:
            _simulated[key] = _simulate(self, recomputed)
        known = _simulated[key]
        piece = min(max(bisect_right(known[:, 0], tokens), 1), len(known) - 1)
        low, high = known[piece - 1 : piece + 1]
        line = low + (high - low) * (tokens - low[0]) / (high[0] - low[0])
        of_each = 1.5 if "mixed" in self.precision and "lora" in self.loading.get("fused_layers", ()) else 1  # a cast
        line[-len(PHASES) :] += line[NAMES.index("adapters")] * self.frozen_adapters * of_each
        return dict(zip(NAMES, line.tolist(), strict=True))

    def peak(self, tokens: float, recomputed: bool) -> tuple[float, str]:
        """The peak, and the phase that has it."""
        return max((size, name) for name, size in self.at(tokens, recomputed).items() if name in PHASES)

    def most_tokens(self, memory: float, recomputed: bool) -> int:
        """Most tokens of a micro-batch whose step fits into `memory` bytes; 0 if none does."""
        return bisect_left(range(1, 2**40), True, key=lambda tokens: self.peak(tokens, recomputed)[0] > memory)

    def memory_of(self, device: torch.device) -> float:
        """Bytes that training can have: of a GPU all but the allowance, whoever uses the GPU now; of a computer's free
        memory three quarters, as others need some, beside the model, which is taken to be loaded."""
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            return total - allowance(total)
        return 0.75 * psutil.virtual_memory().available + self.at(0, False)["loaded"]

    def micro_batch_limit(self, memory: float, checkpointing: bool | int | str, longest: int) -> int:
        """Most tokens that a micro-batch may have in `memory` bytes under this `model.activation_checkpointing`. Under
        auto activations are recomputed if fewer than `WORTHWHILE` tokens, or than `longest`, fit otherwise."""
        if checkpointing is True:
            return self.most_tokens(memory, True)
        kept, needed = self.most_tokens(memory, False), max(WORTHWHILE, longest)
        enough = kept >= needed if checkpointing == "auto" else checkpointing is False or kept < int(checkpointing)
        return kept if enough else self.most_tokens(memory, True)

    def linear_sizes(self) -> tuple[int, int]:
        """`memory.linear_sizes` of the whole model."""
        with torch.device("meta"):
            return linear_sizes(_skeleton(self, self.config.get_text_config().num_hidden_layers))


def _skeleton(of: MemoryModel, layers: int) -> Any:
    """The architecture with this number of layers, as `load_base` makes it, but for values and quantisation."""
    config = copy.deepcopy(of.config)
    text, config.quantization_config = config.get_text_config(), None
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    auto = "lower_right" if of.device == "cpu" or of.loading["dtype"] == "bfloat16" else "by_segment"
    attention = {"auto": auto, "varlen": "lower_right"}.get(of.loading["attention"], of.loading["attention"])
    options = {"dtype": getattr(torch, of.loading["dtype"]), "attn_implementation": attention}
    with no_init_weights():  # some are drawn until they fit, and a fake number never does
        model = AutoModelForCausalLM.from_config(config, **options, trust_remote_code=False)
    model.tie_weights()  # is part of the initialisation
    return model


def _quantise(of: MemoryModel, model: Any) -> None:
    """Make every linear layer but the head bitsandbytes' of 4 bits, with tensors of the sizes that it holds."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    if of.loading["quantization"] != "nf4":
        raise InputError("the memory of an int8 base cannot be estimated: give model.quantization nf4 or none")
    model.is_loaded_in_4bit, head = True, model.get_output_embeddings()  # the flag is for PEFT
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not head:
            wide = layer.weight
            absmax, packed = (torch.empty(-(-wide.numel() // size), dtype=torch.uint8) for size in (64, 2))
            second = QuantState(torch.empty(-(-len(absmax) // 256)), None, torch.empty(256), 256, None, torch.float32)
            first = QuantState(absmax, wide.shape, torch.empty(16), 64, "nf4", wide.dtype, torch.empty(()), second)
            layer.__class__ = Linear4bit  # a new one would make a parameter of a kind that a fake tensor cannot become
            layer.weight = nn.Parameter(packed[:, None], requires_grad=False)
            options = {"quant_type": "nf4", "quant_storage": torch.uint8, "quant_state": first}
            vars(layer.weight).update(options, compress_statistics=True, bnb_quantized=True)
            vars(layer).update(compute_dtype=wide.dtype, compute_type_is_set=True, support_avx512bf16_for_cpu=False)


def _simulate(of: MemoryModel, recomputed: bool) -> np.ndarray:
    """(micro-batches, `NAMES`), the values of `MemoryModel.at` at the simulated numbers of tokens."""
    layers, kind = of.config.get_text_config().num_hidden_layers, of.config.model_type
    try:
        if layers <= DEPTHS[1]:
            return _steps(of, layers, recomputed)
        low, high = (_steps(of, depth, recomputed) for depth in DEPTHS)
        with torch.device("meta"):
            few, more, whole = (_skeleton(of, depth).num_parameters() for depth in (*DEPTHS, layers))
        share = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    except InputError:
        raise
    except Exception as error:  # of any architecture's code on fake tensors: an open list
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"the memory of {kind} models cannot be estimated ({reason})") from error
    if abs(few + (more - few) * share - whole) > 0.001 * whole:
        raise InputError(f"the memory of {kind} models cannot be estimated, as their layers are not alike")
    return low + (high - low) * share


def _steps(of: MemoryModel, layers: int, recomputed: bool) -> np.ndarray:
    """As `_simulate`, of a model with so many layers."""
    # pairs behind a prompt of a quarter of the length; in one row where attention can tell them apart
    prompt, response = ([1] * (of.length * share // 4) for share in (1, 3))
    pair = {"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": response}
    pack = 2**60 * (of.loading["attention"] not in ("sdpa", "eager"))
    micro_batches = [build_rows([pair] * n, [True] * n, [True] * n, pack=pack) for n in DOCUMENTS[recomputed]]
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(of.device == "cuda")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        with fake, live:
            model = _skeleton(of, layers)
            if of.loading["quantization"] != "none":
                _quantise(of, model)
            model.requires_grad_(False).train()
            sizes = [live.now]
            model = _with_adapters(of, model)
        sizes.append(live.now)
        fuse(model, of.loading.get("fused_layers", ()))  # checks layers by numbers, which fake tensors have not
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        recompute(model, recomputed)
        with kernels_of(of.device), fake, live:
            learning = [p for p in model.parameters() if p.requires_grad]
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter)
            sizes.append(live.now)
            optimizer = _optimizer(of, learning)
            sizes.append(live.now)
            kept = [_step(of, model, optimizer, rows, live) for rows in micro_batches]
    fixed = np.diff([0, *sizes])
    return np.array([[rows.tokens, *fixed, *each] for rows, each in zip(micro_batches, kept, strict=True)], dtype=float)


def _with_adapters(of: MemoryModel, model: Any) -> Any:
    """The model with the policy's adapter, in the dtypes that a run has."""
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):  # a fake parameter cannot become another one
        model = add_adapters(model, of.lora)
    wide = torch.float64 if of.loading["dtype"] == "float64" else torch.float32
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(of.precision, wide)
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = "mixed" not in of.precision
        for matrix in (layer.lora_A["policy"], layer.lora_B["policy"]):
            matrix.weight = nn.Parameter(matrix.weight.detach().to(dtype))
    return model


def _optimizer(of: MemoryModel, learning: list[Tensor]) -> Any:
    """The training's optimizer, with the state that it has after a first step."""
    optimizer = of.optimizer(learning)
    if hasattr(optimizer, "init_state"):  # of bitsandbytes, whose steps are in place
        paged, optimizer.is_paged = optimizer.is_paged, False  # a page cannot be fake
        for number, parameter in enumerate(learning):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
            if paged and of.device == "cuda" and parameter.numel() >= 1e5:  # then not on the card
                optimizer.state[parameter].update(state1=None, state2=None)
        optimizer.step = lambda: None
    elif not type(optimizer).__module__.startswith("torch.optim."):
        fault = f"the memory of the optimizer {type(optimizer).__name__} cannot be estimated"
        raise InputError(f"{fault}: give one of torch.optim or bitsandbytes.optim")
    choose_kernels(optimizer, torch.device(of.device), of.precision)
    for group in optimizer.param_groups:
        if of.device == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice on CUDA
    optimizer.step()
    return optimizer


def _step(of: MemoryModel, model: Any, optimizer: Any, rows: TokenRows, live: LiveBytes) -> list[int]:
    """A step whose last micro-batch is `rows`: the bytes that are kept until backward, and the peaks."""
    live.start("loaded")
    before, half = live.now, torch.bfloat16 if of.precision == "bf16-mixed" else torch.float16
    with torch.autocast("cpu", half, enabled="mixed" in of.precision, cache_enabled=False):
        live.start("reference")
        with torch.no_grad(), role(model, "reference"):
            reference = sequence_log_probs(model, rows).sums if of.with_reference else 0
        live.start("forward")
        loss = (sequence_log_probs(model, rows).sums - reference).sum()
    kept = live.now - before
    live.start("backward")
    loss.backward()
    del loss, reference
    live.start("optimizer")
    optimizer.step()
    return [kept, *(live.peaks[phase] for phase in PHASES)]
