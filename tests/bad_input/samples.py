"""Rows of SFT samples, and of prompts."""

import json
from typing import Any

from bad_input.case import GONE, Case, Place, changed
from bad_input.pairs import response, user
from mixdpo.constraints.scoring import ConstraintScorer
from mixdpo.data.conversations import read_samples
from mixdpo.data.prompts import read_prompts
from mixdpo.evaluation.generation import Response
from mixdpo.evaluation.gold import scores_of
from mixdpo.evaluation.make_pairs import make_pairs, pair_up

CHAT = {"messages": [user("a"), response("b")]}
ALPACA = {"instruction": "a", "output": "b"}
ONE_FORM = "should fit one: 'messages', or 'prompt' and 'completion', or 'instruction' and 'output'"
ROWS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("no known columns", {"text": "a"}, ("fit 0 forms", ONE_FORM)),
    ("two forms", CHAT | ALPACA, ("fit 2 forms", ONE_FORM)),
    ("messages as text", {"messages": json.dumps(CHAT["messages"])}, ("'messages' should be a list of messages",)),
    ("no response", {"messages": [user("a")]}, ("no message has the role 'assistant'", "there are: user")),
    ("a completion of the user's", {"prompt": "a", "completion": [user("b")]}, ("'completion' should begin with",)),
    ("an input of a list", ALPACA | {"input": ["x"]}, ("'input' should be text",)),
    ("a history", ALPACA | {"history": [["a", "b"]]}, ("'history' is not read", "remove the column")),
    ("an id twice", CHAT | {"id": "one"}, ("id 'one' was already given by row 1", "each row needs its own")),
    ("a sample_id of true", CHAT | {"sample_id": True}, ("'sample_id' should be text or a whole number",)),
]
DROPPED: list[tuple[str, dict[str, Any], str]] = [
    ("a blank question", {"messages": [user(" "), response("b")]}, "'empty_prompt': 1"),
    ("a response before any question", {"messages": [response("b")]}, "'empty_prompt': 1"),
    (
        "blank responses only",
        {"messages": [user("a"), response(""), user("c"), response("\n")]},
        "'empty_completion': 1",
    ),
]


def row_case(fault: str, row: dict[str, Any], says: tuple[str, ...]) -> Case:
    def do(place: Place) -> Any:
        return read_samples(place.write("rows.jsonl", [CHAT | {"id": "one"}, row]))

    return Case("row of samples", fault, do, ("rows.jsonl, row 2: ", *says))


def dropped_case(fault: str, row: dict[str, Any], count: str) -> Case:
    def do(place: Place) -> str:
        return str(read_samples(place.write("rows.jsonl", [CHAT, row])).dropped)

    return Case("row of samples", fault, do, (count,), tolerated=True)


NEED = 'need an object with "prompt", a text or a list of messages'
PROMPTS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("no prompt", {"question": "a"}, ("row 2: ", NEED)),
    ("an empty prompt", {"prompt": ""}, ("row 2: ", NEED)),
    ("a prompt that ends in a response", {"prompt": [user("a"), response("b")]}, ("row 2: ", "of role 'user'")),
    ("a system column", {"prompt": "a", "system": "x"}, ("row 2: ", "'system' is not read")),
    ("a part of null", {"prompt": "a", "part": None}, ("row 2: ", "'part' should be the name of a part")),
]
SCORED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("no constraints", {"constraints": GONE}, ("no list of constraints", "name another scorer")),
    ("an unknown kind", {"constraints": [{"kind": "rhymes", "params": {}}]}, ("'rhymes'", "kind must be one of")),
    ("params of another kind", {"constraints": [{"kind": "quoted", "params": {"n": 1}}]}, ("takes the params",)),
]
SCORERS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("a score of NaN", lambda row, texts: [float("nan")], ("gave [nan]", "one finite number each")),
]


def prompt_case(fault: str, row: Any, says: tuple[str, ...]) -> Case:
    return Case(
        "row of prompts",
        fault,
        lambda place: read_prompts(place.write("prompts.jsonl", [{"prompt": "a"}, row])),
        ("prompts.jsonl", *says),
    )


def scored_case(fault: str, change: dict[str, Any], says: tuple[str, ...]) -> Case:
    row = changed({"prompt": "Say it.", "constraints": []}, change)
    return Case(
        "constraints of a prompt", fault, lambda place: scores_of(ConstraintScorer(), row, ["x"]), ("Say it.", *says)
    )


def scorer_case(fault: str, scorer: Any, says: tuple[str, ...]) -> Case:
    said = [[Response("x", 2, True)]]
    return Case("scorer", fault, lambda place: pair_up([{"prompt": "Say it."}], said, scorer, 1, 0), ("Say it.", *says))


def made(**options: Any) -> Any:
    return lambda place: make_pairs(**{"model": place.model, "out": str(place.folder / "out.jsonl"), **options})


def onto(name: str, **options: Any) -> Any:
    def do(place: Place) -> Any:
        place.write("there/out.jsonl", "")
        return made(out=str(place.folder / name), **options)(place)

    return do


CASES = [
    *(row_case(*row) for row in ROWS),
    *(dropped_case(*row) for row in DROPPED),
    *(prompt_case(*row) for row in PROMPTS),
    Case("file of prompts", "no such file", lambda place: read_prompts("/no.jsonl"), ("/no.jsonl", "Check the path")),
    Case(
        "file of prompts",
        "nothing in it",
        lambda place: read_prompts(place.write("p.jsonl", "\n")),
        ("p.jsonl", "give one with"),
    ),
    Case("file of prompts", "a limit of 0", lambda place: read_prompts("builtin", 0), ("limit 0", "at least 1")),
    *(scored_case(*row) for row in SCORED),
    *(scorer_case(*row) for row in SCORERS),
    Case("make-pairs", "one sample a prompt", made(samples=1), ("samples 1", "need at least 2")),
    Case(
        "make-pairs",
        "temperature 0",
        made(prompts="builtin", limit=1, temperature=0.0),
        ("temperature 0", "raise temperature"),
    ),
    Case("make-pairs", "out is there", onto("there/out.jsonl"), ("out.jsonl exists", "--overwrite true")),
    Case("make-pairs", "out is a folder", onto("there", overwrite=True), ("there is a folder", "name of a .jsonl")),
]
