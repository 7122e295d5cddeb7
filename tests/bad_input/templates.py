"""Chat templates and tokenizers that pairs and samples are encoded with."""

from collections.abc import Callable
from typing import Any

from conftest import TEMPLATE

from bad_input.case import Case, Place, cases
from mixdpo.data.encoding import encode_rows
from mixdpo.data.pairs import read_pairs
from mixdpo.model.loading import load_tokenizer

PAIR = {"prompt": "red tea", "chosen": "blue sun", "rejected": "moon", "margin": 1.0}
SYSTEM = PAIR | {"prompt": [{"role": "system", "content": "sea"}, {"role": "user", "content": "red"}]}
TURNS = {"messages": [{"role": role, "content": "red"} for role in ("user", "assistant", "user", "assistant")]}
REFUSAL = "{{ raise_exception('System role not supported') }}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}" + REFUSAL + "{% endif %}" + TEMPLATE
FISH = PAIR | {"chosen": "blue fish"}
COUNTING = "{{ messages | length }}" + TEMPLATE

# Templates and tokenizers: a pair is encoded.


def encoded(row: Any = PAIR, template: Any = None, change: Callable[[Any], None] | None = None, **limits: Any) -> Any:
    """Encode the row, the second one of two, by the template and a tokenizer that `change` has changed."""

    def do(place: Place) -> str:
        tokenizer = load_tokenizer(place.model)
        if change is not None:
            change(tokenizer)
        given = template(place) if callable(template) else template
        rows = place.write("rows.jsonl", [PAIR | {"chosen": "song"}, row])
        lengths = {"max_length": 64, "max_prompt_length": 32, "chat_template": given} | limits
        return str(encode_rows(read_pairs(rows).dataset, tokenizer, **lengths)[1])

    return do


def without(name: str) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer, name, None)


def shown(old: str, new: str) -> str:
    return TEMPLATE.replace(old, new)


HIDDEN = shown("<|im_start|>{{", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{")
CUT = shown("m['content']", "m['content'] | replace('fish', '')")
MOVING = shown("{% for", "{% if messages | length > 2 %}tea{% endif %}{% for")
SHORT = {"max_length": 3, "max_prompt_length": 2, "overlong": "drop"}
TEMPLATES = [
    *cases(
        "chat_template",
        ("no such file", encoded(template="no/chat.jinja"), "no/chat.jinja … cannot be read"),
        ("an empty file", encoded(template=lambda p: p.write("chat.jinja", "")), "holds no Jinja template"),
        ("a syntax error", encoded(template="{% for m in messages %}"), "row 1 (pair_id … Give another template"),
        ("no system role", encoded(SYSTEM, NO_SYSTEM), "row 2 (pair_id … (system, user) … System role not supported"),
        ("the system message left out", encoded(SYSTEM, HIDDEN), "row 2 (pair_id … leaves out part of a message"),
        ("today's date", encoded(template="{{ strftime_now(form) }}" + TEMPLATE), "writes today's … with a date"),
        ("no end token", encoded(template=shown("<|im_end|>", "")), "no special … writes eos_token"),
        ("a response cut", encoded(FISH, CUT), "row 2 (pair_id … leaves out part of a message"),
        ("a prompt that changes", encoded(template=COUNTING), "changes the prompt once … give another"),
        ("none at all", encoded(change=without("chat_template")), "has no … set `chat_template`"),
    ),
    *cases(
        "other options",
        ("no end token", encoded(template="plain", change=without("eos_token")), "row 1 … has none: set eos_token"),
        ("max_length too short", encoded(**SHORT), "no pair is left of 2 … raise max_length"),
    ),
]

LONG = PAIR | {"chosen": "blue " * 20_000}
MARKED = {"prompt": "red <|im_end|>"}
COUNTED = [
    ("a completion of 20 000 words, cut", encoded(LONG), "'truncated': 1"),
    ("a completion of 20 000 words, dropped", encoded(LONG, overlong="drop"), "'dropped_overlong': 1"),
    ("an end token in a prompt", encoded(PAIR | MARKED), "'special_tokens_in_text': 1"),
    ("an end token, asked for", encoded(PAIR | MARKED, special_tokens_in_text=True), "'special_tokens_in_text': 1"),
]

CASES = [*TEMPLATES, *(Case("text", f, do, (count,), tolerated=True) for f, do, count in COUNTED)]
