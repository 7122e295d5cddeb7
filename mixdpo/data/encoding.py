"""Pairs and conversations -> token ids and the spans that are trained on, cut to length, cached."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

import numpy as np

from mixdpo.data import chat_template as chat
from mixdpo.data.cut_prompts import cut_prompt, prompt_turns
from mixdpo.data.table import Dataset, room_code
from mixdpo.errors import InputError, located

Overlong = Literal["truncate", "drop"]
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids")
TEXTS = {"pair": ["prompt", "chosen", "rejected"], "sample": ["messages"]}
"""The noun for a row -> the columns of its texts."""


class EncodedPair(NamedTuple):
    """Token ids of one pair. A completion ends with its end token, unless it was truncated."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def is_empty(self) -> bool:
        """Whether a completion is nothing but its end token."""
        return min(len(self.chosen_ids), len(self.rejected_ids)) < 2

    def within(
        self, max_length: int, max_prompt_length: int, overlong: Overlong = "truncate", cut: Any = cut_prompt
    ) -> "EncodedPair | None":
        """The pair within `max_length` tokens (prompt + longer completion), or None where it is to be dropped.

        `truncate` cuts only a pair that is too long. The prompt keeps as many tokens as the longer completion leaves,
        at least `max_prompt_length`; `cut_prompt` says which. Each completion then keeps its first
        `max_length` - prompt tokens, so a cut one loses its end token. Dropped are a pair that is too long (`drop`), a
        pair whose prompt cannot be cut to the room, and a pair cut to two equal completions.

        Args:
            cut: `cut_prompt`, which takes the prompt for one text, or with the prompt's turns.
        """
        longer = max(len(self.chosen_ids), len(self.rejected_ids))
        if len(self.prompt_ids) + longer <= max_length:
            return self
        prompt_ids, room = self.prompt_ids, max(max_prompt_length, max_length - longer)
        if overlong == "truncate" and len(prompt_ids) > room:
            prompt_ids = cut(prompt_ids, room)
        room = max_length - len(prompt_ids)
        pair = EncodedPair(prompt_ids, self.chosen_ids[:room], self.rejected_ids[:room])
        return None if overlong == "drop" or not prompt_ids or pair.chosen_ids == pair.rejected_ids else pair


class EncodedSample(NamedTuple):
    """Token ids of one conversation, up to the end token of its last trained response, unless it was truncated.

    `spans` is [start0, end0, start1, end1, …]: half-open ranges of the trained responses in `input_ids`, end tokens
    included. `response_weights` is the weight (> 0) of each range's tokens in the loss.
    """

    input_ids: list[int]
    spans: list[int]
    response_weights: list[float]

    @property
    def is_empty(self) -> bool:
        """Whether the responses are nothing but end tokens."""
        return all(end - start < 2 for start, end in zip(self.spans[::2], self.spans[1::2], strict=True))

    def within(self, max_length: int, overlong: Overlong = "truncate") -> "EncodedSample | None":
        """The sample within `max_length` tokens, or None where it is to be dropped.

        `truncate` keeps the first `max_length` tokens. Dropped are: a sample that is too long (`drop`), and one
        without a token to train on.
        """
        if overlong == "drop" and len(self.input_ids) > max_length:
            return None
        bounds = zip(self.spans[::2], self.spans[1::2], strict=True)
        spans = [bound for start, end in bounds if start < max_length for bound in (start, min(end, max_length))]
        weights = self.response_weights[: len(spans) // 2]
        return EncodedSample(self.input_ids[:max_length], spans, weights) if spans else None


def encode_pair(
    tokenizer: chat.Tokenizer, prompt: chat.Messages, chosen: Any, rejected: Any, template: str, **options: Any
) -> EncodedPair:
    """Token ids of one pair through a template of `load_template`, with the options of `encode_responses`.

    Prompt + response tokenised together may merge tokens across the seam. The boundary is therefore the end of the
    longest common prefix of the prompt and of both whole sequences. Both sides have the same context, and each side's
    ids are those of its whole text.

    Raises:
        InputError: the template fails, changes the prompt once a response follows, or writes no end token.
    """
    prompt_ids, *sides = chat.encode_responses(tokenizer, template, prompt, chosen, rejected, **options)
    boundary = _boundary(prompt_ids, *sides)
    return EncodedPair(prompt_ids[:boundary], *(ids[boundary:] for ids in sides))


def _boundary(*sequences: list[int]) -> int:
    if boundary := chat.shared_length(*sequences):
        return boundary
    raise InputError("the prompt and prompt + response share no token: give a prompt, or another `chat_template`")


def encode_sample(
    tokenizer: chat.Tokenizer, messages: chat.Messages, template: str, weights: Sequence[float] = (), **options: Any
) -> EncodedSample:
    """Token ids and trained responses of one conversation through a template of `load_template`, with the options of
    `encode_responses`. `weights` has the weight of each response, all 1 if empty; a response of weight 0 is context
    of the next one.

    Each trained response is encoded behind all earlier messages, as in generation. A response starts at the first
    token in which prompt and prompt + response differ, so a token merged across the seam belongs to the response.

    Raises:
        InputError: the template fails, writes no end token, or renders a turn differently once another message follows.
    """
    responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    of_each = zip(responses, weights or [1.0] * len(responses), strict=True)
    trained = {index: weight for index, weight in of_each if weight}
    if template == chat.PLAIN and len(trained) > 1:
        raise InputError(f"'plain' has no turns for {len(trained)} responses: give a `chat_template` with turns")
    input_ids, spans = list[int](), list[int]()
    for index in trained:
        prompt_ids, whole = chat.encode_responses(tokenizer, template, messages[:index], messages[index], **options)
        if chat.shared_length(input_ids, prompt_ids, whole) < len(input_ids):
            remedy = "set data.one_response_per_sample true, or give another `chat_template`"
            raise InputError(f"an earlier turn changes once message {index + 1} follows: {remedy}")
        input_ids = whole
        spans += [_boundary(prompt_ids, whole), len(whole)]
    return EncodedSample(input_ids, spans, list(trained.values()))


def encode_rows(
    dataset: Dataset,
    tokenizer: chat.Tokenizer,
    *,
    special_tokens_in_text: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    generation_prompt: chat.GenerationPrompt | None = None,
    num_proc: int | None = None,
    **limits: Any,
) -> tuple[Dataset, dict[str, int]]:
    """Encode pairs of `read_pairs` or samples of `read_samples`, cached by data, tokenizer, template and limits.

    Args:
        special_tokens_in_text: whether the name of a special token in a text becomes that token, or stays characters.
        chat_template, chat_template_kwargs: as for `load_template`. "plain" takes one response. A row's `context` wins.
        generation_prompt: as for `encode_responses`.
        num_proc: number of processes; None encodes in this process.
        limits: the arguments of `EncodedPair.within` or `EncodedSample.within`.

    Returns:
        The data set with the fields of `EncodedPair` or `EncodedSample` and `truncated` (bool) instead of the texts,
        and the counts `dropped_overlong` (or cut to equal completions), `dropped_empty` (only end tokens), `truncated`
        and, if not 0, `special_tokens_in_text`.

    Raises:
        InputError: a row cannot be encoded (the message names the row), all rows are dropped, or a limit is impossible.
    """
    from datasets import Features, Value

    noun, ids = ("sample", ("input_ids", "spans")) if "messages" in dataset.column_names else ("pair", IDS[:3])
    if not 0 < limits.get("max_prompt_length", 1) < limits["max_length"]:
        raise InputError(f"max_length must be above max_prompt_length (1 for samples), and both above 0, not {limits}")
    template = chat.load_template(tokenizer, chat_template, chat_template_kwargs)
    options = {"template": template, "special_tokens_in_text": special_tokens_in_text}
    options["generation_prompt"] = generation_prompt
    texts = [*TEXTS[noun], *({"context"} & {*dataset.column_names})]
    features = {name: feature for name, feature in dataset.features.items() if name not in texts}
    features |= {name: [Value("int32")] for name in ids}
    features |= {"truncated": Value("bool"), "status": Value("string"), "special": Value("int8")}
    # the hash of `datasets` would include the tokenizer's padding and truncation state, which changes with use
    key = [dataset._fingerprint, chat.tokenizer_state(tokenizer), options | limits, room_code()]
    encoded = dataset.map(
        partial(_encode_row, tokenizer=tokenizer, noun=noun, options=options, limits=limits),
        remove_columns=texts,
        features=Features(features),
        num_proc=num_proc,
        new_fingerprint=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
        desc=f"Encoding {noun}s",
    )
    statuses = list(encoded["status"])
    counts = {name: statuses.count(name) for name in ("dropped_overlong", "dropped_empty", "truncated")}
    if special := sum(map(bool, encoded["special"])):
        counts["special_tokens_in_text"] = special
    _refuse_nested(encoded["special"][:], chat.template_marks(tokenizer, template) if special else set())
    kept = [index for index, status in enumerate(statuses) if not status.startswith("dropped")]
    if not kept:
        raise InputError(f"no {noun} is left of {len(statuses)} ({counts}): raise max_length or truncate.")
    encoded = encoded.remove_columns(["status", "special"])
    return (encoded if len(kept) == len(statuses) else encoded.select(kept, keep_in_memory=True)), counts


def _refuse_nested(special: list[int], marks: set[str]) -> None:
    if 2 * (nested := special.count(2)) > len(special):
        held = f"the texts of {nested} of {len(special)} rows hold marks of the template ({', '.join(sorted(marks))})"
        options = "--data.chat_template plain --data.special_tokens_in_text true"
        raise InputError(f"{held}: type {options} for texts that a template has written")


def _encode_row(row: Any, tokenizer: Any, noun: str, options: Any, limits: Any) -> dict[str, Any]:
    """The ids within their limits. `status` says whether the row is dropped or truncated, and is "" if neither.
    `special` is 2 where the texts hold marks of the template, 1 for other special tokens, and 0 for none."""
    context = json.loads(row.get("context") or "{}")
    keys = chain(context.pop("keys", ()), repeat({}))  # of each message, beside role and content
    conversation, *responses = (row[name] for name in TEXTS[noun])
    messages = [*conversation, *({"role": "assistant", "content": response} for response in responses)]
    messages = [message | more for message, more in zip(messages, keys, strict=False)]
    texts: Any = [messages[:-2], *messages[-2:]] if responses else [messages]
    options = options | context
    weights = {"weights": row["response_weights"]} if "response_weights" in row else {}
    turns = partial(prompt_turns, tokenizer, texts[0], **options)
    limits = limits | ({"cut": partial(cut_prompt, turns=turns)} if responses else {})
    encode: Any = encode_pair if responses else encode_sample
    with located(f"{row['place']} ({noun}_id {row[f'{noun}_id']})"):
        whole = encode(tokenizer, *texts, **options, **weights)
        limited = whole.within(**limits)
    cut = "dropped_overlong" if limited is None else "" if limited == whole else "truncated"
    status = "dropped_empty" if whole.is_empty else cut
    named = chat.control_tokens(tokenizer, [message["content"] for message in messages])
    special = bool(named) + bool(named and named & chat.template_marks(tokenizer, options["template"]))
    return (limited or whole)._asdict() | {"truncated": status == "truncated", "status": status, "special": special}


def sizes_of(encoded: Dataset) -> tuple[np.ndarray, int]:
    """(N,) tokens of the longest sequence of each row, a prompt with its longer response or a conversation; and the
    largest token id."""
    import pyarrow.compute as pc

    names, lengths, largest = [name for name in IDS if name in encoded.column_names], [], 0
    for part in encoded.select_columns(names).with_format("arrow").iter(1000):
        first, *others = (pc.list_value_length(part[name]).to_numpy() for name in names)
        lengths.append(first + np.max([*others, 0 * first], axis=0))
        largest = max(largest, *(pc.max(pc.list_flatten(part[name])).as_py() or 0 for name in names))
    return np.concatenate(lengths), largest


def encoding_identity(
    tokenizer: chat.Tokenizer, chat_template: str | None, special_tokens_in_text: bool = False, **options: Any
) -> dict[str, str]:
    """Everything that decides the ids of a sample or pair, in parts: an error about a stored file names what differs.

    Args:
        options: `max_length`, `overlong` and, for pairs, `max_prompt_length`; `chat_template_kwargs` and
            `generation_prompt` where they are set.

    Returns:
        "tokenizer" and "template": 16 hex digits each; "lengths": as in "max_length 1024, truncate".
    """
    special = " special tokens in text" if special_tokens_in_text else ""
    asked = " generation prompt asked" if options.get("generation_prompt") == "asked" else ""
    template = chat.load_template(tokenizer, chat_template, options.get("chat_template_kwargs")) + special + asked
    parts = {"tokenizer": chat.tokenizer_state(tokenizer), "template": template}
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()}
    lengths = [f"{name} {options[name]}" for name in ("max_length", "max_prompt_length") if name in options]
    return digests | {"lengths": ", ".join([*lengths, options["overlong"]])}
