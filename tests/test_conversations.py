"""SFT rows of three forms -> conversations that end in a response; faults named by file, row and columns."""

import hashlib

import pytest
from conftest import write_pairs
from test_pairs import own_cache, response, system, user  # noqa: F401  (a fixture)

from mixdpo.data.conversations import read_samples
from mixdpo.errors import InputError

FORMS = "'messages', or 'prompt' and 'completion', or 'instruction' and 'output'"


QUESTION = {"prompt": "2+2?", "completion": "4"}
TURNS = [system("Be brief."), user("2+2?"), response("4"), user("Sure?"), response("Yes")]
ONE_TURN = [user("2+2?"), response("4")]


@pytest.mark.parametrize(("row", "messages"), [
    ({"messages": TURNS}, TURNS),
    ({"messages": [*TURNS, user("Bye"), system("End")]}, TURNS),
    ({"messages": [ONE_TURN[0], ONE_TURN[1] | {"weight": 1, "train": True, "loss": None}]}, ONE_TURN),
    ({"messages": ONE_TURN, "prompt": "2+2?", "prompt_id": "x"}, ONE_TURN),  # as UltraChat has it
    (QUESTION, ONE_TURN),
    ({"prompt": [system("a"), user("2+2?")], "completion": "4"}, [system("a"), *ONE_TURN]),
    ({"prompt": "2+2?", "completion": [response("4"), user("Sure?"), response("Yes")]}, TURNS[1:]),
    ({"instruction": "2+2?", "output": "4"}, ONE_TURN),
    ({"instruction": "2+2?", "input": " ", "output": "4"}, ONE_TURN),
    ({"instruction": "Add.", "input": "2\n2", "output": "4"}, [user("Add.\n\n2\n2"), response("4")]),
    (QUESTION | {"messages": None, "instruction": None, "output": None, "sample_id": None, "id": None}, ONE_TURN),
    ({"instruction": "2+2?", "output": "4", "input": None, "system": "", "history": None}, ONE_TURN),
])  # fmt: skip
def test_every_form_gives_messages_up_to_the_last_response(tmp_path, row, messages):
    (sample,) = read_samples(write_pairs(tmp_path / "a.jsonl", [row])).dataset
    assert sample["messages"] == messages
    assert (sample["source"], sample["row"]) == ("", 1)
    assert sample["response_weights"] == [1.0] * sum(message["role"] == "assistant" for message in messages)


def test_the_table_its_columns_and_ids(tmp_path):
    rows = [QUESTION | {"id": "p0", "source": "sums"}, QUESTION | {"sample_id": 7, "id": "unused", "source": None}]
    path = write_pairs(tmp_path / "a.jsonl", rows)
    samples = read_samples(path)
    assert samples.dataset.column_names == ["sample_id", "messages", "response_weights", "source", "row", "place"]
    assert samples.dataset.features["sample_id"].dtype == "int64"
    expected = [int(hashlib.sha256(name).hexdigest()[:16], 16) >> 1 for name in (b"p0", b"7")]
    assert samples.dataset["sample_id"][:] == expected
    assert samples.dataset["source"][:] == ["sums", ""] and samples.dataset["row"][:] == [1, 2]
    assert samples.dropped == {}


def test_ids_from_content_ignore_the_form_and_stay_apart_when_a_row_repeats(tmp_path):
    other, same = {"prompt": "3+3?", "completion": "6"}, {"messages": ONE_TURN}
    ids = read_samples(write_pairs(tmp_path / "a.jsonl", [QUESTION, other, same])).dataset["sample_id"][:]
    moved = read_samples(write_pairs(tmp_path / "b.jsonl", [other, same, QUESTION])).dataset["sample_id"][:]
    assert moved == [ids[1], ids[0], ids[2]] and len(set(ids)) == 3 and min(ids) >= 0


def test_unusable_rows_are_kept_out_and_counted_even_from_the_cache(tmp_path):
    conversations = [
        ONE_TURN, [user(" \n"), response("4")], [response("Hello"), *ONE_TURN], [system("Be brief."), response("4")],
        [user("2+2?"), response(" "), user("Well?"), response("")],
        [user("2+2?"), response(""), user("Well?"), response("4")],
    ]  # fmt: skip
    path = write_pairs(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations])
    for _ in range(2):
        samples = read_samples(path)
        assert samples.dropped == {"empty_prompt": 3, "empty_completion": 1}
        assert samples.noted == {"blank_responses": 1}
        assert samples.dataset["row"][:] == [1, 6]
    assert read_samples(path, limit=1).dropped == {}
    assert read_samples(path, limit=2).dataset["row"][:] == [1, 6]
    with pytest.raises(InputError, match=r"no usable sample \(1 rows read, kept out: .'empty_prompt': 1"):
        read_samples(write_pairs(tmp_path / "b.jsonl", [{"prompt": "", "completion": "4"}]))
