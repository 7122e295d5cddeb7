"""Messages -> token ids through a chat template. Special tokens that stand in a text stay text, unless asked for."""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdpo.errors import InputError
from mixdpo.storage.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


Messages = list[dict[str, str]]
PLAIN = "plain"
TODAY_CALL = re.compile(r"""\bstrftime_now\s*\((?:\s*(?P<quote>["'])(?P<form>[^"']*)(?P=quote)\s*\)|[^)]*\)?)""")
DATE = datetime(2024, 7, 26)
"""Stands where a template writes today's date, as Llama-3.2's does: the same text must be the same tokens tomorrow. The
date is the one that Llama's template falls back to."""


def load_template(tokenizer: "Tokenizer", chat_template: str | None) -> str:
    """The Jinja template to render with, or `"plain"`; today's date in it is `DATE`.

    Args:
        tokenizer: its own template is used when `chat_template` is None.
        chat_template: path of a template, a template itself, or `"plain"`: the prompt's messages joined by a newline,
            directly followed by the response and the tokenizer's eos token.

    Raises:
        InputError: there is no template, `chat_template` is neither a file nor a template, or the template writes
            today's date in a form that is not given as a text.
    """
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: give `chat_template`, a path of a "
                f"Jinja template or {PLAIN!r} (prompt, response and eos token as they are)."
            )
        template = tokenizer.get_chat_template()
    elif chat_template == PLAIN or _is_template(chat_template):
        template = chat_template
    elif not (path := Path(chat_template).expanduser()).is_file():
        raise InputError(f"chat_template {chat_template!r} is no file, no Jinja template and not {PLAIN!r}.")
    elif not _is_template(template := read_text(path)):
        raise InputError(f"chat_template {chat_template!r} holds no Jinja template: there is no {{{{ or {{% in it.")
    return TODAY_CALL.sub(_dated, template)


def _dated(call: re.Match[str]) -> str:
    if call["form"] is None:
        raise InputError(
            f"the chat template writes today's date by {call[0]!r}, and no text says in which form: give a copy as "
            "`chat_template` in which a date stands there"
        )
    return repr(DATE.strftime(call["form"]))


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def shared_length(*sequences: Any) -> int:
    """Length of the longest common prefix, which is that of the first and the last in lexicographic order."""
    first, last = min(sequences), max(sequences)
    return next((position for position, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def encode_responses(
    tokenizer: "Tokenizer", template: str, prompt: Messages, *responses: str, special_tokens_in_text: bool = False
) -> list[list[int]]:
    """Ids of the prompt and of prompt + each response with its end token, through a template of `load_template`.

    Raises:
        InputError: the template fails, changes the prompt once a response follows, leaves out part of a response, or
            writes no end token.
    """
    contents = [*(message["content"] for message in prompt), *responses]
    as_text = not special_tokens_in_text and bool(control_tokens(tokenizer, contents))
    if template == PLAIN:
        return _encode_plain(tokenizer, prompt, responses, as_text)
    chats = [prompt, *([*prompt, {"role": "assistant", "content": response}] for response in responses)]
    texts = [_render(tokenizer, template, chat, chat is prompt) for chat in chats]
    _check_rendered(texts, prompt, responses)
    if as_text:
        encoded = [_chat_ids_as_text(tokenizer, template, chat, chat is prompt) for chat in chats]
    else:  # the template writes BOS itself: special tokens added here would double it
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [encoded[0], *(_cut_after_end_token(tokenizer, whole) for whole in encoded[1:])]


def _render(tokenizer: "Tokenizer", template: str, messages: Messages, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it can fail in any way
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template refuses messages of the roles ({roles}): {error}. Give another `chat_template`, or "
            "other roles"
        ) from error


def _check_rendered(texts: list[str], prompt: Messages, responses: Sequence[str]) -> None:
    """The texts of the prompt and of prompt + each response show all messages, and the prompt alike."""
    shared = texts[0][: shared_length(*texts)]
    if prompt[-1]["content"].strip() not in shared:
        raise InputError(
            "the chat template shows the last user message differently once a response follows it, or not at all: give "
            "another `chat_template`"
        )
    if any(message["role"] == "system" and message["content"].strip() not in shared for message in prompt):
        raise InputError(
            "the chat template leaves the system message out: give a `chat_template` that shows it, or data without"
        )
    if any(_bare(response) not in _bare(text) for response, text in zip(responses, texts[1:], strict=True)):
        raise InputError(
            "the chat template leaves out part of a response (reasoning, perhaps): give a `chat_template` that shows it"
        )


def _bare(text: str) -> str:
    """Without white space, which templates trim."""
    return "".join(text.split())


def _cut_after_end_token(tokenizer: "Tokenizer", ids: list[int]) -> list[int]:
    """Without the white space that templates add after the end token: a model never gets to generate it."""
    for end in range(len(ids), 0, -1):
        text = tokenizer.decode(ids[end - 1 : end])
        if text and not tokenizer.decode(ids[end - 1 : end], skip_special_tokens=True):
            return ids[:end]
        if text.strip():
            break
    raise InputError(
        f"the chat template ends a response with {tokenizer.decode(ids[-3:])!r}, which is no special token: the model "
        "would never learn to stop. Give a `chat_template` that writes eos_token after a response."
    )


def _encode_plain(tokenizer: "Tokenizer", prompt: Messages, responses: Sequence[str], as_text: bool) -> list[list[int]]:
    """BOS, where the tokenizer starts a text with it, + text as it is; eos after a response."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos token, and {PLAIN!r} ends a response with it: name "
            "one in its tokenizer_config.json, or give another `chat_template`"
        )
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    text = "\n".join(message["content"] for message in prompt)
    texts = [text, *(text + response for response in responses)]
    options = {"split_special_tokens": True} if as_text else {}
    prompt_ids, *wholes = tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"]
    names = control_tokens(tokenizer, texts) if as_text else set()
    if made := [name for name in names if tokenizer.convert_tokens_to_ids(name) in set().union(prompt_ids, *wholes)]:
        raise InputError(UNAVOIDABLE.format(", ".join(made)))
    return [start + prompt_ids, *(start + whole + [eos] for whole in wholes)]


# Special tokens in a text, such as <|im_end|> in a user's message.

UNAVOIDABLE = (
    "the text holds a special token that this tokenizer cannot read as plain text ({}): take it out of the text, or "
    "set data.special_tokens_in_text true"
)


def control_tokens(tokenizer: "Tokenizer", texts: Iterable[str]) -> set[str]:
    """The tokenizer's special tokens that the texts hold."""
    find = _pattern(tokenizer, len(tokenizer)).findall
    return {token for text in texts for token in find(text)}


@lru_cache(maxsize=8)
def _pattern(tokenizer: "Tokenizer", size: int) -> re.Pattern[str]:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def _chat_ids_as_text(
    tokenizer: "Tokenizer", template: str, messages: Messages, add_generation_prompt: bool
) -> list[int]:
    """Ids of messages through a template, in which only what the template writes becomes a special token."""
    if tokenizer.chat_control_tokens is None:
        tokenizer.chat_control_tokens = []  # else <think> and the like, no special tokens, would be text as well
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(messages, **options, sanitize_control_tokens=True)["input_ids"]
    except ValueError as error:
        raise InputError(UNAVOIDABLE.format(error)) from error


def tokenizer_state(tokenizer: "Tokenizer") -> str:
    """What decides the ids of a text, as json: not the padding and truncation state, which changes with use.

    Raises:
        InputError: it is not a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json), which is needed here.")
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([backend, special], sort_keys=True)
