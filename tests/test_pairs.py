"""Rows of any source -> one table of pairs. What is refused is in bad_input/pairs.py."""

import csv
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import write_pairs
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import response, user

from mixdpo.data.conversations import read_samples
from mixdpo.data.messages import split_by_prompt
from mixdpo.data.pairs import read_pairs
from mixdpo.data.sources import Origin, open_source
from mixdpo.errors import InputError

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def system(text):
    return {"role": "system", "content": text}


def write(path, rows):
    """Rows as the end of the file's name says: json, jsonl or csv, each also with .gz."""
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            json.dump(rows, file, indent=1)
    return str(path)


def only(tmp_path, row):
    (pair,) = read_pairs(write(tmp_path / "one.jsonl", [row])).dataset
    return pair


KINDS = ["a.json", "a.json.gz", "a.jsonl", "a.csv.jsonl.gz", "a.csv", "a.jsonl.csv.gz", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name):
    rows = [PAIR | {"pair_id": "p0", "extra": "x"}, PAIR | {"pair_id": "p1", "chosen": 'four,\n"4"', "margin": -2.0}]
    rows[1]["extra"], source = "y", str(tmp_path / name)
    if name == "a.parquet":
        rows = [row | {"margin": Decimal(str(row["margin"]))} for row in rows]
        datasets.Dataset.from_list(rows).to_parquet(source)
    else:
        write(tmp_path / name, rows)
    pairs = read_pairs(source)
    columns = ["pair_id", "prompt", "chosen", "rejected", "chosen_weight", "margin", "row", "place"]
    assert pairs.dataset.column_names == columns
    assert pairs.dataset["prompt"][:] == [[user("2+2?")]] * 2
    assert pairs.dataset["chosen"][:] == ["4", 'four,\n"4"']
    assert pairs.dataset["margin"][:] == [1.5, -2.0]
    assert pairs.dataset["row"][:] == [1, 2]
    # first 8 bytes of sha256("p0") and sha256("p1"), big-endian, shifted right by one
    assert pairs.dataset["pair_id"][:] == [int(f, 16) >> 1 for f in ("169b5b823c62b64c", "f64551fcd6f07823")]
    assert pairs.dropped == {}


def write_folder(folder, **files):
    """Files of rows below a folder; in a name `__` stands for a slash, and the last `_` for the dot."""
    for name, rows in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        else:
            write(path, rows)
    return str(folder)


def numbered(*numbers):
    return [PAIR | {"prompt": f"{number}?"} for number in numbers]


def asked_in(source, split="train"):
    return [prompt[0]["content"] for prompt in read_pairs(source, split=split).dataset["prompt"]]


def test_all_files_of_a_folder_are_read_in_name_order_whatever_their_form(tmp_path):
    folder = write_folder(tmp_path / "f", b_csv=numbered(3), a_jsonl=numbered(1, 2), c__d_parquet=numbered(4, 5))
    write_folder(tmp_path / "f" / ".hidden", e_jsonl=numbered(6))
    (tmp_path / "f" / "README.md").write_text("# Pairs")
    (tmp_path / "f" / "b.csv").write_text((tmp_path / "f" / "b.csv").read_text() + "7?,four,,1\n")  # kept out, counted
    for _ in range(2):  # the second time from the cache
        table = read_pairs(folder)
        assert asked_in(folder) == ["1?", "2?", "3?", "4?", "5?"]
        assert table.dataset["row"][:] == [1, 2, 3, 5, 6]
        places = ["a.jsonl, row 1", "a.jsonl, row 2", "b.csv, row 1", "c/d.parquet, row 1", "c/d.parquet, row 2"]
        assert table.dataset["place"][:] == places
        assert table.noted == {"rows of a.jsonl": 2, "rows of b.csv": 2, "rows of c/d.parquet": 2}


def test_files_of_a_folder_need_not_agree_in_columns_and_types(tmp_path):
    """What each file alone may hold: scores of other types, columns that are null or not there, keys of a message."""
    rows = [PAIR | {"margin": 1, "note": None}, PAIR | {"margin": 6.5, "note": "1972-01-30", "chosen": "six"}]
    messages = [user("2+2?") | {"name": None}, user("2+2?") | {"name": None, "more": ""}]
    rows += [PAIR | {"prompt": [message], "chosen": str(i)} for i, message in enumerate(messages)]
    folder = write_folder(tmp_path / "f", **{f"{i}_jsonl": [row] for i, row in enumerate(rows)})
    assert read_pairs(folder).dataset["margin"][:] == [1, 6.5, 1.5, 1.5]


SPLIT_FILES = {"train_jsonl": "train", "my-validation-1_jsonl": "validation", "a-dev_jsonl": "validation"}
SPLIT_FILES |= {"eval_jsonl": "test", "x__test 2_jsonl": "test", "retrained_jsonl": ""}
SPLIT_FOLDERS = {"training__b_jsonl": "train", "train__test_jsonl": "train", "data__a-00000-of-00002_jsonl": "a"}


def test_the_split_of_a_file_is_a_word_in_its_name_or_folder(tmp_path):
    files = {name: numbered(number) for number, name in enumerate(SPLIT_FILES)}
    folder = write_folder(tmp_path / "f", **files)
    for split in ("train", "validation", "test"):
        wanted = {f"{number}?" for number, name in enumerate(SPLIT_FILES) if SPLIT_FILES[name] == split}
        assert set(asked_in(folder, split)) == wanted
    assert read_pairs(folder, split="test").noted["files of no split, not read: retrained.jsonl"] == 1
    for split in ("held", "held[:2]", "test+train", "test[:1]+train[:1]"):
        message = re.escape(f"f, split '{split}': ") + ".*validation: a-dev.jsonl, my-validation-1"
        with pytest.raises(InputError, match=message):
            read_pairs(folder, split=split)


def test_the_rule_of_splits_is_that_of_datasets(tmp_path):
    for name, split in (SPLIT_FILES | SPLIT_FOLDERS).items():
        folder = write_folder(tmp_path / name, **{name: numbered(1)})
        assert datasets.load_dataset(folder).keys() == {split or "train"}
        assert asked_in(folder, split or "train") == ["1?"]


def test_a_slice_is_cut_from_all_files_of_the_split(tmp_path):
    folder = write_folder(tmp_path / "f", **{"train-1_jsonl": numbered(0, 1, 2), "train-2_csv": numbered(3, 4, 5)})
    for split, wanted in {"[:4]": range(4), "[50%:]": range(3, 6), "[2:4]": (2, 3), "[-1:]": (5,)}.items():
        assert asked_in(folder, f"train{split}") == [f"{number}?" for number in wanted]
    part = read_pairs(folder, split="train[2:4]")
    assert part.dataset["place"][:] == ["train-1.jsonl, row 3", "train-2.csv, row 1"]
    assert part.noted == {"rows of train-1.jsonl": 1, "rows of train-2.csv": 1}


def test_a_row_of_a_folder_is_named_by_its_file(tmp_path):
    folder = write_folder(tmp_path / "f", a_jsonl=[PAIR | {"pair_id": 7}], b_jsonl=[PAIR, PAIR | {"pair_id": 7}])
    with pytest.raises(InputError, match=r"f, split 'train', b.jsonl, row 2: pair_id 7 is in a.jsonl, row 1 too"):
        read_pairs(folder)
    write_folder(tmp_path / "f", b_jsonl=[PAIR, PAIR | {"margin": None}])
    with pytest.raises(InputError, match=r"f, split 'train', b.jsonl, row 2: the margin's column 'margin'"):
        read_pairs(folder)
    (tmp_path / "f" / "b.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"f/b.jsonl, row 1: cannot be read"):
        read_pairs(folder)


def test_data_in_other_forms_is_no_part_of_a_folder_without_a_word(tmp_path):
    folder = write_folder(tmp_path / "f", a_jsonl=numbered(1))
    for name in ("b.tsv", "data.arrow", "b.jsonl.zst", "b.zip"):
        (tmp_path / "f" / name).write_text("")
        with pytest.raises(InputError, match=rf"f/{name} is not read: give .parquet, .json, .jsonl or .csv"):
            read_pairs(folder)
        (tmp_path / "f" / name).unlink()
    with pytest.raises(InputError, match=r"empty, split 'train': no such split.*none"):
        (tmp_path / "empty").mkdir()
        read_pairs(str(tmp_path / "empty"))


def test_a_copy_of_a_hub_data_set_keeps_its_configuration(tmp_path):
    folder = write_folder(tmp_path / "f", x__one_jsonl=numbered(1), x__two_jsonl=numbered(2))
    card = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: x/two.jsonl\n---\n# Pairs\n"
    (tmp_path / "f" / "README.md").write_text(card)
    assert asked_in(folder) == ["2?"]


def test_a_changed_file_or_folder_is_read_anew_and_the_options_count(tmp_path):
    path = tmp_path / "folder" / "train.jsonl"
    path.parent.mkdir()
    # the same size and modification time
    for text, source in (("4", path), ("6", path), ("7", path.parent), ("8", path.parent)):
        write(path, [PAIR | {"chosen": text, "gap": 3.0}, PAIR | {"gap": 4.0}])
        os.utime(path, (1, 1))
        assert read_pairs(str(source)).dataset["chosen"][0] == text
    first, again = read_pairs(str(path)), read_pairs(str(path))
    assert first.dataset._fingerprint == again.dataset._fingerprint
    assert read_pairs(str(path), margin="gap").dataset["margin"][:] == [3.0, 4.0]
    assert read_pairs(str(path), limit=1).dataset.num_rows == 1


def test_a_missing_path_is_not_taken_for_a_hub_id(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for source in ("data/x.jsonl", "./folder", "~/x", "a/b/c", "x.csv.gz", "one,two"):
        with pytest.raises(InputError, match="no file or folder '") as raised:
            read_pairs(source)
        assert str(Path(source).expanduser()) in str(raised.value)


def test_a_hub_id_is_fetched_with_its_split_and_configuration(monkeypatch):
    asked = []

    def load(*names, split, **_):
        asked.append((*names, split))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load)
    pairs = read_pairs("org/name", split="train_prefs")
    assert pairs.dataset.num_rows == 1
    assert read_pairs("org/name:a-b.1").dataset.num_rows == 1
    assert asked == [("org/name", "train_prefs"), ("org/name", "a-b.1", "train")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"'org/name', split 'train' cannot be read: ZeroDiv.*ID:CONFIG.*hf://data"):
        read_pairs("org/name")


def test_a_list_may_follow_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\n \n[" + LINE + b"," + LINE + b"]")
    assert read_pairs(str(path)).dataset["row"][:] == [1, 2]


def test_null_in_a_column_of_mixed_rows_counts_as_absent(tmp_path):
    rows = [FORMS["repeated message list"] | {"pair_id": "p0"}, FORMS["implicit prompt"]]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")  # all columns in each row
    pairs = read_pairs(str(tmp_path / "a.parquet")).dataset
    assert pairs["prompt"][:] == [[user("2+2?")]] * 2 and len(set(pairs["pair_id"])) == 2
    assert pairs["pair_id"][1] == only(tmp_path, PAIR)["pair_id"]


LINE = json.dumps(PAIR).encode() + b"\n"


WHOLE = {"chosen": [user("2+2?"), response("4")], "rejected": [user("2+2?"), response("5")]}
FORMS = {
    "standard": PAIR,
    "conversational": PAIR | {"prompt": [user("2+2?")], "chosen": [response("4")], "rejected": [response("5")]},
    "messages and text": PAIR | {"prompt": [user("2+2?")]},
    "text and completions": PAIR | {"chosen": [response("4")], "rejected": [response("5")]},
    "implicit prompt": WHOLE | {"margin": 1.5},
    "ultrafeedback": PAIR | WHOLE,
    "repeated message list": PAIR | {"prompt": [user("2+2?")]} | WHOLE,
    "empty columns": PAIR | {"system": " ", "history": [], "messages": None},
    "a column that a table has left empty": PAIR | {"system": "nan", "history": "[]"},
    "empty parts of a message": PAIR | {"prompt": [user("2+2?") | {"tool_calls": None, "reasoning_content": ""}]},
    "null prompt": WHOLE | {"prompt": None, "margin": 1.5, "pair_id": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_prompt_once(tmp_path, form):
    pair = only(tmp_path, FORMS[form])
    assert pair["prompt"] == [user("2+2?")]
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("4", "5", 1.5)


def test_an_response_in_json_is_an_response(tmp_path):
    for text in ('[{"content": "hello"}]', '[{"from": "Rome", "role": "b"}]', "[{'role': 'user'}]"):
        assert only(tmp_path, PAIR | {"chosen": text})["chosen"] == text


def test_several_turns_and_a_system_message_are_prompt(tmp_path):
    turns = [system("Be brief."), user("2+2?"), response("4"), user("Sure?")]
    implicit = {"chosen": [*turns, response("Yes")], "rejected": [*turns, response("No")], "margin": 1}
    assert only(tmp_path, implicit | {"system": "Be brief.\n"})["prompt"] == turns  # the column says nothing more
    assert only(tmp_path, implicit)["prompt"] == turns
    assert only(tmp_path, implicit | {"prompt": "2+2?"})["prompt"] == turns


def test_unusable_rows_are_kept_out_and_counted_even_from_the_cache(tmp_path):
    rows = [
        PAIR, PAIR | {"chosen": " \n"}, PAIR | {"rejected": "", "margin": None}, PAIR | {"rejected": "4 "},
        PAIR | {"prompt": " "}, PAIR | {"chosen": "four"},
        {"chosen": [user("2+2?"), response("4")], "rejected": [user("2+2?"), response("4")], "margin": 0},
    ]  # fmt: skip
    source = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        pairs = read_pairs(source)
        assert pairs.dropped == {"empty_completion": 2, "identical": 2, "empty_prompt": 1}
        assert pairs.dataset["row"][:] == [1, 6]
    assert read_pairs(source, limit=1).dropped == {}
    with pytest.raises(InputError, match=r"no usable pair .1 rows read, kept out: .'identical': 1"):
        read_pairs(write(tmp_path / "b.jsonl", rows[3:4]))


def test_ids_from_content_follow_it_and_stay_apart_when_a_row_repeats(tmp_path):
    other = PAIR | {"chosen": "four"}
    ids = read_pairs(write(tmp_path / "a.jsonl", [PAIR, other, PAIR])).dataset["pair_id"][:]
    moved = read_pairs(write(tmp_path / "b.jsonl", [other, PAIR, PAIR])).dataset["pair_id"][:]
    assert moved == [ids[1], ids[0], ids[2]] and len(set(ids)) == 3
    assert all(0 <= pair_id < 2**63 for pair_id in ids)


prompt_lists = st.lists(st.text(alphabet="abc", max_size=3), min_size=1, max_size=30)


def split_or_skip(prompts, fraction, seed):
    try:
        return split_by_prompt(prompts, fraction, seed)
    except InputError:
        assume(False)


@given(prompt_lists, prompt_lists, st.floats(0.1, 0.9), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_and_more_rows_move_no_other_row(prompts, more, fraction, seed):
    training, validation = split_or_skip(prompts, fraction, seed)
    assert sorted(training + validation) == list(range(len(prompts)))
    assert not {prompts[index] for index in training} & {prompts[index] for index in validation}
    _, with_more = split_or_skip(prompts + more, fraction, seed)
    assert [index for index in with_more if index < len(prompts)] == validation


def test_split_follows_seed_fraction_and_form():
    prompts = [f"prompt {index}" for index in range(2000)]
    _, validation = split_by_prompt(prompts, 0.1, 0)
    assert 150 < len(validation) < 250  # 200 ± 3.7 standard deviations of 13.4
    assert split_by_prompt(prompts, 0.1, 1)[1] != validation
    assert split_by_prompt([[user(prompt)] for prompt in prompts], 0.1, 0)[1] == validation
    assert split_by_prompt(prompts, 0, 0) == (list(range(2000)), [])


# Real data: the counts and histograms in shared/data/README.md.
def real(name, **dropped):
    path = SHARED / f"{name}_pairs.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    pairs = read_pairs(str(path))
    assert pairs.dropped == dropped
    return path, pairs.dataset["margin"][:]


@pytest.mark.shared
def test_alpaca_eval_pairs():
    path, margins = real("alpaca_eval")
    with gzip.open(path, "rt") as file:
        splits = [json.loads(line)["split"] for line in file]
    edges = [0, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 27]
    train, test = ([m for m, split in zip(margins, splits, strict=True) if split == part] for part in ("train", "test"))
    assert np.histogram(train, edges)[0].tolist() == [452, 467, 696, 933, 697, 581, 755, 464, 464, 291]
    assert np.histogram(test, edges)[0].tolist() == [111, 117, 169, 236, 172, 146, 187, 115, 115, 72]


@pytest.mark.shared
def test_ultrafeedback_pairs():
    path, margins = real("ultrafeedback", empty_completion=1)  # one response is U+200B alone
    edges = [0, 0.5, 1, 1.5, 2, 2.5, 3.5, 4.5, 6.5, 8.5]  # scores are half points: (2, 3] is [2.5, 3.5) and so on
    assert np.histogram(margins, edges)[0].tolist() == [110, 192, 192, 118, 85, 95, 71, 102, 28]
    assert read_pairs(str(path), margin=["score_chosen", "score_rejected"]).dataset["margin"][:] == margins


@pytest.mark.shared
def test_pandalm_pairs():
    assert Counter(round(margin * 3) for margin in real("pandalm_human")[1]) == {3: 744, 2: 30, 1: 87}


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


def test_ids_of_samples_ignore_the_form_and_stay_apart_when_a_row_repeats(tmp_path):
    other, same = {"prompt": "3+3?", "completion": "6"}, {"messages": ONE_TURN}
    ids = read_samples(write_pairs(tmp_path / "a.jsonl", [QUESTION, other, same])).dataset["sample_id"][:]
    moved = read_samples(write_pairs(tmp_path / "b.jsonl", [other, same, QUESTION])).dataset["sample_id"][:]
    assert moved == [ids[1], ids[0], ids[2]] and len(set(ids)) == 3 and min(ids) >= 0


def test_unusable_samples_are_kept_out_and_counted_even_from_the_cache(tmp_path):
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


def test_several_sources_are_one(tmp_path):
    """Rows of a file, a list, a `Dataset` and a folder's split, in order and counted; an id that an earlier one has is
    made another's, and an id twice in one source is refused."""
    rows = [PAIR | {"pair_id": name, "chosen": name} for name in "ab"]
    path, folder = (
        write(tmp_path / "a.jsonl", rows),
        write_folder(tmp_path / "f", x_test_jsonl=rows, x_train_jsonl=rows),
    )
    sources = [path, rows[:1], datasets.Dataset.from_list(rows), folder]
    table = read_pairs(sources, split="test")
    assert table.dataset["chosen"][:] == list("abaabab") and table.dataset["row"][:] == list(range(1, 8))
    counts = {path: 2, "source 2": 1, "source 3": 2, f"{folder}, x_test.jsonl": 2}
    assert table.noted == {f"rows of {name}": count for name, count in counts.items()}
    ids = table.dataset["pair_id"][:]
    assert len(set(ids)) == 7 and ids[:2] == read_pairs(path).dataset["pair_id"][:]
    assert ids == read_pairs(sources, split="test").dataset["pair_id"][:]
    changed = [path, [rows[0] | {"chosen": "z"}]]
    assert [read_pairs([path, rows[:1]]).dataset["chosen"][2], read_pairs(changed).dataset["chosen"][2]] == ["a", "z"]
    with pytest.raises(InputError, match=r"2 sources, source 2, row 2: pair_id 'b of source 2' is in source 2, row 1"):
        read_pairs([path, [rows[1]] * 2])
    with pytest.raises(InputError, match=r"2 sources, source 2, row 1: 'chosen' should be text"):
        read_pairs([path, [PAIR | {"chosen": 3}]])
    for wrong, split in (([path, folder], "train[:1]"), (rows, "test")):
        with pytest.raises(InputError, match="has no split"):
            read_pairs(wrong, split=split)


def test_an_id_of_an_earlier_source_is_renamed_whatever_its_column():
    rows = open_source([[{"sample_id": 7}], [{"id": "7"}]], "train").rows
    assert [row for _, _, row in rows] == [{"sample_id": 7}, {"id": "7 of source 2"}]


def test_rows_in_memory_are_known_by_their_content():
    rows = [PAIR, PAIR | {"chosen": "6"}]
    same = [read_pairs(given).dataset for given in (rows, [dict(row) for row in rows])]
    assert same[0]._fingerprint == same[1]._fingerprint
    rows[1]["chosen"] = "7"
    assert read_pairs(rows).dataset["chosen"][:] == ["4", "7"]
    table = datasets.Dataset.from_list(rows)
    assert str(Origin([["a.jsonl", rows], table])) == "[[a.jsonl, list of 2 rows], Dataset of 2 rows]"
    shown = table.with_transform(lambda batch: batch | {"chosen": ["8" for _ in batch["chosen"]]})
    assert read_pairs(shown).dataset["chosen"][:] == ["8", "8"]
    with pytest.raises(InputError, match=r"a source of type DatasetDict cannot be read: give .* a datasets\.Dataset"):
        read_pairs(datasets.DatasetDict(train=table))
