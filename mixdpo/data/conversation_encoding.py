"""Chat template -> the token ids of a conversation, and which of them are responses: only those are trained on."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixdpo.data.chat_template import PLAIN, Messages, encode_responses, load_template, shared_length, tokenizer_state
from mixdpo.data.encoding import Overlong, encode_table
from mixdpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of one conversation, up to the end token of its last response, unless it was truncated.

    `spans` is [start0, end0, start1, end1, …]: half-open ranges of the answers in `input_ids`, end tokens included.
    """

    input_ids: list[int]
    spans: list[int]

    @property
    def is_empty(self) -> bool:
        """Whether the responses are nothing but end tokens."""
        return all(end - start < 2 for start, end in zip(self.spans[::2], self.spans[1::2], strict=True))


def encode_sample(
    tokenizer: "Tokenizer", messages: Messages, template: str, *, special_tokens_in_text: bool = False
) -> EncodedSample:
    """Token ids and responses of one conversation, through a template of `load_template`; `special_tokens_in_text` as
    for `encode_samples`.

    Each response is encoded with all before it, as at generation. It starts where prompt and whole part, so that a
    token that merges across the seam belongs to the response.

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
        turn = (messages[:index], messages[index]["content"])
        prompt_ids, whole = encode_responses(tokenizer, template, *turn, special_tokens_in_text=special_tokens_in_text)
        if shared_length(input_ids, prompt_ids, whole) < len(input_ids):
            raise InputError(
                f"the chat template shows an earlier turn differently once message {index + 1} follows, so the tokens "
                "to train on are not those a model would see: give a `chat_template` that leaves earlier turns as "
                "they were, or one sample a response."
            )
        start = shared_length(prompt_ids, whole)
        if not start:
            raise InputError("the prompt and the whole sequence share no token: the prompt is empty or is changed.")
        input_ids = whole
        spans += [start, len(whole)]
    return EncodedSample(input_ids, spans)


def limit_sample(sample: EncodedSample, *, max_length: int, overlong: Overlong) -> EncodedSample | None:
    """The sample within `max_length` tokens, or None where it is to be dropped.

    `truncate` keeps the first `max_length` tokens, `drop` drops a sample that is too long. A sample without a token to
    train on is dropped always.
    """
    if overlong == "drop" and len(sample.input_ids) > max_length:
        return None
    ends = zip(sample.spans[::2], sample.spans[1::2], strict=True)
    spans = [bound for start, end in ends if start < max_length for bound in (start, min(end, max_length))]
    return EncodedSample(sample.input_ids[:max_length], spans) if spans else None


def encode_samples(
    dataset: "Dataset",
    tokenizer: "Tokenizer",
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    special_tokens_in_text: bool = False,
    chat_template: str | None = None,
    num_proc: int | None = None,
) -> tuple["Dataset", dict[str, int]]:
    """Encode the samples of `read_samples`, cached by data, tokenizer, template and limits.

    Args:
        dataset: columns sample_id, source, row, messages.
        max_length: tokens of a sample, at least 2.
        overlong: what becomes of a longer one: "truncate" keeps its first tokens, "drop" drops it.
        special_tokens_in_text: whether the name of a special token in a text, such as <|im_end|>, is that token; else
            it is the characters that it consists of.
        chat_template: as for `load_template`; "plain" takes samples of one response.
        num_proc: processes; None or 1 is this one.

    Returns:
        A data set with the columns sample_id, source, row, input_ids, spans (`EncodedSample`), truncated (bool), and
        the counts `dropped_overlong`, `dropped_empty` (responses of nothing but end tokens), `truncated` and, where
        there are such rows, `special_tokens_in_text`.

    Raises:
        InputError: a sample cannot be encoded (with its row), or all are dropped, or a limit is impossible.
    """
    if max_length < 2:
        raise InputError(f"max_length should be at least 2, not {max_length}.")
    limits = {"max_length": max_length, "overlong": overlong}
    options = {"chat_template": chat_template, "special_tokens_in_text": special_tokens_in_text, "num_proc": num_proc}
    kinds = (EncodedSample, encode_sample, limit_sample)
    return encode_table(dataset, "sample", *kinds, limits, tokenizer, __file__, **options)


def encoding_identity(
    tokenizer: "Tokenizer",
    chat_template: str | None,
    *,
    max_length: int,
    overlong: Overlong,
    special_tokens_in_text: bool = False,
    max_prompt_length: int | None = None,
) -> dict[str, str]:
    """What decides the ids of a sample, or of a pair, part by part: says which differs from that of a stored file.

    Returns:
        "tokenizer" and "template": 16 hex digits each; "lengths": as in "max_length 1024, truncate".
    """
    prompt = "" if max_prompt_length is None else f"max_prompt_length {max_prompt_length}, "
    special = " special tokens in text" if special_tokens_in_text else ""
    return {
        "tokenizer": _digest(tokenizer_state(tokenizer)),
        "template": _digest(load_template(tokenizer, chat_template) + special),
        "lengths": f"max_length {max_length}, {prompt}{overlong}",
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
