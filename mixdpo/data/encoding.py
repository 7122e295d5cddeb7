"""Pairs and conversations -> token ids and the spans that are trained on, cut to length, cached."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from mixdpo.data.chat_template import (
    PLAIN,
    Messages,
    control_tokens,
    encode_responses,
    load_template,
    shared_length,
    tokenizer_state,
)
from mixdpo.data.table import room_code
from mixdpo.errors import InputError, check_one_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


Overlong = Literal["truncate", "drop"]
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids")
NO_PROMPT = "the prompt and the whole sequence share no token: the prompt is empty or is changed."


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair. A completion ends with its end token, unless it was truncated."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def is_empty(self) -> bool:
        """Whether a completion is nothing but its end token."""
        return min(len(self.chosen_ids), len(self.rejected_ids)) < 2

    def within(self, *, max_length: int, max_prompt_length: int, overlong: Overlong) -> "EncodedPair | None":
        """The pair within `max_length` tokens (prompt + longer completion), or None where it is to be dropped.

        `truncate` touches only a pair that is too long. The prompt keeps its last `max_prompt_length` tokens (a BOS
        goes first), then each completion its first `max_length` - prompt tokens, so that it loses its end token.
        Dropped are: a pair that is too long (`drop`), one cut to two equal completions, and one with an empty
        completion.
        """
        if not self.chosen_ids or not self.rejected_ids:
            return None
        if len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)) <= max_length:
            return self
        prompt_ids = self.prompt_ids[-max_prompt_length:]
        room = max_length - len(prompt_ids)
        cut = EncodedPair(prompt_ids, self.chosen_ids[:room], self.rejected_ids[:room])
        return None if overlong == "drop" or cut.chosen_ids == cut.rejected_ids else cut


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of one conversation, up to the end token of its last response, unless it was truncated.

    `spans` is [start0, end0, start1, end1, …]: half-open ranges of the responses in `input_ids`, end tokens included.
    """

    input_ids: list[int]
    spans: list[int]

    @property
    def is_empty(self) -> bool:
        """Whether the responses are nothing but end tokens."""
        return all(end - start < 2 for start, end in zip(self.spans[::2], self.spans[1::2], strict=True))

    def within(self, *, max_length: int, overlong: Overlong) -> "EncodedSample | None":
        """The sample within `max_length` tokens, or None where it is to be dropped.

        `truncate` keeps the first `max_length` tokens. Dropped are: a sample that is too long (`drop`), and one
        without a token to train on.
        """
        if overlong == "drop" and len(self.input_ids) > max_length:
            return None
        bounds = zip(self.spans[::2], self.spans[1::2], strict=True)
        spans = [bound for start, end in bounds if start < max_length for bound in (start, min(end, max_length))]
        return EncodedSample(self.input_ids[:max_length], spans) if spans else None


def encode_pair(
    tokenizer: "Tokenizer", prompt: Messages, chosen: str, rejected: str, template: str, **options: bool
) -> EncodedPair:
    """Token ids of one pair through a template of `load_template`, with the options of `encode_responses`.

    Prompt + response tokenised together may merge tokens across the seam. The boundary is the longest common prefix
    of the prompt and of both whole sequences: the same context for both sides, and each side's ids are those of its
    whole text.

    Raises:
        InputError: the template fails, changes the prompt once a response follows, or writes no end token.
    """
    prompt_ids, chosen_ids, rejected_ids = encode_responses(tokenizer, template, prompt, chosen, rejected, **options)
    boundary = shared_length(prompt_ids, chosen_ids, rejected_ids)
    if not boundary:
        raise InputError(NO_PROMPT)
    return EncodedPair(prompt_ids[:boundary], chosen_ids[boundary:], rejected_ids[boundary:])


def encode_sample(tokenizer: "Tokenizer", messages: Messages, template: str, **options: bool) -> EncodedSample:
    """Token ids and responses of one conversation through a template of `load_template`, with the options of
    `encode_responses`.

    Each response is encoded with all before it, as at generation. A response starts where prompt and whole part, so
    that a token that merges across the seam belongs to the response.

    Raises:
        InputError: the template fails, writes no end token, or changes what it wrote once the conversation goes on.
    """
    responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if template == PLAIN and len(responses) > 1:
        raise InputError(
            f"there are {len(responses)} responses, and {PLAIN!r} has no mark between turns, so it takes one: give a "
            "`chat_template` with turns, or one sample a response."
        )
    input_ids: list[int] = []
    spans: list[int] = []
    for index in responses:
        before, response = messages[:index], messages[index]["content"]
        prompt_ids, whole = encode_responses(tokenizer, template, before, response, **options)
        if shared_length(input_ids, prompt_ids, whole) < len(input_ids):
            raise InputError(
                f"the chat template shows an earlier turn differently once message {index + 1} follows, so the tokens "
                "to train on are not those a model would see: give a `chat_template` that leaves earlier turns as "
                "they were, or one sample a response."
            )
        start = shared_length(prompt_ids, whole)
        if not start:
            raise InputError(NO_PROMPT)
        input_ids = whole
        spans += [start, len(whole)]
    return EncodedSample(input_ids, spans)


class Kind(NamedTuple):
    """What a table holds: name of a row, columns with its text, and how the text becomes ids."""

    noun: str
    texts: list[str]
    ids: type[EncodedPair] | type[EncodedSample]
    encode: Callable[..., Any]


PAIRS = Kind("pair", ["prompt", "chosen", "rejected"], EncodedPair, encode_pair)
SAMPLES = Kind("sample", ["messages"], EncodedSample, encode_sample)


def encode_rows(
    dataset: "Dataset",
    tokenizer: "Tokenizer",
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    overlong: Overlong = "truncate",
    special_tokens_in_text: bool = False,
    chat_template: str | None = None,
    num_proc: int | None = None,
) -> tuple["Dataset", dict[str, int]]:
    """Encode pairs of `read_pairs` or samples of `read_samples`, cached by data, tokenizer, template and limits.

    Args:
        max_length: tokens of a sample, or of a pair's prompt + longer completion.
        max_prompt_length: of pairs only: tokens of the prompt of a pair that is too long.
        overlong: as for `EncodedPair.within` and `EncodedSample.within`.
        special_tokens_in_text: whether the name of a special token in a text, such as <|im_end|>, is that token; else
            it is the characters that it consists of.
        chat_template: as for `load_template`; "plain" takes samples of one response.
        num_proc: processes; None is this one.

    Returns:
        The data set with the fields of `EncodedPair` or `EncodedSample` and `truncated` (bool) instead of the texts,
        and the counts `dropped_overlong` (or cut to two equal completions), `dropped_empty` (nothing but end tokens),
        `truncated` and, where there are such rows, `special_tokens_in_text`.

    Raises:
        InputError: a row cannot be encoded (says which), all are dropped, or a limit is impossible.
    """
    from datasets import Features, Value

    kind = SAMPLES if "messages" in dataset.column_names else PAIRS
    limits = _checked_limits(kind, max_length, max_prompt_length, overlong)
    options = {"template": load_template(tokenizer, chat_template), "special_tokens_in_text": special_tokens_in_text}
    features = {name: feature for name, feature in dataset.features.items() if name not in kind.texts}
    features |= {name: [Value("int32")] for name in kind.ids.__annotations__}
    features |= {"truncated": Value("bool"), "status": Value("string"), "special": Value("bool")}
    encoded = dataset.map(
        partial(_encode_row, tokenizer=tokenizer, kind=kind, options=options, limits=limits),
        remove_columns=kind.texts,
        features=Features(features),
        num_proc=num_proc,
        new_fingerprint=_key(dataset, tokenizer, options | limits),
        desc=f"Encoding {kind.noun}s",
    )
    statuses = list(encoded["status"])
    counts = {name: statuses.count(name) for name in ("dropped_overlong", "dropped_empty", "truncated")}
    counts |= {"special_tokens_in_text": count} if (count := sum(encoded["special"])) else {}
    kept = [index for index, status in enumerate(statuses) if not status.startswith("dropped")]
    if not kept:
        raise InputError(
            f"no {kind.noun} is left of {len(statuses)} ({counts}): raise max_length ({max_length}) or truncate."
        )
    encoded = encoded.remove_columns(["status", "special"])
    return (encoded if len(kept) == len(statuses) else encoded.select(kept, keep_in_memory=True)), counts


def _checked_limits(kind: Kind, max_length: int, max_prompt_length: Any, overlong: Overlong) -> dict[str, Any]:
    """The arguments of `within`."""
    check_one_of("overlong", overlong, get_args(Overlong))
    if not 0 < (max_prompt_length if kind is PAIRS else 1) < max_length:
        raise InputError(
            f"max_length ({max_length}) must be at least 2 and, for pairs, above max_prompt_length "
            f"({max_prompt_length}), which must be at least 1."
        )
    limits = {"max_length": max_length, "overlong": overlong}
    return limits | ({"max_prompt_length": max_prompt_length} if kind is PAIRS else {})


def _encode_row(
    row: dict[str, Any], tokenizer: "Tokenizer", kind: Kind, options: dict[str, Any], limits: dict[str, Any]
) -> dict[str, Any]:
    """The ids within their limits, and what became of the row: `status` is "" where nothing did. `special`: whether the
    text holds special tokens."""
    texts = [row[name] for name in kind.texts]
    try:
        whole = kind.encode(tokenizer, *texts, **options)
    except InputError as error:
        raise InputError(f"row {row['row']} ({kind.noun}_id {row[f'{kind.noun}_id']}): {error}") from error
    limited, status = whole.within(**limits), ""
    if whole.is_empty:
        status = "dropped_empty"
    elif limited is None:
        status = "dropped_overlong"
    elif limited != whole:
        status = "truncated"
    messages = [m for text in texts for m in ([{"content": text}] if isinstance(text, str) else text)]
    special = bool(control_tokens(tokenizer, [message["content"] for message in messages]))
    return vars(limited or whole) | {"truncated": status == "truncated", "status": status, "special": special}


def _key(dataset: "Dataset", tokenizer: "Tokenizer", options: dict[str, Any]) -> str:
    """Cache key of the encoding: everything that the ids depend on, the code of this room included.

    The hash `datasets` would make itself pickles the tokenizer, whose padding and truncation state changes with use.
    """
    parts = [dataset._fingerprint, tokenizer_state(tokenizer), options, room_code()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def largest_id(*encoded: "Dataset") -> int:
    """The largest token id in encoded tables."""
    import pyarrow.compute as pc

    columns = (table.data.column(name) for table in encoded for name in IDS if name in table.column_names)
    return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)


def encoding_identity(
    tokenizer: "Tokenizer", chat_template: str | None, *, special_tokens_in_text: bool = False, **limits: Any
) -> dict[str, str]:
    """What decides the ids of a sample, or of a pair, part by part: says which differs from that of a stored file.

    Args:
        limits: `max_length`, `overlong` and, of pairs, `max_prompt_length`.

    Returns:
        "tokenizer" and "template": 16 hex digits each; "lengths": as in "max_length 1024, truncate".
    """
    special = " special tokens in text" if special_tokens_in_text else ""
    parts = {"tokenizer": tokenizer_state(tokenizer), "template": load_template(tokenizer, chat_template) + special}
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()}
    lengths = [f"{name} {limits[name]}" for name in ("max_length", "max_prompt_length") if name in limits]
    return digests | {"lengths": ", ".join([*lengths, limits["overlong"]])}
