"""SFT rows of three forms -> conversations that end in a response; faults named by file, row and columns."""

import gzip
import hashlib
import json

import pytest
from conftest import SHARED, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from test_pairs import own_cache, response, system, user  # noqa: F401  (a fixture)

from mixdpo.data.conversations import parse_sample, read_samples
from mixdpo.errors import InputError

FORMS = "'messages', or 'prompt' and 'completion', or 'instruction' and 'output'"


QUESTION = {"prompt": "2+2?", "completion": "4"}
TURNS = [system("Be brief."), user("2+2?"), response("4"), user("Sure?"), response("Yes")]
ONE_TURN = [user("2+2?"), response("4")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS}, TURNS),
        ({"messages": [*TURNS, user("Bye"), system("End")]}, TURNS),
        ({"messages": [{**message, "weight": 1} for message in ONE_TURN]}, ONE_TURN),
        ({"messages": ONE_TURN, "prompt": "2+2?", "prompt_id": "x"}, ONE_TURN),  # as UltraChat has it
        (QUESTION, ONE_TURN),
        ({"prompt": [system("a"), user("2+2?")], "completion": "4"}, [system("a"), *ONE_TURN]),
        ({"prompt": "2+2?", "completion": [response("4"), user("Sure?"), response("Yes")]}, TURNS[1:]),
        ({"instruction": "2+2?", "output": "4"}, ONE_TURN),
        ({"instruction": "2+2?", "input": " ", "output": "4"}, ONE_TURN),
        ({"instruction": "Add.", "input": "2\n2", "output": "4"}, [user("Add.\n\n2\n2"), response("4")]),
        (QUESTION | {"messages": None, "instruction": None, "output": None, "sample_id": None, "id": None}, ONE_TURN),
        ({"instruction": "2+2?", "output": "4", "input": None, "system": "", "history": None}, ONE_TURN),
    ],
)
def test_every_form_gives_messages_up_to_the_last_response(tmp_path, row, messages):
    (sample,) = read_samples(write_pairs(tmp_path / "a.jsonl", [row])).dataset
    assert sample["messages"] == messages
    assert (sample["source"], sample["row"]) == ("", 1)


def test_the_table_its_columns_and_ids(tmp_path):
    rows = [QUESTION | {"id": "p0", "source": "sums"}, QUESTION | {"sample_id": 7, "id": "unused", "source": None}]
    path = write_pairs(tmp_path / "a.jsonl", rows)
    samples = read_samples(path)
    assert samples.dataset.column_names == ["sample_id", "messages", "source", "row"]
    assert samples.dataset.features["sample_id"].dtype == "int64"
    expected = [int(hashlib.sha256(name).hexdigest()[:16], 16) >> 1 for name in (b"p0", b"7")]
    assert samples.dataset["sample_id"][:] == expected
    assert samples.dataset["source"][:] == ["sums", ""] and samples.dataset["row"][:] == [1, 2]
    assert samples.dropped == {} and samples.source == path


def test_ids_from_content_ignore_the_form_and_stay_apart_when_a_row_repeats(tmp_path):
    other, same = {"prompt": "3+3?", "completion": "6"}, {"messages": ONE_TURN}
    ids = read_samples(write_pairs(tmp_path / "a.jsonl", [QUESTION, other, same])).dataset["sample_id"][:]
    moved = read_samples(write_pairs(tmp_path / "b.jsonl", [other, same, QUESTION])).dataset["sample_id"][:]
    assert moved == [ids[1], ids[0], ids[2]] and len(set(ids)) == 3 and min(ids) >= 0


def test_a_repeated_id_names_both_rows(tmp_path):
    with pytest.raises(InputError, match="row 3: id 'a' was already given by row 1"):
        read_samples(write_pairs(tmp_path / "a.jsonl", [QUESTION | {"id": name} for name in ("a", "b", "a")]))


def test_unusable_rows_are_kept_out_and_counted_even_from_the_cache(tmp_path):
    conversations = [
        ONE_TURN,
        [user(" \n"), response("4")],
        [response("Hello"), *ONE_TURN],
        [system("Be brief."), response("4")],
        [user("2+2?"), response(" "), user("Well?"), response("")],
        [user("2+2?"), response(""), user("Well?"), response("4")],
    ]
    path = write_pairs(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations])
    for _ in range(2):
        samples = read_samples(path)
        assert samples.dropped == {"empty_prompt": 3, "empty_completion": 1}
        assert samples.dataset["row"][:] == [1, 6]
    assert read_samples(path, limit=1).dropped == {}
    assert read_samples(path, limit=2).dataset["row"][:] == [1, 6]
    with pytest.raises(InputError, match=r"no usable sample \(1 rows read, kept out: .'empty_prompt': 1"):
        read_samples(write_pairs(tmp_path / "b.jsonl", [{"prompt": "", "completion": "4"}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "output": "b"}, f"fit 0 forms.*{FORMS}"),
        ({"prompt": "a", "completion": None}, "fit 0 forms.*null counts as absent"),
        (QUESTION | {"messages": ONE_TURN}, f"fit 2 forms.*{FORMS}"),
        (QUESTION | {"instruction": "a", "input": "", "output": "b"}, "fit 2 forms"),
        ({"messages": [user("a"), {"role": "gpt", "content": "b"}]}, r"role 'assistant' \(there are: user, gpt\)"),
        ({"prompt": ONE_TURN, "completion": "b"}, "'prompt' holds a response.*as 'messages'"),
        ({"prompt": "a", "completion": [user("b"), response("c")]}, "'completion' should begin.*not 'user'"),
        ({"messages": [user("a"), response("b") | {"reasoning_content": "c"}]}, "'messages' has reasoning_content"),
    ],
)
def test_bad_rows_are_named_with_file_row_and_columns(tmp_path, row, message):
    path = write_pairs(tmp_path / "a.jsonl", [QUESTION, row])
    with pytest.raises(InputError, match=message) as raised:
        read_samples(path)
    assert f"{path}, row 2: " in str(raised.value)
    assert str(raised.value).endswith(f"Columns present: {', '.join(row)}.")


roles = st.sampled_from(["user", "assistant"])
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": st.text("ab")}))


@given(conversations, conversations)
def test_what_follows_the_last_response_is_all_that_is_cut(before, after):
    tail = [message for message in after if message["role"] == "user"]
    messages = [*before, response("last")]
    assert parse_sample({"messages": messages + tail}) == messages


@pytest.mark.shared
def test_shared_samples():
    path = SHARED / "sft.jsonl.gz"
    samples = read_samples(str(path), limit=500)
    assert samples.dataset.num_rows == 500 and samples.dropped == {}
    with gzip.open(path, "rt") as file:
        for sample, line in zip(samples.dataset, file, strict=False):
            row = json.loads(line)
            question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
            assert sample["messages"] == [user(question), response(row["output"])]
            assert sample["source"] == row["source"]
    assert len(set(samples.dataset["source"])) == 3
