"""Chat template -> token ids of a prompt and of answers to it; tables of texts -> cached tables of ids."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mixdpo import control_tokens as control
from mixdpo.control_tokens import chat_ids_as_text, control_tokens, ids_as_text
from mixdpo.errors import InputError, check_one_of
from mixdpo.files import read_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = list[dict[str, str]]
Overlong = Literal["truncate", "drop"]
PLAIN = "plain"
TODAY_CALL = re.compile(r"""\bstrftime_now\s*\((?:\s*(?P<quote>["'])(?P<form>[^"']*)(?P=quote)\s*\)|[^)]*\)?)""")
DATE = datetime(2024, 7, 26)
"""What templates that write today's date, such as Llama-3.2's, write here, whatever day it is: else the same text would
be other tokens tomorrow. It is the one that Llama's own falls back to."""
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids")
TEXTS = ("prompt", "chosen", "rejected", "messages")


def load_template(tokenizer: "Tokenizer", chat_template: str | None) -> str:
    """The Jinja template to render with, or `"plain"`; today's date in it is `DATE`.

    Args:
        tokenizer: its own template is used when `chat_template` is None.
        chat_template: path of a template, a template itself, or `"plain"`: the prompt's messages joined by a newline,
            directly followed by the completion and the tokenizer's eos token.

    Raises:
        InputError: there is no template, `chat_template` is neither a file nor a template, or it writes today's date in
            a form that is not given as a text.
    """
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: give `chat_template`, a path of a "
                f"Jinja template or {PLAIN!r} (prompt, completion and eos token as they are)."
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


def shared_length(*sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix, which is that of the first and the last in lexicographic order."""
    first, last = min(sequences), max(sequences)
    return next((position for position, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def encode_answers(
    tokenizer: "Tokenizer", template: str, prompt: Messages, *completions: str, special_tokens_in_text: bool = False
) -> list[list[int]]:
    """Ids of the prompt and of prompt + each completion with its end token, through a template of `load_template`.

    Raises:
        InputError: the template fails, changes the prompt once an answer follows, leaves out part of an answer, or
            writes no end token.
    """
    texts = [*(message["content"] for message in prompt), *completions]
    as_text = not special_tokens_in_text and bool(control_tokens(tokenizer, texts))
    encode = _encode_plain if template == PLAIN else partial(_encode_chat, template=template)
    return encode(tokenizer, prompt, *completions, as_text=as_text)


def _encode_chat(
    tokenizer: "Tokenizer", prompt: Messages, *completions: str, template: str, as_text: bool
) -> list[list[int]]:
    """Ids of the prompt and of prompt + each completion, each cut after the end token."""
    answers = [[*prompt, {"role": "assistant", "content": completion}] for completion in completions]
    texts = [_render(tokenizer, template, prompt, add_generation_prompt=True)]
    texts += [_render(tokenizer, template, messages, add_generation_prompt=False) for messages in answers]
    shared = texts[0][: shared_length(*texts)]
    if prompt[-1]["content"].strip() not in shared:
        raise InputError(
            "the chat template shows the last user message differently once an answer follows it, or not at all: give "
            "another `chat_template`"
        )
    if any(message["role"] == "system" and message["content"].strip() not in shared for message in prompt):
        raise InputError(
            "the chat template leaves the system message out: give a `chat_template` that shows it, or data without"
        )
    if any(_bare(answer) not in _bare(text) for answer, text in zip(completions, texts[1:], strict=True)):
        raise InputError(
            "the chat template leaves out part of an answer (reasoning, perhaps): give a `chat_template` that shows it"
        )
    if as_text:
        prompt_ids = chat_ids_as_text(tokenizer, prompt, template, add_generation_prompt=True)
        wholes = [chat_ids_as_text(tokenizer, chat, template, add_generation_prompt=False) for chat in answers]
    else:  # The template writes BOS itself: special tokens added here would double it.
        prompt_ids, *wholes = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [prompt_ids, *(_cut_after_end_token(tokenizer, whole) for whole in wholes)]


def _render(tokenizer: "Tokenizer", template: str, messages: Messages, *, add_generation_prompt: bool) -> str:
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


def _bare(text: str) -> str:
    """Without white space, which templates trim."""
    return "".join(text.split())


def _cut_after_end_token(tokenizer: "Tokenizer", ids: list[int]) -> list[int]:
    """Without the white space that templates add after the end token, which a model never gets to generate."""
    for end in range(len(ids), 0, -1):
        text = tokenizer.decode(ids[end - 1 : end])
        if text and not tokenizer.decode(ids[end - 1 : end], skip_special_tokens=True):
            return ids[:end]
        if text.strip():
            break
    raise InputError(
        f"the chat template ends an answer with {tokenizer.decode(ids[-3:])!r}, which is no special token: the model "
        "would never learn to stop. Give a `chat_template` that writes eos_token after an answer."
    )


def _encode_plain(tokenizer: "Tokenizer", prompt: Messages, *completions: str, as_text: bool) -> list[list[int]]:
    """BOS, where the tokenizer is one that starts a text with it, + text as it is; eos after a completion."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos token, which {PLAIN!r} ends an answer with: name one "
            "in its tokenizer_config.json, or give another `chat_template`"
        )
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    text = "\n".join(message["content"] for message in prompt)
    texts = [text, *(text + completion for completion in completions)]
    if as_text:
        prompt_ids, *wholes = (ids_as_text(tokenizer, text) for text in texts)
    else:
        prompt_ids, *wholes = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [start + prompt_ids, *(start + whole + [eos] for whole in wholes)]


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


def _key(dataset: "Dataset", tokenizer: "Tokenizer", options: dict[str, Any], *modules: str) -> str:
    """Cache key of the encoding: everything that it depends on, this code and that of the files `modules` included.

    The hash `datasets` would make itself pickles the tokenizer, whose padding and truncation state changes with use.
    """
    code = [Path(str(module)).read_text("utf-8") for module in (__file__, control.__file__, *modules)]
    parts = [dataset._fingerprint, tokenizer_state(tokenizer), options, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
