"""Where a prompt that is too long is cut: its start and its newest end stay."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from mixdpo.data.chat_template import Messages, Tokenizer, encode_responses, shared_length

Turns = Sequence[tuple[int, int]]
"""Where the text of each message, from the first user's on, begins and ends in the ids of a prompt."""


def cut_prompt(ids: list[int], room: int, turns: Callable[[], Turns] = lambda: [(0, sys.maxsize)]) -> list[int]:
    """The prompt's newest tokens behind the template's start: BOS, system message and the mark of the turn that is cut.
    A turn's mark is what stands between the text before and its own text. [] if the room is too small."""
    places = turns()
    head = before = places[0][0]
    for begin, end in places:
        start = len(ids) - room + head + begin - before
        if start < min(end, len(ids)):
            return ids[:head] + ids[before:begin] + ids[max(start, begin) :]
        before = end
    return []


def prompt_turns(tokenizer: Tokenizer, prompt: Messages, **options: Any) -> Turns:
    """Where each text lies: the tokens that are gone once its message is empty. Options as for `encode_responses`."""
    (ids,) = encode_responses(tokenizer, prompt=prompt, **options)
    turns = []
    for number in range([message["role"] for message in prompt].index("user"), len(prompt)):
        without = [*prompt[:number], {**prompt[number], "content": ""}, *prompt[number + 1 :]]
        (rest,) = encode_responses(tokenizer, prompt=without, **options)
        begin = shared_length(ids, rest)
        turns.append((begin, max(begin, len(ids) - shared_length(ids[::-1], rest[::-1]))))
    return turns
