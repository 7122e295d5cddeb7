"""Messages -> token ids through a chat template. A special token inside a text stays text, unless asked for."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mixdpo.errors import InputError
from mixdpo.storage.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
Messages = list[dict[str, str]]
GenerationPrompt = Literal["trained", "asked"]
PLAIN = "plain"
TODAY_CALL = re.compile(r"""\bstrftime_now\s*\((?:\s*(?P<quote>["'])(?P<form>[^"']*)(?P=quote)\s*\)|[^)]*\)?)""")
IN_TEMPLATE = re.compile(r"\{\{|\{%")
FIXED = ("messages", "tools", "documents", "add_generation_prompt")  # variables that transformers sets
DATE = datetime(2024, 7, 26)
"""Replaces today's date in a template that writes today's date, such as Llama-3.2's. The same text then becomes the
same tokens on every day. Llama's template falls back to the same date."""


def load_template(
    tokenizer: Tokenizer, chat_template: str | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """The Jinja template to render with, or `"plain"`. `DATE` replaces today's date in the template.

    Args:
        tokenizer: the source of the template when `chat_template` is None.
        chat_template: path of a template, a template itself, or `"plain"`. Plain joins the prompt's messages by
            newlines and appends the response and the tokenizer's eos token.
        chat_template_kwargs: variables of the template and their values, written into it, so that an export keeps them.

    Raises:
        InputError: there is no template, or several named ones without a default; `chat_template` is neither a file nor
            a template; the template does not use a variable, or it calls `strftime_now` with anything but a string
            literal.
    """
    if chat_template is None:
        own = tokenizer.chat_template
        if own is None or (isinstance(own, dict) and "default" not in own):
            has = f"named chat templates ({', '.join(own)}) without a default" if own else "no chat template"
            raise InputError(f"the tokenizer has {has}: set `chat_template` to a Jinja file or to {PLAIN!r}")
        template = tokenizer.get_chat_template()
    elif chat_template == PLAIN or IN_TEMPLATE.search(chat_template):
        template = chat_template
    elif not IN_TEMPLATE.search(template := read_text(Path(chat_template).expanduser())):
        raise InputError(f"chat_template {chat_template!r} holds no Jinja template (no {{{{ or {{%): give another file")
    values = chat_template_kwargs or {}
    _check_used(template, values, {*FIXED, *tokenizer.special_tokens_map})
    given = [f"{{% set {name} = {name} if {name} is defined else {value!r} %}}" for name, value in values.items()]
    return "".join(given) + TODAY_CALL.sub(_dated, template)


def _check_used(template: str, values: Iterable[str], fixed: Collection[str] = ()) -> None:
    taken = set() if template == PLAIN else {*re.findall(r"\w+", template)} - {*fixed}
    if unused := [name for name in values if name not in taken]:
        where = "the row's tools or chat_template_kwargs, or data.chat_template_kwargs"
        raise InputError(f"the chat template cannot take {', '.join(unused)}: give another, or drop it from {where}")


def _dated(call: re.Match[str]) -> str:
    if call["form"] is None:
        raise InputError(f"the chat template writes today's date by {call[0]!r}: give a `chat_template` with a date")
    return repr(DATE.strftime(call["form"]))


def shared_length(*sequences: Any) -> int:
    """Length of the longest common prefix. The first and the last in lexicographic order share no longer one."""
    first, last = min(sequences), max(sequences)
    return next((position for position, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def encode_responses(
    tokenizer: Tokenizer,
    template: str,
    prompt: Messages,
    *responses: str | dict[str, str],
    special_tokens_in_text: bool = False,
    generation_prompt: GenerationPrompt | None = None,
    values: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Ids of the prompt and of prompt + each response with its end token, through a template of `load_template`.

    Args:
        responses: texts, or messages of the assistant.
        generation_prompt: what precedes a response if the template opens a response (with <think>) only where it asks
            for one. "asked" is the text that asks for a response, "trained" that of a finished conversation. None
            refuses such a template.
        values: what the template gets beside the messages, as `template_values` reads it.

    Raises:
        InputError: the template fails, changes the prompt once a response follows, leaves out part of a response,
            does not use what it is given, or writes no end token.
    """
    values = values or {}
    _check_used(template, values)
    turns = [{"role": "assistant", "content": each} if isinstance(each, str) else each for each in responses]
    answers = [turn["content"] for turn in turns]
    contents = [*(message["content"] for message in prompt), *answers, json.dumps(values, ensure_ascii=False)]
    as_text = not special_tokens_in_text and bool(control_tokens(tokenizer, contents))
    if template == PLAIN:
        return _encode_plain(tokenizer, prompt, answers, as_text)
    render = partial(_render, tokenizer, template, **values)
    chats = [prompt, *([*prompt, turn] for turn in turns)]
    texts = [render(chat, chat is prompt, tokenize=False) for chat in chats]
    _check_rendered(texts, prompt, answers)
    if generation_prompt != "trained" and (shared := shared_length(*texts)) < len(texts[0]):
        if shared < shared_length(render(prompt, False, tokenize=False), *texts[1:]):
            raise InputError(CHANGED)
        if generation_prompt is None:
            whole = next(text for text in texts if not text.startswith(texts[0]))[max(0, shared - 40) :][:60]
            asks = f"the chat template asks for a response after {texts[0][-60:]!r}, but writes a finished conversation"
            ways = "--data.generation_prompt asked (train behind the first) or trained (behind what both share)"
            raise InputError(f"{asks} as {whole!r}: type {ways}")
        if as_text:
            raise InputError(UNAVOIDABLE.format("with data.generation_prompt asked"))
        texts[1:] = [texts[0] + text[shared:] for text in texts[1:]]
    if as_text:
        # None would make text of <think> and the like as well, which are no special tokens
        tokenizer.chat_control_tokens = tokenizer.chat_control_tokens or []
        options = {"sanitize_control_tokens": True, "return_dict": False}
        encoded = [render(chat, chat is prompt, **options) for chat in chats]
    else:  # the template writes BOS itself: special tokens added here would double it
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ended = [_to_end_token(tokenizer, whole) for whole in encoded[1:]]
    if None in ended:
        tail = tokenizer.decode(encoded[1 + ended.index(None)][-3:])
        raise InputError(f"a response ends in {tail!r}, no special token: give a `chat_template` that writes eos_token")
    return [encoded[0], *ended]


CHANGED = "the chat template leaves out part of a message, or changes the prompt once a response follows: give another"


def _render(tokenizer: Tokenizer, template: str, chat: Messages, is_prompt: bool, /, **options: Any) -> Any:
    """Messages through a template, as text, or as ids in which only the template's own text becomes special tokens."""
    try:
        return tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=is_prompt, **options)
    except Exception as error:  # a template is a program: it can fail in any way
        if "sanitize_control_tokens" in options:
            raise InputError(UNAVOIDABLE.format(error)) from error
        roles = ", ".join(message["role"] for message in chat)
        raise InputError(f"the chat template refuses the roles ({roles}): {error}. Give another template") from error


def _check_rendered(texts: list[str], prompt: Messages, responses: Sequence[str]) -> None:
    """Refuse rendered texts that lack a message, or that show the prompt differently once a response follows. White
    space in a response does not count, because templates trim responses."""
    shared = texts[0][: shared_length(*texts)]
    shown = [message["content"].strip() for message in prompt if message["role"] == "system" or message is prompt[-1]]
    trimmed = [("".join(a.split()), "".join(b.split())) for a, b in zip(responses, texts[1:], strict=True)]
    if not all(content in shared for content in shown) or not all(content in text for content, text in trimmed):
        raise InputError(CHANGED)


def _to_end_token(tokenizer: Tokenizer, ids: list[int]) -> list[int] | None:
    """The ids up to the end token, or None if they do not end in one. A model never generates the white space that
    templates add after the end token."""
    for end in range(len(ids), 0, -1):
        text = tokenizer.decode(ids[end - 1 : end])
        if text and not tokenizer.decode(ids[end - 1 : end], skip_special_tokens=True):
            return ids[:end]
        if text.strip():
            break
    return None


def _encode_plain(tokenizer: Tokenizer, prompt: Messages, responses: Sequence[str], as_text: bool) -> list[list[int]]:
    """Ids of BOS (if the tokenizer starts a text with BOS) and of the plain text; eos follows a response. Neither is
    added to a text that has it: to one that begins with BOS, and to a response that ends in a special token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise InputError(f"{PLAIN!r} ends a response with the eos token, and the tokenizer has none: set eos_token")
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    text = "\n".join(message["content"] for message in prompt)
    texts = [text, *(text + response for response in responses)]
    options = {"split_special_tokens": True} if as_text else {}
    prompt_ids, *wholes = tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"]
    names = control_tokens(tokenizer, texts) if as_text else set()
    if made := [name for name in names if tokenizer.convert_tokens_to_ids(name) in set().union(prompt_ids, *wholes)]:
        raise InputError(UNAVOIDABLE.format(", ".join(made)))
    start = [] if prompt_ids[:1] == start else start
    return [start + prompt_ids, *(start + (_to_end_token(tokenizer, whole) or [*whole, eos]) for whole in wholes)]


# Special tokens in a text, such as <|im_end|> in a user's message.

UNAVOIDABLE = "the tokenizer cannot keep a special token as plain text ({}): set data.special_tokens_in_text true"


def control_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> set[str]:
    """The tokenizer's special tokens that the texts hold."""
    find = _pattern(tokenizer, len(tokenizer)).findall
    return {token for text in texts for token in find(text)}


@lru_cache(maxsize=8)
def template_marks(tokenizer: Tokenizer, template: str) -> set[str]:
    """The special tokens that the template itself writes; none for "plain"."""
    if template == PLAIN:
        return set()
    prompt = [{"role": "user", "content": "a"}]
    return control_tokens(tokenizer, [_render(tokenizer, template, prompt, True, tokenize=False)])


@lru_cache(maxsize=8)
def _pattern(tokenizer: Tokenizer, size: int) -> re.Pattern[str]:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def tokenizer_state(tokenizer: Tokenizer) -> str:
    """Everything that decides the ids of a text, as JSON. The padding and truncation state is left out: use changes it.

    Raises:
        InputError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer: give a model with a tokenizer.json")
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([backend, special], sort_keys=True)
