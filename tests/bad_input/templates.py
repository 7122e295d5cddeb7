"""Chat templates and tokenizers that pairs and samples are encoded with."""

from collections.abc import Callable
from typing import Any

from conftest import TEMPLATE

from bad_input.case import Case, Place
from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import encode_rows
from mixdpo.data.pairs import read_pairs
from mixdpo.model.loading import load_tokenizer

PAIR = {"prompt": "red tea", "chosen": "blue sun", "rejected": "moon", "margin": 1.0}
SYSTEM = PAIR | {"prompt": [{"role": "system", "content": "sea"}, {"role": "user", "content": "red"}]}
TURNS = {"messages": [{"role": role, "content": "red"} for role in ("user", "assistant", "user", "assistant")]}
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
RESPONSES = "{% if message.role == 'assistant' %}"

# Templates and tokenizers: a pair is encoded.


def encoded(
    row: dict[str, Any] = PAIR, template: Any = None, change: Callable[[Any], None] | None = None, **limits: Any
) -> Any:
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


def encoded_sft(row: dict[str, Any], **options: Any) -> Any:
    def do(place: Place) -> str:
        samples = read_samples(place.write("rows.jsonl", [row])).dataset
        return str(encode_rows(samples, load_tokenizer(place.model), **{"max_length": 64, **options})[1])

    return do


def without(name: str) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer, name, None)


def template_case(fault: str, template: Any, *says: str, row: dict[str, Any] = PAIR) -> Case:
    return Case("chat_template", fault, encoded(row, template), says)


TEMPLATES = [
    template_case("no such file", "no/chat.jinja", "no/chat.jinja", "no Jinja template and not 'plain'"),
    template_case("an empty file", lambda p: p.write("chat.jinja", ""), "holds no Jinja template", "no {{ or {% in it"),
    template_case("a syntax error", "{% for m in messages %}", "row 1 (pair_id", "Give another `chat_template`"),
    template_case(
        "no system role", NO_SYSTEM, "row 2 (pair_id", "(system, user)", "System role not supported", row=SYSTEM
    ),
    template_case(
        "the system message left out",
        TEMPLATE.replace("<|im_start|>{{", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{"),
        "row 2 (pair_id",
        "leaves the system message out",
        "give a `chat_template` that shows it",
        row=SYSTEM,
    ),
    template_case(
        "today's date", "{{ strftime_now(form) }}" + TEMPLATE, "writes today's date", "in which a date stands there"
    ),
    template_case(
        "no end token", TEMPLATE.replace("<|im_end|>", ""), "no special token", "writes eos_token after a response"
    ),
    template_case(
        "part of a response left out",
        TEMPLATE.replace("m['content']", "m['content'] | replace('fish', '')"),
        "row 2 (pair_id",
        "leaves out part of a response",
        "that shows it",
        row=PAIR | {"chosen": "blue fish"},
    ),
    template_case(
        "a prompt that a response changes",
        "{{ messages | length }}" + TEMPLATE,
        "last user message differently",
        "give another",
    ),
    Case("chat_template", "none at all", encoded(change=without("chat_template")), ("has no", "give `chat_template`")),
    Case(
        "chat_template",
        "plain, with two responses",
        encoded_sft(TURNS, chat_template="plain"),
        ("row 1 (sample_id", "one sample a response"),
    ),
    Case(
        "chat_template",
        "earlier turns that change",
        encoded_sft(
            TURNS, chat_template=TEMPLATE.replace("{% for", "{% if messages | length > 2 %}tea{% endif %}{% for")
        ),
        ("row 1 (sample_id", "an earlier turn differently", "leaves earlier turns as"),
    ),
    Case(
        "tokenizer",
        "no end token",
        encoded(template="plain", change=without("eos_token")),
        ("row 1", "no eos token", "name one in its"),
    ),
    Case(
        "data.max_length",
        "too short for all",
        encoded(max_length=3, max_prompt_length=2, overlong="drop"),
        ("no pair is left of 2", "raise max_length (3)"),
    ),
]

LONG = PAIR | {"chosen": "blue " * 20_000}
COUNTED = [
    ("a completion of 20 000 words, cut", encoded(LONG), "'truncated': 1"),
    ("a completion of 20 000 words, dropped", encoded(LONG, overlong="drop"), "'dropped_overlong': 1"),
    ("an end token in a prompt", encoded(PAIR | {"prompt": "red <|im_end|>"}), "'special_tokens_in_text': 1"),
    (
        "an end token, asked for",
        encoded(PAIR | {"prompt": "<|im_end|> red"}, special_tokens_in_text=True),
        "'special_tokens_in_text': 1",
    ),
    ("a conversation longer than max_length", encoded_sft(TURNS, max_length=8), "'truncated': 1"),
]

CASES = [*TEMPLATES, *(Case("text", f, do, (count,), tolerated=True) for f, do, count in COUNTED)]
