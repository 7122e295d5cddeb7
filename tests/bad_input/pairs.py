"""Files of pairs, and the rows in them."""

import gzip
import json
from typing import Any

from tiny import response, user

from bad_input.case import GONE, Case, Place, cases, changed
from mixdpo.data.messages import split_by_prompt
from mixdpo.data.pairs import read_pairs

PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.5}
LINE = json.dumps(PAIR) + "\n"
CSV = "prompt,chosen,rejected,margin\na,b,c,1\n"


# Rows: the second one has the fault, the message names it with the file.
TEXT_OR_LIST = "should be text or a list of messages"
KEYS = "a message has the keys 'role' and 'content'"
FINITE = "should be a finite number"
UNREAL = [("in words", "high"), ("NaN", float("nan")), ("beyond floats", 10**400), ("true", True)]
RATED = changed(PAIR, {"margin": GONE, "all_generated_responses": ["4", "5"], "all_rm_scores": [1.0, 0.0]})
SCORED = changed(PAIR, {"margin": GONE, "score_chosen": 1.0, "score_rejected": 0.5})
OTHER = {"chosen": [user("a"), response("4")], "rejected": [user("a"), response("5")]}
ROWS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("no rejected", {"rejected": GONE}, ("'rejected' should be text", "Columns present: prompt, chosen, margin")),
    ("messages saved as text", {"chosen": "[{'role': 'assistant', 'content': 'x'}]"}, ("saved as", "Save the")),
    ("calls of tools", {"chosen": [response("4") | {"tool_calls": [1]}]}, ("tool_calls", "put it in 'content'")),
    ("a masked chosen", {"chosen": [response("4") | {"train": False}]}, ("'chosen' the weight 0", "a pair needs a")),
    ("a weighed rejected", {"rejected": [response("5") | {"weight": 0.5}]}, ("'rejected' 0.5", "correct the marks")),
    ("a system column", {"system": "a"}, ("'system' is not read", "put its text into a message")),
    ("images", {"images": ["a.png"]}, ("'images' is not read", "remove the column")),
    ("an input beside the prompt", {"input": "a"}, ("'input' is not read ('a')", "put its text into a message")),
    ("a weight of 0", {"chosen_weight": 0}, ("'chosen_weight' is not read (0)", "remove the column")),
    ("tools of a text", {"tools": "look"}, ("'tools' should be a list of schemas",)),
    ("turns of ShareGPT as text", {"prompt": "[{'from': 'human', 'value': 'a'}]"}, ("'prompt' is a list of", "Save")),
    ("reasoning", {"chosen": [response("4") | {"thinking": "2"}]}, ("'chosen' holds thinking", "remove the key")),
    ("chosen is a number", {"chosen": 4}, ("'chosen'", TEXT_OR_LIST)),
    ("chosen is a list of texts", {"chosen": ["4"]}, ("'chosen' holds '4'", KEYS)),
    ("keys of ShareGPT", {"chosen": [{"from": "gpt", "value": "4"}]}, ("'chosen' holds", KEYS)),
    ("content is null", {"chosen": [response(None)]}, ("'chosen.content' should be text",)),
    ("half a surrogate pair", {"chosen": "\ud83d"}, ("surrogate", "character 1", "remove it")),
    ("a dialogue that goes on", {"chosen": [response("4"), user("?"), response("5")]}, ("(assistant, user, as",)),
    ("a response of the user's", {"chosen": [user("4")]}, ("of role 'assistant'",)),
    ("a prompt that ends in a response", {"prompt": [user("a"), response("b")]}, ("should end with role 'user'",)),
    ("a prompt of another conversation", OTHER, ("'prompt' is no message that 'chosen' and 'rejected' share",)),
    ("no margin in one row", {"margin": GONE}, ("column 'margin' should be a finite number, not None",)),
    *((f"a margin {fault}", {"margin": value}, ("'margin'", FINITE)) for fault, value in UNREAL),
    ("a fractional pair_id", {"pair_id": 1.5}, ("'pair_id' should be text or a whole number",)),
]
RATINGS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("scores of fewer responses", {"all_rm_scores": [1.0]}, ("should be two lists of the same length",)),
    ("no score of the chosen", {"chosen": "four"}, ("the chosen text has no score", "none of the 2")),
]


def row_case(fault: str, change: dict[str, Any], says: tuple[str, ...], row: dict[str, Any] = PAIR) -> Case:
    def do(place: Place) -> Any:
        rows = [row | ({"pair_id": 0} if "pair_id" in change else {}), changed(row, change)]
        return read_pairs(place.write("rows.jsonl", rows))

    return Case("row of pairs", fault, do, ("rows.jsonl, row 2: ", *says))


def ids_case(fault: str, *ids: Any) -> Case:
    def do(place: Place) -> Any:
        return read_pairs(place.write("rows.jsonl", [PAIR | {"pair_id": name} for name in ids]))

    says = ("rows.jsonl, row 2: ", "is in row 1 too", "each row needs its own")
    return Case("row of pairs", fault, do, says)


# Files: (name, content) -> where and what to do.
FIX = "Correct the row, or save the file as UTF-8"
PACKED = gzip.compress((LINE * 400).encode())
FILES: list[tuple[str, str, bytes | str, tuple[str, ...]]] = [
    ("a cut line", "a.jsonl", LINE + LINE[:-9], ("row 2: ", "JSONDecodeError", FIX)),
    ("a byte that is no UTF-8", "a.jsonl", LINE.encode() + b'{"prompt": "\xff"}\n', ("row 2: ", FIX)),
    ("a number as a row", "a.jsonl", LINE + "3\n", ("row 2: ", "an object of named columns, not a int")),
    ("a key twice", "a.jsonl", LINE + LINE.replace('"margin"', '"chosen"'), ("row 2: ", "'chosen' stands twice", FIX)),
    ("a number of 5000 digits", "a.jsonl", LINE.replace("1.5", "1" * 5000), ("row 1: ", "4300 digits", FIX)),
    ("gzip with a wrong check sum", "a.jsonl.gz", PACKED[:-8] + b"\0" * 8, ("BadGzipFile: CRC", FIX)),
    ("too many values", "a.csv", f"{CSV}a,b,c,1,2\n", ("row 2: ", "5 values under 4 column names", FIX)),
    ("a column twice", "a.csv", "prompt,prompt\na,b\n", ("row 1: ", "names a column twice: prompt, prompt")),
    ("no header", "a.csv", "a,b,c,1\na,b,c,1\n", ("row 1: ", "Name yours", "Columns present: a, b, c, 1")),
    ("nothing", "a.jsonl", "", ("holds no rows", "give a file or split with some")),
    ("no margin column", "a.csv", "prompt,chosen,rejected,stars\na,b,c,1\n", ("no column to take the", "Name yours")),
    ("an archive", "a.jsonl.zip", b"PK", ("should end in .parquet, .json, .jsonl or .csv", "also with .gz")),
    ("every row dropped", "a.jsonl", LINE.replace('"4"', '" "'), ("no usable pair", "'empty_completion': 1")),
]


def file_case(fault: str, name: str, content: bytes | str, says: tuple[str, ...]) -> Case:
    return Case("file of pairs", fault, lambda place: read_pairs(place.write(name, content)), (name, *says))


def column_case(fault: str, margin: Any, *says: str) -> Case:
    rows = [PAIR | {"a": 1, "b": 2}]
    return Case("data.margin", fault, lambda place: read_pairs(place.write("a.jsonl", rows), margin=margin), says)


def broken_folder(place: Place) -> Any:
    place.write("data/train.jsonl", LINE + LINE[:-9])
    return read_pairs(str(place.folder / "data"))


def of_one_file(place: Place) -> Any:
    return read_pairs(place.write("a.jsonl", [PAIR]), split="test")


SOURCES = [
    *cases(
        "data.source",
        ("no such path", lambda place: read_pairs("/nonexistent/a.jsonl"), "/nonexistent/a.jsonl … Check the path"),
        ("a hub id out of reach", lambda place: read_pairs("org/nothing"), "'org/nothing' … On the hub: ID:CONFIG"),
        ("a folder with a broken file", broken_folder, "data/train.jsonl, row 2: cannot be read"),
    ),
    *cases(
        "data",
        ("a split of one file", of_one_file, "a.jsonl … use 'train'"),
        ("a validation share of nothing", lambda place: split_by_prompt(["a"], 0.5, 0), "0.5 … change the fraction"),
    ),
]

CASES = [
    *(row_case(*row) for row in ROWS),
    row_case("one of two scores", {"score_rejected": GONE}, ("'score_rejected' should be a finite",), SCORED),
    *(row_case(*row, RATED) for row in RATINGS),
    ids_case("a pair_id twice", "a", "a"),
    ids_case("a pair_id as number and as text", 7, "7"),
    *(file_case(*file) for file in FILES),
    column_case("an unknown column", "stars", "'stars' should be a finite number, not None", "margin, a, b."),
    *(column_case(str(names), names, "one column or [chosen_column, rejected") for names in (["a"] * 2, [], [*"abc"])),
    *SOURCES,
]
