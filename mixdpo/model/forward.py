"""Packed rows through the base: hidden states, the output head, log-probabilities of targets and completions."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from operator import sub
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixdpo.batches.rows import TokenRows, build_rows
from mixdpo.data.encoding import sizes_of
from mixdpo.errors import InputError
from mixdpo.model.attention import BY_SEGMENT
from mixdpo.model.fused_head import Head, SequenceLogProbs, gathered, run_sums, target_statistics, token_log_probs

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
    options: dict[str, Any] = {}
    if not rows.plain:  # plain rows are causal in any architecture: padding comes last
        _check_window(causal_lm.config, rows)
        options = {"position_ids": rows.position_ids, **_attention_options(causal_lm, rows)}
    hidden: Tensor = causal_lm.base_model(input_ids=rows.input_ids, use_cache=False, **options).last_hidden_state
    return gathered(hidden.flatten(0, 1), rows.source)


def _attention_options(causal_lm: "PreTrainedModel", rows: TokenRows) -> dict[str, Any]:
    attention, dtype = causal_lm.config._attn_implementation, causal_lm.dtype
    if attention == BY_SEGMENT:  # transformers passes a mask with four axes on, and our attention ignores it
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.input_ids.device)
        return {"attention_mask": mask, "documents": rows.documents}
    mask = rows.attention_mask()
    if attention == "eager":  # adds its mask to the scores instead of choosing by it
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask}


@torch.no_grad()
def check_documents(model: "PeftModel | PreTrainedModel") -> None:
    """Check on a few tokens that a response gets the same hidden states alone and beside another response, behind a
    shared prompt.

    Raises:
        InputError: the hidden states differ, as in models with state spaces or with biases by distance.
    """
    causal_lm = causal_lm_of(model)
    pair = {"prompt_ids": [*range(3, 9)], "chosen_ids": [*range(9, 20)], "rejected_ids": [*range(20, 25)]}
    device, both = next(causal_lm.parameters()).device, ([pair, pair], [True] * 2, [True] * 2)
    name = causal_lm.config.model_type
    alone = predicting_states(model, build_rows(*both, share_prompt=False).to(device))
    try:
        shared = predicting_states(model, build_rows(*both, pack=100).to(device))
    except (TypeError, ValueError, RuntimeError) as error:  # of a forward that takes no such mask
        raise InputError(f"{name} models cannot be computed in packed rows ({error}): {_INSTEAD}") from error
    off, tolerance = float((shared - alone).norm() / alone.norm()), 0.1 if alone.element_size() < 4 else 1e-3
    if not off <= tolerance:
        raise InputError(f"{name} models are off by {off:.0%} in a response behind a shared prompt: {_INSTEAD}")


def row_log_probs(model: "PeftModel | PreTrainedModel", rows: TokenRows, *, exact: bool = False) -> Tensor:
    """log p of each target in `rows` (M,), in the active role.

    The logits of the whole sequence never exist: the head sees only the positions that predict a target.

    Args:
        exact: apply the head in fp32 whatever its dtype. Logits rounded to bf16 are off by 0.06 nats, which flips the
            sign of many token-cleaning scores.
    """
    return token_log_probs(predicting_states(model, rows), output_head(causal_lm_of(model)), rows.target, exact=exact)


def row_statistics(model: "PeftModel", rows: TokenRows) -> tuple[Tensor, ...]:
    """`target_statistics` of each target in `rows`, in the active role."""
    return target_statistics(predicting_states(model, rows), output_head(causal_lm_of(model)), rows.target)


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


def _window(config: Any) -> int | None:
    config = config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)  # GPT-Neo's
    return window if getattr(config, "use_sliding_window", True) else None


def _check_window(config: Any, rows: TokenRows) -> None:
    """Refuse packed sequences longer than the model's sliding window: their tokens would see all of the sequence. A
    sequence is the first piece of a document with one further piece."""
    bounds = (bounds for _, *bounds in rows.documents)
    longest = max(first - start + max(map(sub, ends, (first, *ends)), default=0) for start, first, *ends in bounds)
    if (window := _window(config)) is not None and longest > window:
        raise InputError(f"{longest} tokens of a row exceed the sliding window of {window}: lower data.max_length")


def check_data(model: "PreTrainedModel", name: str, tables: Collection["Dataset"], *, packed: bool) -> str:
    """Compare encoded tables with what the model can compute, and check packed rows.

    Args:
        packed: whether sequences share rows, where a sliding window cannot be computed.

    Returns:
        A warning if sequences are longer than the rotary positions that the model was made with, else "".

    Raises:
        InputError: a sequence has a token that the model does not know, or more tokens than the model has positions
            or, in shared rows, than its sliding window; or `check_documents` fails.
    """
    config, ids, beyond = model.config.get_text_config(), model.get_input_embeddings().num_embeddings, 0
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    known = getattr(config, "max_position_embeddings", None) or sys.maxsize
    window = (_window(config) if packed else None) or sys.maxsize
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
    if packed:
        check_documents(model)
    told = f"{beyond} rows have more tokens than the {known} positions that {name} was made with"
    return f"warning: {told}: set data.max_length {known}\n" if beyond else ""


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
