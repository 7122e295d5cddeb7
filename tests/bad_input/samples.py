"""Rows of SFT samples, and of prompts."""

import json
from typing import Any

from tiny import response, user

from bad_input.case import GONE, Case, Place, cases, changed
from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.data.conversations import read_samples
from mixdpo.data.prompts import read_prompts
from mixdpo.evaluation.generation import Response
from mixdpo.evaluation.gold import scores_of
from mixdpo.evaluation.make_pairs import make_pairs, pair_up

CHAT = {"messages": [user("a"), response("b")]}
ALPACA = {"instruction": "a", "output": "b"}
ONE_FORM = "give those of one, messages, or prompt and completion, or instruction and output"
WEIGHED = "mark only the assistant's, by weight (0, or 1e-6 to 1e6), or by train or loss (true or false)"


def marked(**marks: Any) -> dict[str, Any]:
    return {"messages": [user("a"), response("b") | marks]}


ROWS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("no known columns", {"text": "a"}, ("fit 0 forms", ONE_FORM)),
    ("a negative weight", marked(weight=-1), ("role 'assistant' marked {'weight': -1}", WEIGHED)),
    ("a weight of NaN", marked(weight=float("nan")), ("{'weight': nan}", WEIGHED)),
    ("a weight in words", marked(weight="high"), ("{'weight': 'high'}", WEIGHED)),
    ("a loss of 2", marked(loss=2), ("{'loss': 2}", WEIGHED)),
    ("marks that disagree", marked(weight=0.5, train=False), ("{'weight': 0.5, 'train': False}", WEIGHED)),
    ("a trained question", {"messages": [user("a") | {"train": True}, response("b")]}, ("role 'user' marked", WEIGHED)),
    ("a good response of KTO", {"prompt": "a", "completion": "b", "label": True}, ("(True): keep the rows that are",)),
    ("a bad one", CHAT | {"label": "False"}, ("'label' is not read ('False')",)),
    ("two forms", CHAT | ALPACA, ("fit 2 forms", ONE_FORM)),
    ("messages as text", {"messages": json.dumps(CHAT["messages"])}, ("'messages' should be a list of messages",)),
    ("no response", {"messages": [user("a")]}, ("no message has the role 'assistant': ['user']",)),
    ("a completion of the user's", {"prompt": "a", "completion": [user("b")]}, ("'completion' should begin with",)),
    ("an input of a list", ALPACA | {"input": ["x"]}, ("'input' should be text",)),
    ("a history", ALPACA | {"history": [["a", "b"]]}, ("'history' is not read", "or remove the column")),
    ("a label of KTO", CHAT | {"label": False}, ("'label' is not read (False)", "keep the rows")),
    ("turns as text in an output", ALPACA | {"output": '[{"role": "bot", "content": "b"}]'}, ("saved as text", "Save")),
    ("an id twice", CHAT | {"id": "one"}, ("id 'one' is in row 1 too", "each row needs its own")),
    ("a sample_id of true", CHAT | {"sample_id": True}, ("'sample_id' should be text or a whole number",)),
]


def row_case(fault: str, row: dict[str, Any], says: tuple[str, ...]) -> Case:
    def do(place: Place) -> Any:
        return read_samples(place.write("rows.jsonl", [CHAT | {"id": "one"}, row]))

    return Case("row of samples", fault, do, ("rows.jsonl, row 2: ", *says))


NEED = "'prompt' should be text or messages that end with role 'user', and not be blank."
PROMPTS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("no prompt", {"question": "a"}, ("row 2: ", "'prompt' should be text or a list of messages, not None")),
    ("an empty prompt", {"prompt": ""}, ("row 2: ", NEED)),
    ("a prompt that ends in a response", {"prompt": [user("a"), response("b")]}, ("row 2: ", "with role 'user'")),
    ("a system column", {"prompt": "a", "system": "x"}, ("row 2: ", "'system' is not read")),
    ("a part of null", {"prompt": "a", "part": None}, ("row 2: ", "'part' should be text")),
]
SCORED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("no constraints", {"constraints": GONE}, ("no list of constraints", "name another scorer")),
    ("an unknown kind", {"constraints": [{"kind": "rhymes", "params": {}}]}, ("'rhymes'", "kind must be one of")),
    ("no params", {"constraints": [{"kind": "max_words", "params": {}}]}, ("max_words",)),
    ("params that are text", {"constraints": [{"kind": "max_words", "params": {"n": "3"}}]}, ("int",)),
    ("params that are true", {"constraints": [{"kind": "max_words", "params": {"n": True}}]}, ("int",)),
    ("params of null", {"constraints": [{"kind": "lowercase", "params": None}]}, ("lowercase",)),
    ("a constraint of text", {"constraints": ["lowercase"]}, ("params",)),
    ("params of another kind", {"constraints": [{"kind": "quoted", "params": {"n": 1}}]}, ("takes the params",)),
]


def prompt_case(fault: str, row: Any, says: tuple[str, ...]) -> Case:
    def do(place: Place) -> Any:
        return read_prompts(place.write("prompts.jsonl", [{"prompt": "a"}, row]))

    return Case("row of prompts", fault, do, ("prompts.jsonl", *says))


def scored_case(fault: str, change: dict[str, Any], says: tuple[str, ...]) -> Case:
    row = changed({"prompt": "Say it.", "constraints": []}, change)
    do = lambda place: scores_of(ConstraintScorer(), row, ["x"])  # noqa: E731
    return Case("constraints of a prompt", fault, do, ("Say it.", *says))


def unscored(place: Place) -> Any:
    responses = [[Response("x", 2, True)]]
    return pair_up([{"prompt": "Say it."}], responses, lambda row, texts: [float("nan")], 0)


def made(**options: Any) -> Any:
    return lambda place: make_pairs(**{"model": place.model, "out": str(place.folder / "out.jsonl"), **options})


def onto(name: str, **options: Any) -> Any:
    def do(place: Place) -> Any:
        place.write("there/out.jsonl", "")
        return made(out=str(place.folder / name), **options)(place)

    return do


COLD = {"prompts": "builtin", "limit": 1, "temperature": 0.0}
CASES = [
    *(row_case(*row) for row in ROWS),
    *(prompt_case(*row) for row in PROMPTS),
    *(scored_case(*row) for row in SCORED),
    *cases(
        "file of prompts",
        ("no such file", lambda place: read_prompts("/no.jsonl"), "/no.jsonl … Check the path"),
        ("nothing in it", lambda place: read_prompts(place.write("p.jsonl", "\n")), "p.jsonl … give a file"),
    ),
    *cases(
        "make-pairs",
        ("a score of NaN", unscored, "Say it. … gave [nan] … one finite number each"),
        ("temperature 0", made(**COLD), "temperature 0 … raise temperature"),
        ("out is there", onto("there/out.jsonl"), "out.jsonl exists … give another --out"),
        ("out is a folder", onto("there"), "there exists … give another --out"),
    ),
]
