"""Chat template -> prompt, chosen and rejected token ids with one boundary that both sides share."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mixdpo.data import control_tokens as control
from mixdpo.data.chat_template import Messages, encode_responses, load_template, shared_length, tokenizer_state
from mixdpo.data.control_tokens import control_tokens
from mixdpo.errors import InputError, check_one_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


Overlong = Literal["truncate", "drop"]


IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids")


TEXTS = ("prompt", "chosen", "rejected", "messages")


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


def encode_pair(
    tokenizer: "Tokenizer",
    prompt: Messages,
    chosen: str,
    rejected: str,
    template: str,
    *,
    special_tokens_in_text: bool = False,
) -> EncodedPair:
    """Token ids of one pair through a template of `load_template`; `special_tokens_in_text` as for `encode_pairs`.

    Prompt + completion tokenised together may merge tokens across the seam. The boundary is the longest common prefix
    of the prompt and of both whole sequences: the same context for both sides, and each side's ids are those of its
    whole text.

    Raises:
        InputError: the template fails, changes the prompt once a response follows, or writes no end token.
    """
    prompt_ids, chosen_ids, rejected_ids = encode_responses(
        tokenizer, template, prompt, chosen, rejected, special_tokens_in_text=special_tokens_in_text
    )
    boundary = shared_length(prompt_ids, chosen_ids, rejected_ids)
    if not boundary:
        raise InputError("the prompt and the two whole sequences share no token: the prompt is empty or is changed.")
    return EncodedPair(prompt_ids[:boundary], chosen_ids[boundary:], rejected_ids[boundary:])


def limit_lengths(
    pair: EncodedPair, *, max_length: int, max_prompt_length: int, overlong: Overlong
) -> EncodedPair | None:
    """The pair within `max_length` tokens (prompt + longer completion), or None where it is to be dropped.

    `truncate` touches only a pair that is too long: its prompt keeps its last `max_prompt_length` tokens (a BOS goes
    first), then each completion its first `max_length` - prompt tokens, and so loses its end token; a
    pair of which that leaves two equal completions is dropped.
    `drop` drops a pair that is too long. A pair with an empty completion is dropped always.

    Raises:
        InputError: the limits leave no room for a completion.
    """
    if not 0 < max_prompt_length < max_length:
        raise InputError(
            f"max_prompt_length ({max_prompt_length}) should be above 0 and below max_length ({max_length})."
        )
    if not pair.chosen_ids or not pair.rejected_ids:
        return None
    if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length:
        return pair
    if overlong == "drop":
        return None
    prompt_ids = pair.prompt_ids[-max_prompt_length:]
    room = max_length - len(prompt_ids)
    cut = EncodedPair(prompt_ids, pair.chosen_ids[:room], pair.rejected_ids[:room])
    return None if cut.chosen_ids == cut.rejected_ids else cut


def encode_pairs(
    dataset: "Dataset",
    tokenizer: "Tokenizer",
    *,
    max_length: int,
    max_prompt_length: int,
    overlong: Overlong = "truncate",
    special_tokens_in_text: bool = False,
    chat_template: str | None = None,
    num_proc: int | None = None,
) -> tuple["Dataset", dict[str, int]]:
    """Encode the pairs of `read_pairs`, cached by data, tokenizer, template and limits.

    Args:
        dataset: columns pair_id, margin, row, prompt, chosen, rejected.
        special_tokens_in_text: whether the name of a special token in a text, such as <|im_end|>, is that token; else
            it is the characters that it consists of.
        num_proc: processes; None or 1 is this one.

    Returns:
        A data set with the columns pair_id, margin, row, prompt_ids, chosen_ids, rejected_ids, truncated (bool), and
        the counts `dropped_overlong` (or cut to two equal completions), `dropped_empty` (a completion of nothing but
        its end token), `truncated` and, where there are such rows, `special_tokens_in_text`.

    Raises:
        InputError: a pair cannot be encoded (with its row), or all are dropped.
    """
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": overlong}
    limit_lengths(EncodedPair([0], [0], [0]), **limits)  # refuse impossible limits before the work starts
    options = {"chat_template": chat_template, "special_tokens_in_text": special_tokens_in_text, "num_proc": num_proc}
    kinds = (EncodedPair, encode_pair, limit_lengths)
    return encode_table(dataset, "pair", *kinds, limits, tokenizer, __file__, **options)


def encode_table(
    dataset: "Dataset",
    noun: str,
    kind: type,
    encode: Callable[..., Any],
    limit: Callable[..., Any],
    limits: dict[str, Any],
    tokenizer: "Tokenizer",
    *modules: str,
    chat_template: str | None,
    special_tokens_in_text: bool,
    num_proc: int | None,
) -> tuple["Dataset", dict[str, int]]:
    """What `encode_pairs` and `encode_samples` return: a column of ids for each field of `kind` instead of the text.

    Args:
        encode: `encode_pair` or the like: makes a `kind`, whose ids `limit` keeps within the `limits` (None: too long).
        modules: the files with their code, this one aside: the cached table depends on it.
    """
    from datasets import Features, Value

    check_one_of("overlong", limits["overlong"], get_args(Overlong))
    template = load_template(tokenizer, chat_template)
    texts = [name for name in TEXTS if name in dataset.column_names]
    features = {name: feature for name, feature in dataset.features.items() if name not in texts}
    features |= {name: [Value("int32")] for name in kind.__annotations__}
    options = {"template": template, "special_tokens_in_text": special_tokens_in_text}
    steps = {"encode": partial(encode, tokenizer, **options), "limit": partial(limit, **limits)}
    encoded = dataset.map(
        partial(_encode_row, noun=noun, texts=texts, tokenizer=tokenizer, **steps),
        remove_columns=texts,
        features=Features(features | {"truncated": Value("bool"), "status": Value("string"), "special": Value("bool")}),
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        new_fingerprint=_key(dataset, tokenizer, options | limits, *modules),
        desc=f"Encoding {noun}s",
    )
    statuses = list(encoded["status"])
    kept = [index for index, status in enumerate(statuses) if not status.startswith("dropped")]
    counts = {name: statuses.count(name) for name in ("dropped_overlong", "dropped_empty", "truncated")}
    counts |= {"special_tokens_in_text": count} if (count := sum(encoded["special"])) else {}
    if not kept:
        raise InputError(
            f"no {noun} is left of {len(statuses)} ({counts}): raise max_length ({limits['max_length']}) or truncate."
        )
    encoded = encoded.remove_columns(["status", "special"])
    return (encoded if len(kept) == len(statuses) else encoded.select(kept, keep_in_memory=True)), counts


def _encode_row(
    row: dict[str, Any],
    noun: str,
    texts: list[str],
    tokenizer: "Tokenizer",
    encode: Callable[..., Any],
    limit: Callable[[Any], Any],
) -> dict[str, Any]:
    """The ids within their limits, and what became of the row: `status` is "" where nothing did. `special`: whether the
    text holds special tokens."""
    columns = [row[name] for name in texts]
    try:
        whole = encode(*columns)
    except InputError as error:
        raise InputError(f"row {row['row']} ({noun}_id {row[f'{noun}_id']}): {error}") from error
    limited, status = limit(whole), ""
    if whole.is_empty:
        status = "dropped_empty"
    elif limited is None:
        status = "dropped_overlong"
    elif limited != whole:
        status = "truncated"
    said = [text for c in columns for text in ([c] if isinstance(c, str) else [message["content"] for message in c])]
    facts = {"truncated": status == "truncated", "status": status, "special": bool(control_tokens(tokenizer, said))}
    return vars(limited or whole) | facts


def largest_id(*encoded: "Dataset") -> int:
    """The largest token id in encoded tables."""
    import pyarrow.compute as pc

    columns = (
        column
        for table in encoded
        for name, column in zip(table.column_names, table.data.columns, strict=True)
        if name in IDS
    )
    return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)


def _key(dataset: "Dataset", tokenizer: "Tokenizer", options: dict[str, Any], *modules: str) -> str:
    """Cache key of the encoding: everything that it depends on, this code and that of the files `modules` included.

    The hash `datasets` would make itself pickles the tokenizer, whose padding and truncation state changes with use.
    """
    code = [Path(str(module)).read_text("utf-8") for module in (__file__, control.__file__, *modules)]
    parts = [dataset._fingerprint, tokenizer_state(tokenizer), options, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
