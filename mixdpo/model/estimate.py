"""Memory of a training step, predicted from the model's configuration: no weights, no data, no GPU.

One step of the real architecture runs on fake tensors by our own functions, with 2 and with 4 layers and with two
numbers of documents. Memory is linear in both, so four such steps give the whole model and any micro-batch. What is
added up is the storages that are alive, and what CUDA's and bitsandbytes' kernels take in passing. Not in it: the
context of CUDA, workspaces of cuBLAS, fragmentation (`allowance`), and the outliers of int8 (a few columns).
"""

import copy
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from mixdpo.batches.rows import TokenRows, build_rows
from mixdpo.errors import InputError
from mixdpo.model.adapters import Lora, add_adapters, adapter_layers, role
from mixdpo.model.attention import BY_SEGMENT
from mixdpo.model.forward import sequence_log_probs
from mixdpo.model.loading import Attention, Dtype, Quantization, check_narrow
from mixdpo.model.memory import linear_sizes, recompute

PHASES = ("loaded", "reference", "forward", "backward", "optimizer")
DOCUMENTS = (2, 4)  # in the simulated micro-batches
DEPTHS = (2, 4)
CONTEXT, FRAGMENTED = 1.0e9, 0.05  # bytes, share of the card


def allowance(card: float) -> float:
    """Bytes of a card of `card` bytes that training cannot have: CUDA's context (1 GB), and 5 % for fragmentation."""
    return CONTEXT + FRAGMENTED * card


@dataclass(frozen=True)
class Training:
    """All that decides the memory of a step.

    Args:
        optimizer: makes the optimizer from its parameters.
        device: "cuda" or "cpu": whose kernels, allocator and optimizer defaults are simulated.
        precision: of Lightning's Trainer.
        with_reference: a reference runs before the policy.
        accumulates: a step has several micro-batches, so that gradients are held while later ones run.
        frozen_adapters: adapters beside the policy, such as a reference or earlier stages.
        length: longest prompt + response in tokens. It matters only to attention other than by_segment.
    """

    config: PretrainedConfig
    lora: Lora
    optimizer: Callable[..., torch.optim.Optimizer]
    device: Literal["cuda", "cpu"] = "cuda"
    quantization: Quantization = "nf4"
    dtype: Dtype = "bfloat16"
    attention: Attention = BY_SEGMENT
    wide_weights: bool = False
    precision: str = "bf16-mixed"
    with_reference: bool = True
    accumulates: bool = True
    frozen_adapters: int = 0
    length: int = 1024

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def key(self) -> str:
        """Equal for trainings that take the same memory."""
        optimizer = self.optimizer([nn.Parameter(torch.zeros(1))])
        rest = {name: value for name, value in vars(self).items() if name not in ("config", "optimizer")}
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__} {optimizer.defaults}"
        return f"{self.config.to_json_string(use_diff=False)} {kind} {rest}"


@dataclass(frozen=True)
class Simulated:
    """Bytes at `tokens` tokens, one number for each of two micro-batches; `sizes` of `linear_sizes`."""

    tokens: tuple[int, int]
    phases: dict[str, tuple[float, float]]
    kept: tuple[float, float]
    weights: float
    adapters: float
    moments: float


class MemoryModel:
    """Memory of a training's micro-batches in bytes. What is asked for is simulated once in a process."""

    _simulated: dict[tuple[str, bool], Simulated] = {}  # noqa: RUF012  # of the process, by what decides it

    def __init__(self, training: Training) -> None:
        self.training, self._key = training, training.key()

    def simulated(self, recomputed: bool) -> Simulated:
        key = (self._key, recomputed)
        if key not in self._simulated:
            self._simulated[key] = _simulate(self.training, recomputed)
        return self._simulated[key]

    @property
    def weights(self) -> float:
        return self.simulated(True).weights

    @property
    def adapters(self) -> float:
        """Of the policy and the frozen adapters."""
        return self.simulated(True).adapters * (1 + self.training.frozen_adapters)

    @property
    def moments(self) -> float:
        """What the optimizer holds on the device between steps."""
        return self.simulated(True).moments

    def kept_per_token(self, recomputed: bool) -> float:
        """Bytes that one token more keeps until backward."""
        (fewer, more), (low, high) = self.simulated(recomputed).tokens, self.simulated(recomputed).kept
        return (high - low) / (more - fewer)

    def phases(self, tokens: float, recomputed: bool) -> dict[str, float]:
        """The peak of each phase of a step whose heaviest micro-batch has `tokens` tokens."""
        step = self.simulated(recomputed)
        share = (tokens - step.tokens[0]) / (step.tokens[1] - step.tokens[0])
        more = step.adapters * self.training.frozen_adapters
        return {phase: more + low + share * (high - low) for phase, (low, high) in step.phases.items()}

    def peak(self, tokens: float, recomputed: bool) -> tuple[float, str]:
        """The peak of a step whose heaviest micro-batch has `tokens` tokens, and the phase that has it."""
        phases = self.phases(tokens, recomputed)
        phase = max(phases, key=lambda name: phases[name])
        return phases[phase], phase

    def most_tokens(self, memory: float, recomputed: bool) -> int:
        """Most tokens of a micro-batch whose step fits into `memory` bytes; 0 if none does."""
        at_none, at_one = self.phases(0, recomputed), self.phases(1, recomputed)
        slopes = {phase: at_one[phase] - at_none[phase] for phase in at_none}
        if any(at_none[phase] > memory for phase in at_none if slopes[phase] <= 1):
            return 0
        return max(0, int(min((memory - at_none[p]) / slope for p, slope in slopes.items() if slope > 1)))

    @cached_property
    def linear_sizes(self) -> tuple[int, int]:
        with torch.device("meta"):
            return linear_sizes(_skeleton(self.training, self.training.layers))


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and each phase's peak of them."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.grain = 512 if device == "cuda" else 1  # of CUDA's caching allocator
        self.on_cuda = device == "cuda"
        self.live: dict[int, int] = {}
        self.now, self.phase = 0, "loaded"
        self.peaks: dict[str, int] = defaultdict(int)

    def start(self, phase: str) -> None:
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":  # a fake tensor has no value; what asks is Adam's count of steps, or a check
            return {torch.bool: bool}.get(args[0].dtype, int if not args[0].is_floating_point() else float)(1)
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now + self._in_passing(name, args))
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = -(-storage.nbytes() // self.grain) * self.grain
            self.now += self.live[key]
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def _in_passing(self, name: str, args: Any) -> int:
        """Bytes that a kernel takes and gives back: the weight as dequantised, and what attention's backward sums."""
        if name == "gemm_4bit":
            size, tokens = prod(args[2]), args[0].numel() // args[0].shape[-1]
            dequantised = size * args[0].element_size() + 8 * size // 64
            return dequantised if tokens > 512 or not self.on_cuda else 0
        if self.on_cuda and name == "logsumexp":
            return args[0].numel() * args[0].element_size()
        if self.on_cuda and "attention" in name and "backward" in name:
            (batch, heads, length, width), key = args[1].shape, args[2]
            of_queries = 4 * batch * heads * (-(-length // 128) * 128) * width
            return of_queries + (4 * batch * heads * key.shape[2] * width if key.shape[1] != heads else 0)
        return 0


def _cuda_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
    """What F.scaled_dot_product_attention is on CUDA: flash attention in half precision without a mask, otherwise the
    memory-efficient kernel, whose mask is added as a tensor."""
    from torch.nn.attention.bias import CausalBias

    causal, scale = options.get("is_causal", False) or isinstance(attn_mask, CausalBias), options.get("scale")
    if (attn_mask is None or isinstance(attn_mask, CausalBias)) and query.element_size() == 2:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, causal, False, scale=scale)[0]
    if key.shape[1] != query.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    bias = None
    if isinstance(attn_mask, Tensor) and not isinstance(attn_mask, CausalBias):
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
        bias = nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    kept = torch.is_grad_enabled() and query.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, kept, 0.0, causal, scale=scale)[0]


def _skeleton(training: Training, layers: int) -> Any:
    """The architecture with this number of layers, as `load_base` makes it, but for the values of its weights."""
    config = copy.deepcopy(training.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    config.quantization_config = None
    dtype = getattr(torch, training.dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=training.attention)


def _quantise(model: Any, training: Training) -> None:
    """Replace every linear layer but the head by bitsandbytes' layer, with tensors of the sizes that it holds."""
    if training.quantization == "none":
        return
    from bitsandbytes import nn as quantised

    head, in_4bit = model.get_output_embeddings(), training.quantization == "nf4"
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                kind = quantised.Linear4bit if in_4bit else quantised.Linear8bitLt
                new = kind.__new__(kind)
                nn.Module.__init__(new)  # its own makes parameters of a kind that a fake tensor cannot become
                new.in_features, new.out_features, new.bias = layer.in_features, layer.out_features, layer.bias
                (_fill_nf4 if in_4bit else _fill_int8)(new, layer.weight, getattr(torch, training.dtype))
                setattr(parent, name, new)
    setattr(model, "is_loaded_in_4bit" if in_4bit else "is_loaded_in_8bit", True)  # for PEFT


def _fill_nf4(new: Any, wide: Tensor, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import QuantState

    blocks = -(-wide.numel() // 64)
    second = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    first = {"code": torch.empty(16), "blocksize": 64, "quant_type": "nf4", "dtype": dtype, "shape": wide.shape}
    state = QuantState(torch.empty(blocks, dtype=torch.uint8), **first, offset=torch.empty(()), state2=second)
    weight = new.weight = nn.Parameter(torch.empty(-(-wide.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
    vars(weight).update(quant_state=state, compress_statistics=True, quant_type="nf4", bnb_quantized=True)
    vars(weight).update(quant_storage=torch.uint8)
    vars(new).update(quant_state=state, quant_storage=torch.uint8, compute_dtype=dtype, compute_type_is_set=True)
    new.support_avx512bf16_for_cpu = False


def _fill_int8(new: Any, wide: Tensor, dtype: torch.dtype) -> None:
    from bitsandbytes import MatmulLtState

    new.index, new.state = None, MatmulLtState()
    new.state.has_fp16_weights = False
    new.state.CB, new.state.SCB = torch.empty(wide.shape, dtype=torch.int8), torch.empty(len(wide))
    new.weight = nn.Parameter(new.state.CB, requires_grad=False)
    vars(new.weight).update(CB=None, SCB=None)


@contextmanager
def _simulation(training: Training) -> Iterator[tuple[FakeTensorMode, _LiveBytes]]:
    """New tensors are fake, their bytes are counted, and attention is that of the training's device."""
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes(training.device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if training.device == "cuda":
            stack.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _cuda_attention))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fake)
        stack.enter_context(live)
        yield fake, live


def _simulate(training: Training, recomputed: bool) -> Simulated:
    """
    Raises:
        InputError: the architecture, its layers or the optimizer cannot be simulated.
    """
    depths = (training.layers,) if training.layers <= DEPTHS[1] else DEPTHS
    kind = training.config.model_type
    try:
        steps = [_steps(training, depth, recomputed) for depth in depths]
    except InputError:
        raise
    except Exception as error:  # of any architecture's code on fake tensors: an open list
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"the memory of {kind} models cannot be estimated ({reason})") from error
    if len(steps) == 1:
        return steps[0]
    return _deeper(*steps, share=(training.layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def _deeper(low: Any, high: Any, share: float) -> Any:
    """The line through two results, at `share` of the way from the first to the second."""
    if isinstance(low, Simulated):
        return Simulated(**{name: _deeper(value, vars(high)[name], share) for name, value in vars(low).items()})
    if isinstance(low, dict):
        return {name: _deeper(value, high[name], share) for name, value in low.items()}
    if isinstance(low, tuple):
        return tuple(_deeper(a, b, share) for a, b in zip(low, high, strict=True))
    return low + (high - low) * share


def _steps(training: Training, layers: int, recomputed: bool) -> Simulated:
    """Two steps of a model with so many layers, by the number of documents in their last micro-batch."""
    found: list[tuple[int, dict[str, int], int]] = []
    micro_batches = [_documents(training, count) for count in DOCUMENTS]
    with _simulation(training) as (fake, live):
        model = _skeleton(training, layers)
        _quantise(model, training)
        if training.quantization != "none" and not training.wide_weights:
            check_narrow(model, training.config.model_type)
        model.requires_grad_(False).train()
        gc.collect()
        weights = live.now
        model = _with_adapters(model, training)
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        recompute(model, recomputed)
        learning = [p for p in model.parameters() if p.requires_grad]
        gc.collect()
        adapters = live.now - weights
        optimizer = _optimizer(training, learning)
        moments = live.now - weights - adapters
        for rows in micro_batches:
            live.peaks.clear()
            given = {name: fake.from_tensor(v) if isinstance(v, Tensor) else v for name, v in vars(rows).items()}
            kept = _step(training, model, optimizer, TokenRows(**given), live)
            found.append((rows.tokens, dict(live.peaks), kept))
    tokens, phases, kept = zip(*found, strict=True)
    by_phase = {phase: tuple(peaks[phase] for peaks in phases) for phase in phases[0]}
    return Simulated(tokens, by_phase, kept, weights, adapters, moments)


def _with_adapters(model: Any, training: Training) -> Any:
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):  # a fake parameter cannot become another one
        model = add_adapters(model, training.lora)
    wide = torch.float64 if training.dtype == "float64" else torch.float32
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(training.precision, wide)
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = "mixed" not in training.precision
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            if matrix.weight.dtype != dtype:
                matrix.weight = nn.Parameter(matrix.weight.detach().to(dtype))
    return model


def _documents(training: Training, count: int) -> TokenRows:
    """Pairs behind a prompt of a quarter of the length; in one row where attention can tell them apart."""
    prompt, response = training.length // 4, training.length - training.length // 4
    pair = {"prompt_ids": [1] * prompt, "chosen_ids": [1] * response, "rejected_ids": [1] * response}
    return build_rows([pair] * count, [True] * count, [True] * count, pack=2**60 * (training.attention == BY_SEGMENT))


def _optimizer(training: Training, learning: list[Tensor]) -> Any:
    """The training's optimizer as after a first step.

    Raises:
        InputError: the class is neither of torch.optim nor of bitsandbytes.
    """
    optimizer: Any = training.optimizer(learning)
    room = type(optimizer).__module__.split(".")[0]
    if room == "bitsandbytes":
        for number, parameter in enumerate(learning):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
            if optimizer.is_paged and training.device == "cuda" and parameter.numel() >= 1e5:  # then not on the card
                optimizer.state[parameter].update(state1=None, state2=None)
        optimizer.step = lambda: None  # in place
        return optimizer
    if room != "torch":
        raise InputError(f"the memory of the optimizer {type(optimizer).__name__} is not known: give one of torch.optim")
    for group in optimizer.param_groups:
        if training.device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice on CUDA
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _step(training: Training, model: Any, optimizer: Any, rows: TokenRows, live: _LiveBytes) -> int:
    """One micro-batch and the optimizer's step; returns the bytes that are kept until backward."""
    if training.accumulates:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
    half = {"bf": torch.bfloat16, "16": torch.float16}[training.precision[:2]] if "mixed" in training.precision else None
    live.start("loaded")
    before = live.now
    with torch.autocast("cpu", half, cache_enabled=False) if half else nullcontext():
        if training.with_reference:
            live.start("reference")
            with torch.no_grad(), role(model, "reference"):
                reference = sequence_log_probs(model, rows).sums
        live.start("forward")
        loss = sequence_log_probs(model, rows).sums.sum()
    kept = live.now - before
    live.start("backward")
    loss.backward()
    del loss
    live.start("optimizer")
    optimizer.step()
    optimizer.zero_grad()
    return kept
