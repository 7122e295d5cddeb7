"""Responses to prompts in batches. Samples of one prompt share its prefill, and a row that has ended costs nothing
more."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mixdpo.data.chat_template import encode_responses, load_template
from mixdpo.data.columns import template_values
from mixdpo.errors import InputError, located
from mixdpo.model.attention import KERNELS
from mixdpo.model.forward import attention_window, causal_lm_of, evaluating
from mixdpo.model.memory import is_out_of_memory
from mixdpo.storage.files import Row

Ids = list[list[int]]
"""Token ids of several texts."""

Prompt = str | list[dict[str, str]] | Row
"""A user's text, messages that end with the user's, or a row whose `prompt` is either."""

Pick = Callable[[Tensor], Tensor]
"""(B, V) logits -> (B,) next tokens."""

LOOK = {"cuda": 16}
"""Tokens after which the host looks at which rows have ended, as a look waits for the device; 1 elsewhere."""


@dataclass(frozen=True)
class Response:
    """One text of a model.

    Args:
        text: without special tokens.
        tokens: number of tokens produced, the end token included.
        ended: whether the model ended by itself, rather than being cut at `max_new_tokens`.
    """

    text: str
    tokens: int
    ended: bool


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    progress: bool = True,
    names: Sequence[str] | None = None,
    stream: Any = None,
) -> list[list[Response]]:
    """`samples` responses to each prompt; entry i belongs to prompt i.

    The model is put in eval mode and given back as it was; the global random state is untouched.

    Args:
        model: a Hugging Face causal language model, plain or wrapped by PEFT; its active adapters count.
        tokenizer: its tokenizer, with a chat template.
        prompts: a user's text, messages that end with the user's, or a row whose `prompt` is either.
        max_new_tokens: a response is cut at this many tokens.
        batch_size: responses decoded together (prompts in a batch = batch_size // samples, at least one). Where memory
            runs out, fewer prompts are decoded together from there on, which standard error says.
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold this much probability.
        samples: responses per prompt.
        seed: the same seed, batch_size and machine give the same responses, unless memory runs out.
        progress: show a progress bar.
        names: what errors call the prompts; their numbers, if not given.
        stream: takes the tokens of the one prompt as they come, by `put`: a `TextStreamer` of transformers.

    Raises:
        InputError: an option out of range, no chat template, or a prompt that leaves the model no room to respond.
    """
    if not (temperature >= 0 and 0 < top_p <= 1 and min(samples, max_new_tokens, batch_size) >= 1):
        given = f"temperature {temperature}, top_p {top_p}, samples {samples}, max_new_tokens {max_new_tokens}"
        rule = "need temperature >= 0, 0 < top_p <= 1; the others must be at least 1"
        raise InputError(f"{given}, batch_size {batch_size}: {rule}")
    if samples > 1 and temperature == 0:
        raise InputError(f"samples {samples}: at temperature 0 all are the same: raise temperature or take 1 sample")
    if not prompts:
        return []
    device, encoded = next(model.parameters()).device, _encode(tokenizer, prompts, names)
    _check_room(model, encoded, max_new_tokens)
    generator, ends = torch.Generator(device).manual_seed(seed), _end_tokens(model, tokenizer)
    pick = partial(_pick, temperature=temperature, top_p=top_p, generator=generator)
    pad = tokenizer.pad_token_id or 0  # padding is masked, so any id serves where a tokenizer has none
    complete = partial(_complete, model, pick=pick, pad=pad, ends=ends, samples=samples, most=max_new_tokens, to=stream)
    results: list[list[Response]] = [[] for _ in encoded]
    with evaluating(model), torch.no_grad(), tqdm(total=len(encoded), unit="prompt", disable=not progress) as bar:
        for batch, completions in _batches(complete, encoded, max(1, batch_size // samples)):
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            for row, (text, ids) in enumerate(zip(texts, completions, strict=True)):
                results[batch[row // samples]].append(Response(text, len(ids), ids[-1] in ends))
            bar.update(len(batch))
    return results


def load_policy(name: str) -> tuple[Any, Any]:
    """The model and the tokenizer that `generate` takes: on the GPU, if there is one.

    Args:
        name: folder of a run, whose chat template the tokenizer gets, or a model, as `read_trained` takes it.
    """
    from mixdpo.model.export import read_trained  # imports PEFT
    from mixdpo.model.loading import gpu_dtype

    on_gpu = torch.cuda.is_available()
    # bfloat16 is slower than float32 on most CPUs
    trained = read_trained(name, dtype=gpu_dtype() if on_gpu else "float32")
    tokenizer, tokenizer.chat_template = trained.tokenizer()  # type: ignore[has-type]
    return trained.load("cuda" if on_gpu else "cpu", attention="sdpa"), tokenizer


def _batches(complete: Callable[[Ids], Ids], encoded: Ids, width: int) -> Iterator[tuple[list[int], Ids]]:
    """Numbers of `width` prompts at a time, or of fewer once memory has run out, and their completions."""
    # Longest first: the first batch is the peak of memory, so what fits there fits.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    while batch := order[:width]:
        try:
            completions = complete([encoded[index] for index in batch])
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            width = len(batch) // 2
            print(f"out of memory with {len(batch)} prompts at once: {width} from here on", file=sys.stderr)
            continue
        del order[:width]
        yield batch, completions


def _complete(
    model: nn.Module, prompts: Ids, *, pick: Pick, pad: int, ends: Set[int], samples: int, most: int, to: Any
) -> Ids:
    """Token ids of `samples` completions per prompt, samples of one prompt side by side. A token of `ends` ends one,
    at `most` tokens one is cut. The tokens of the first prompt are put `to` a streamer, if there is one."""
    from transformers import DynamicCache

    cache, device = DynamicCache(config=model.config), next(model.parameters()).device
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, True, pad, "left").to(device)  # (P, T)
    # from lengths: the pad id may well be the end token, which prompts contain
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = _step(model, ids, mask, positions, cache).repeat_interleave(samples, 0)  # (P * samples, V)
    cache.batch_repeat_interleave(samples)
    mask = mask.repeat_interleave(samples, 0)
    alive, pending = [*range(len(mask))], []  # rows still decoded; their tokens since the last look
    completions: Ids = [[] for _ in alive]
    for produced in range(1, most + 1):
        pending.append(tokens := pick(logits))
        if produced % (1 if to else LOOK.get(device.type, 1)) == 0 or produced == most:
            seen, pending = [_until_end(row, ends) for row in torch.stack(pending, 1).tolist()], []
            for row, ids in zip(alive, seen, strict=True):
                completions[row] += ids
            for token in seen[0] if to else ():
                to.put(torch.tensor([token]))
            still = [i for i, ids in enumerate(seen) if ids[-1] not in ends]
            if not still or produced == most:
                break
            if len(still) < len(alive):
                open_rows, alive = torch.tensor(still, device=device), [alive[i] for i in still]
                tokens, mask = tokens[open_rows], mask[open_rows]
                cache.batch_select_indices(open_rows)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = _step(model, tokens[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
    return completions


def _until_end(ids: list[int], ends: Set[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids, 1) if token in ends), None)]


def _step(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """(B, V) logits of the last position; `cache` grows by the ids."""
    takes_mask = model.config._attn_implementation in (*KERNELS, "sdpa")
    if ids.shape[1] == 1 and takes_mask and attention_window(model.config) == sys.maxsize:
        mask = mask[:, None, None].bool()  # with four axes transformers does not look at it, which would wait
    # transformers 5.24 renamed the argument; a PEFT model names none
    name = "cache" if "cache" in inspect.signature(causal_lm_of(model).forward).parameters else "past_key_values"
    options = {name: cache, "use_cache": True, "logits_to_keep": 1}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1]


def _pick(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """(B,) next tokens from (B, V) logits."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probs = _nucleus(probs, top_p)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero what lies outside the smallest set of tokens that reaches `top_p`; the likeliest token always stays."""
    ordered, indices = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probs).scatter(-1, indices, ordered.masked_fill(outside, 0.0))


def _encode(tokenizer: Any, prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> Ids:
    template, numbered = load_template(tokenizer, None), names or [str(i + 1) for i in range(len(prompts))]
    encoded: Ids = []
    for name, given in zip(numbered, prompts, strict=True):
        prompt, values = (given["prompt"], template_values(given)) if isinstance(given, dict) else (given, {})
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with located(f"prompt {name}"):
            encoded += encode_responses(tokenizer, template, chat, values=values)
    return encoded


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    return {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}


def _check_room(model: nn.Module, encoded: Ids, max_new_tokens: int) -> None:
    """Refuse prompts and responses beyond the model's positions, where a model writes nonsense."""
    longest, room = max(map(len, encoded)), getattr(model.config, "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        asked = f"{longest} prompt tokens + max_new_tokens {max_new_tokens}"
        raise InputError(f"{asked} exceed the model's {room} positions: cut either")
