"""Packed rows through the base: hidden states, the output head, log-probabilities of targets and completions."""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixdpo.batches.rows import TokenRows, build_rows
from mixdpo.data.encoding import sizes_of
from mixdpo.errors import InputError
from mixdpo.model.attention import KERNELS, computing_dtype
from mixdpo.model.fused_head import Head, SequenceLogProbs, gathered, run_sums, target_statistics, token_log_probs
from mixdpo.model.memory import is_out_of_memory

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel

_INSTEAD = "set data.pack 0 and data.share_prompt false, or try model.attention eager"


def causal_lm_of(model: Any) -> "PreTrainedModel":
    """The model without PEFT's wrapper; its layers keep their adapters."""
    return getattr(model, "get_base_model", lambda: model)()


def predicting_states(model: "PeftModel | PreTrainedModel", rows: TokenRows) -> Tensor:
    """Last-layer hidden states (M, H), after the final norm, that predict the targets in `rows`, in the active role.

    A completion's states are those from the last prompt token to the completion's last token but one."""
    causal_lm = causal_lm_of(model)
    options = _attention_options(causal_lm, rows)
    hidden: Tensor = causal_lm.base_model(input_ids=rows.input_ids, use_cache=False, **options).last_hidden_state
    return gathered(hidden.flatten(0, 1), rows.source)


def _attention_options(causal_lm: "PreTrainedModel", rows: TokenRows) -> dict[str, Any]:
    attention, dtype = causal_lm.config._attn_implementation, causal_lm.dtype
    if rows.plain and not (attention in KERNELS and rows.input_ids.shape[1] <= attention_window(causal_lm.config)):
        return {}  # plain rows are causal in any architecture: padding comes last
    _check_window(causal_lm.config, rows)
    if attention in KERNELS:  # transformers hands a mask with four axes on, without a look that waits for the device
        mask = torch.full((1, 1, 1, 1), torch.nan, device=rows.input_ids.device)  # seen if a layer drops the segments
        return {"position_ids": rows.position_ids, "attention_mask": mask, "segments": rows.plain or rows.segments}
    mask = rows.attention_mask()
    if attention == "eager":  # adds its mask to the scores instead of choosing by it
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"position_ids": rows.position_ids, "attention_mask": mask}


def check_documents(model: "PeftModel | PreTrainedModel", *, packed: bool = True) -> str:
    """Check the attention on a few tokens: sequences get the same hidden states and gradient as alone in transformers'
    own attention; if `packed`, in packed rows as well, beside another response, behind a shared prompt. `auto` becomes
    the first that passes. If none of ours does, transformers' own is taken.

    Returns:
        Lines that say what was chosen of several and what was refused, or "".

    Raises:
        InputError: the hidden states differ in transformers' own as well, as in models with state spaces.
    """
    causal_lm, told, fault = causal_lm_of(model), "", ""
    weight, asked = next(causal_lm.parameters()), causal_lm.config._attn_implementation
    native, half = "sdpa" if asked in KERNELS else asked, computing_dtype(weight).itemsize < 4
    flash = weight.is_cuda and half and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    ours = ("varlen", "lower_right", "by_segment")[0 if flash else 2 if weight.is_cuda else 1 :]
    layouts = [rows.to(weight.device) for rows in _probes(75 if weight.is_cuda else 17)[: 2 if packed else 1]]
    for attention in dict.fromkeys((*(ours if asked == "auto" else (asked,)), native)):
        fault = _fault_of(causal_lm, attention, native, layouts, tolerance=0.1 if half else 1e-3)
        if not fault:
            return told + (f"attention is computed by {attention}\n" if told or asked == "auto" else "")
        told += f"warning: {attention} attention is not used: {causal_lm.config.model_type} models {fault}\n"
    raise InputError(f"{causal_lm.config.model_type} models {fault}: {_INSTEAD}")


def _probes(longest: int) -> tuple[TokenRows, TokenRows]:
    """Two pairs in rows of their own and packed in one row. The longest sequence has so many tokens."""
    ids, half = [3 + 7 * i % 19 for i in range(longest)], longest // 2
    texts = ((ids[:6], ids[6:], ids[-5:]), (ids[half:], ids[:3], ids[1:half]))
    pairs = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), text, strict=True)) for text in texts]
    both = (pairs, [True] * 2, [True] * 2)
    return build_rows(*both, share_prompt=False), build_rows(*both, pack=sys.maxsize)


def _fault_of(causal_lm: Any, attention: str, native: str, layouts: Sequence[TokenRows], tolerance: float) -> str:
    """How an attention differs from `native` in rows of few tokens, or "". The model is left with this attention."""
    try:
        causal_lm.config._attn_implementation = native
        expected = _states_and_gradient(causal_lm, layouts[0])
        causal_lm.config._attn_implementation = attention
        found = [list(zip(_states_and_gradient(causal_lm, rows), expected, strict=True)) for rows in layouts]
    except (TypeError, ValueError, RuntimeError) as error:  # of a forward that takes no such mask
        if is_out_of_memory(error):
            raise
        return f"cannot be computed in these rows ({' '.join(str(error).split()):.300})"
    last = -1 if attention == native else None  # native gradients, which round more than states, are not in question
    off = torch.stack([(own - right).norm() / right.norm() for pairs in found for own, right in pairs[:last]]).max()
    return "" if off <= tolerance else f"differ by {float(off):.1%} from transformers' own on a few tokens"


def _states_and_gradient(causal_lm: "PreTrainedModel", rows: TokenRows) -> tuple[Tensor, ...]:
    """Hidden states of each completion, and the gradient (H,) of a weighted sum of them to a factor on all embeddings.
    The terms of this sum hardly cancel out: in bf16 the gradient rounds by up to 5 % (SmolLM2-135M)."""
    embedding = causal_lm.get_input_embeddings()
    factor = torch.ones_like(embedding.weight[0]).requires_grad_()
    with embedding.register_forward_hook(lambda _module, _ids, states: states * factor), torch.enable_grad():
        states = predicting_states(causal_lm, rows)
        weights = torch.arange(states.shape[1], device=states.device).cos() * states.detach().float().abs()
        (gradient,) = torch.autograd.grad((states.float() * weights).sum(), factor)
    return (*states.detach().split([tokens for _, tokens in rows.runs]), gradient)


def row_log_probs(model: "PeftModel | PreTrainedModel", rows: TokenRows, *, exact: bool = False) -> Tensor:
    """log p of each target in `rows` (M,), in the active role.

    The logits of the whole sequence never exist: the head sees only the positions that predict a target.

    Args:
        exact: apply the head in fp32 whatever its dtype. Logits rounded to bf16 are off by 0.06 nats, which flips the
            sign of many token-cleaning scores.
    """
    return token_log_probs(predicting_states(model, rows), output_head(causal_lm_of(model)), rows.target, exact=exact)


def row_statistics(
    model: "PeftModel", rows: TokenRows, statistics: Sequence[Any], base: Any = None
) -> tuple[Tensor, ...]:
    """`target_statistics` of each target in `rows`, in the active role. base: `predicting_states` of the bare base."""
    head = output_head(causal_lm_of(model))
    return target_statistics(predicting_states(model, rows), head, rows.target, statistics, base=base)


def output_head(causal_lm: "PreTrainedModel") -> Head:
    """The layer that turns the model's last hidden states into logits.

    Raises:
        InputError: the head is no plain linear layer, for example because an adapter sits on the head.
    """
    layer, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
    if not (type(layer) is nn.Linear and layer.weight.is_floating_point()):
        raise InputError(f"the output head is a {type(layer).__name__}, no plain layer: leave it out of lora.targets")
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None))


def sequence_log_probs(model: "PeftModel", rows: TokenRows, token_weight: Tensor | None = None) -> SequenceLogProbs:
    """Summed log-probabilities of the 2B completions in `rows` (chosen first, then rejected), in the active role.

    Args:
        token_weight: as for `summed`.
    """
    return summed(row_log_probs(model, rows), rows, token_weight)


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
    # a completion's targets stand together, in order: the first `shared` ones, then the rest
    cut = [run for c, own in rows.runs for run in ((c, shared[c]), (count + c, own - shared[c]))]
    sums, rest = run_sums(values, cut, 2 * count).chunk(2)
    return SequenceLogProbs(sums + rest, lengths, sums)


@torch.no_grad()
def check_head(model: "PreTrainedModel") -> None:
    """Refuse a model whose own forward computes other logits than `output_head`."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    head, states = output_head(model), model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = head.shaped(nn.functional.linear(states, head.weight, head.bias).float())
    if not torch.allclose(ours, own, rtol=0.02, atol=0.02 * float(own.abs().max())):  # bf16 rounds at 0.004
        raise InputError(f"{model.config.model_type} models rescale the head's logits: give a model of another type")


def attention_window(config: Any) -> int:
    """How many tokens back an attention of the model looks at most, `sys.maxsize` if all its layers look at all."""
    config = config.get_text_config()
    names = ("sliding_window", "window_size", "attention_chunk_size")  # the second is GPT-Neo's, the third Llama 4's
    windows = [getattr(config, name, None) for name in names] if getattr(config, "use_sliding_window", True) else []
    return min(filter(None, windows), default=sys.maxsize)


def _check_window(config: Any, rows: TokenRows) -> None:
    """Refuse packed sequences longer than the model's sliding window: their tokens would see all of the sequence. A
    sequence is the first piece of a document with one further piece."""
    longest = max(keys for _, keys in rows.segments.sizes)
    if longest > (window := attention_window(config)):
        raise InputError(f"{longest} tokens of a row exceed the sliding window of {window}: lower data.max_length")


def check_data(model: "PreTrainedModel", name: str, tables: Collection["Dataset"], *, packed: bool) -> str:
    """Compare encoded tables with what the model can compute, and check its attention.

    Args:
        packed: whether sequences share rows, where a sliding window cannot be computed.

    Returns:
        What `check_documents` says, and a warning if sequences are longer than the rotary positions that the model was
        made with.

    Raises:
        InputError: a sequence has a token that the model does not know, or more tokens than the model has positions
            or, in shared rows, than its sliding window; or `check_documents` fails.
    """
    config, ids, beyond = model.config.get_text_config(), model.get_input_embeddings().num_embeddings, 0
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    known = getattr(config, "max_position_embeddings", None) or sys.maxsize
    window = attention_window(config) if packed else sys.maxsize
    for table in tables:
        lengths, largest = sizes_of(table)
        if largest >= ids:
            raise InputError(f"the model '{name}' knows token ids below {ids}, not {largest}: give its own tokenizer")
        longest, row = int(lengths.max()), table[int(lengths.argmax())]
        found = f"{row['place']} (id {row.get('pair_id', row.get('sample_id'))}) has {longest} tokens, and {name}"
        if longest > known and not rotary:
            raise InputError(f"{found} has {known} positions: set data.max_length {known} or less")
        if longest > window:
            remedy = f"set data.max_length {window} or less, or data.pack 0 and (for pairs) data.share_prompt false"
            raise InputError(f"{found} has a sliding window of {window}: {remedy}")
        beyond += int((lengths > known).sum())
    ours = model.config._attn_implementation in KERNELS and model.get_output_embeddings()  # a reward model has no head
    chosen = check_documents(model, packed=packed) if packed or ours else ""
    told = f"{beyond} rows have more tokens than the {known} positions that {name} was made with"
    return chosen + (f"warning: {told}: set data.max_length {known}\n" if beyond else "")


def without_cast_cache(device: torch.device) -> torch.autocast:
    """Keep autocast as it is outside, but switch off its cache of cast weights.

    A cast that was cached before an optimizer step would hide the step's update. Lightning switches this cache off too.
    """
    return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type), cache_enabled=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block. Modules that were in train mode return to train mode; others stay in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
