"""Chat template -> prompt, chosen and rejected token ids with one boundary that both sides share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixdpo.errors import InputError
from mixdpo.tokenization import Messages, Overlong, encode_answers, encode_table, shared_length

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


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
        InputError: the template fails, changes the prompt once an answer follows, or writes no end token.
    """
    prompt_ids, chosen_ids, rejected_ids = encode_answers(
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
