"""Data that can be trained on but probably means something else: each doubt is one line, with a count and a remedy.

Each row of the table in docs/troubleshooting.md, "What becomes of data", has a test: verdicts.tsv."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import build_sft, fit, make_pairs, make_samples, write_pairs

from datamodules.preference import PreferenceDataModule
from mixdpo.data.conversations import read_samples
from mixdpo.data.messages import doubts_about_directions, is_blank, without_prompt
from mixdpo.data.pairs import read_pairs
from mixdpo.data.prompts import read_prompts
from mixdpo.data.ratings import doubts_about_margins
from mixdpo.errors import InputError

PROMPT = "\n\nHuman: red tea\n\nAssistant:"
UNSEEN = ["", " \n", "\u200b", "\ufeff \u200d\u2060", "\u00ad", "\ufe0f", "\x00"]


def warnings_of(tiny_model, tmp_path, caplog, rows, **options):
    """The warnings in the log of a whole small run, each once, and those in its route.json."""
    with caplog.at_level("INFO"):
        fit(tiny_model, write_pairs(tmp_path / "rows.jsonl", rows), tmp_path / "run", **options)
    lines = [line for line in caplog.messages for line in line.splitlines() if line.startswith("warning: ")]
    plan = "plan.json" if options.get("make") else "route.json"
    (path,) = tmp_path.rglob(plan)
    assert [f"warning: {doubt}" for doubt in json.loads(path.read_text())["warnings"]] == lines
    return [line.replace(f"{tmp_path}/", "") for line in lines]


def test_clean_data_have_no_warning(tiny_model, tmp_path, caplog):
    assert warnings_of(tiny_model, tmp_path, caplog, make_pairs(16)) == []


@pytest.mark.parametrize(("low", "margin", "says"), [
    (9, None, r"9 of 16 margins \(56%\) are negative .*data\.margin \[CHOSEN, REJECTED\]"),
    (0, ["score_rejected", "score_chosen"], r"16 of 16 margins \(100%\) are negative"),
    (3, None, r"3 of 16 margins \(19%\) are negative and contradict their label"),
])  # fmt: skip
def test_negative_margins_are_warned_about_once(low, margin, says, tiny_model, tmp_path, caplog):
    """Of 16 pairs the first `low` have a score of 1 below that of the rejected response."""
    rows = [{name: value for name, value in pair.items() if name != "margin"} for pair in make_pairs(16)]
    for i, row in enumerate(rows):
        row |= {"score_chosen": 1.0 if i < low else 9.0, "score_rejected": 2.0 + i / 100}
    (line,) = warnings_of(tiny_model, tmp_path, caplog, rows, data={"margin": margin} if margin else {})
    assert re.match(r"warning: rows\.jsonl: " + says, line)


@pytest.mark.parametrize(("margins", "says"), [
    ([-1, -1, 1, 1], "2 of 4 margins (50%)"), ([0, 0, 1], ""), ([np.nan] * 3, ""),
])  # fmt: skip
def test_negative_is_below_0(margins, says):
    doubts = doubts_about_margins(np.array(margins, dtype=float))
    assert len(doubts) == bool(says) and says in "".join(doubts)


def test_pairs_in_both_directions_are_counted(tiny_model, tmp_path, caplog):
    rows = make_pairs(16)
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    back = [row | turn | {"pair_id": f"b{i}"} for i, (row, turn) in enumerate(zip(rows, turned, strict=False))]
    again = rows[0] | {"pair_id": "again"}  # a third row of one of them
    elsewhere = back[0] | {"pair_id": "x", "prompt": "another prompt"}
    (line,) = warnings_of(tiny_model, tmp_path, caplog, [*rows, *back, again, elsewhere])
    assert "9 of 22 pairs occur in both directions" in line and "keep one" in line
    assert doubts_about_directions(read_pairs(write_pairs(tmp_path / "same.jsonl", [*rows, again])).dataset) == []


@pytest.mark.parametrize("sft", [False, True])
def test_many_cut_rows_are_warned_about(tiny_model, tmp_path, caplog, sft):
    rows = make_samples(12) if sft else make_pairs(16)
    options = {"make": build_sft} if sft else {}
    cut = {"max_length": 12} if sft else {"max_length": 12, "max_prompt_length": 6}
    (line,) = warnings_of(tiny_model, tmp_path, caplog, rows, data=cut, **options)
    assert f" of {'12 samples' if sft else '16 pairs'} (" in line and "are cut to data.max_length 12" in line


def test_a_fifth_of_cut_rows_is_no_warning(tiny_model, tmp_path, caplog):
    rows = [row | {"prompt": f"red {row['pair_id']}", "rejected": "moon"} for row in make_pairs(15)]
    rows = [row | {"chosen": "tea " * 80 if i < 3 else "tea sun"} for i, row in enumerate(rows)]
    assert warnings_of(tiny_model, tmp_path, caplog, rows) == []
    assert "3 truncated" in caplog.text


@pytest.mark.parametrize(("margin", "says"), [
    (99, r"validation: none of the 3 pairs is hard.*data\.validation"), (-1, r"held\.jsonl: 3 of 3 margins \(100%\)"),
])  # fmt: skip
def test_a_validation_part_without_a_hard_pair_is_warned_about(tiny_model, tmp_path, caplog, margin, says):
    """Of another file the margins are read, too."""
    held = [row | {"pair_id": f"h{i}", "prompt": f"held {i}", "margin": margin} for i, row in enumerate(make_pairs(3))]
    other = {"data": {"validation": write_pairs(tmp_path / "held.jsonl", held)}}
    (line,) = warnings_of(tiny_model, tmp_path, caplog, make_pairs(16), **other)
    assert re.search(says, line)


def repeating(**change):
    return {"prompt": PROMPT, "chosen": f"{PROMPT} sun", "rejected": f"{PROMPT} moon", "margin": 1.0} | change


def test_a_prompt_repeated_by_both_responses_is_cut_and_counted(tiny_model, tmp_path):
    rows = [repeating(), repeating(margin=2.0), *make_pairs(16)]
    source = write_pairs(tmp_path / "rows.jsonl", rows)
    table = read_pairs(source)
    assert table.dataset["chosen"][:2] == [" sun"] * 2 and table.dataset["rejected"][:2] == [" moon"] * 2
    assert table.noted == {"prompt_repeated": 2} and table.dropped == {}
    data = fit(tiny_model, source, tmp_path / "run").trainer.datamodule
    assert isinstance(data, PreferenceDataModule)
    assert data.describe_counts()[0] == f"read {source}: 18 pairs, 2 prompt repeated"


def test_a_prompt_repeated_by_many_single_responses_is_refused(tmp_path):
    rows = [*make_pairs(3), repeating(rejected="moon"), repeating(chosen="sun")]
    with pytest.raises(InputError, match=r"in 2 of 5 pairs one response begins .* take the prompt out of both"):
        read_pairs(write_pairs(tmp_path / "rows.jsonl", rows))


def test_a_single_response_may_repeat_a_question(tmp_path):
    """AlpacaEval's pairs have ten such rows of 7,240."""
    asked = {"prompt": "What is tea?", "chosen": "What is tea? A leaf.", "rejected": "No idea."}
    table = read_pairs(write_pairs(tmp_path / "rows.jsonl", [*make_pairs(5), asked | {"margin": 1.0}]))
    assert table.dataset["chosen"][5] == asked["chosen"] and table.noted == {"prompt_repeated_by_one": 1}
    one_word = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi, you"}
    assert without_prompt(one_word, "chosen", "rejected") == (one_word, "")


def test_nothing_but_the_prompt_is_an_empty_completion(tmp_path):
    rows = [*make_pairs(2), repeating(rejected=PROMPT)]
    table = read_pairs(write_pairs(tmp_path / "rows.jsonl", rows))
    assert table.dropped == {"empty_completion": 1} and table.noted == {}


def test_a_prompt_repeated_by_a_completion_is_cut_and_counted(tmp_path):
    rows = [{"prompt": PROMPT, "completion": f"{PROMPT} sun"}, {"prompt": PROMPT, "completion": "moon"}]
    table = read_samples(write_pairs(tmp_path / "rows.jsonl", rows))
    assert [messages[-1]["content"] for messages in table.dataset["messages"]] == [" sun", "moon"]
    assert table.noted == {"prompt_repeated": 1}


@pytest.mark.parametrize("unseen", UNSEEN)
def test_texts_that_show_nothing_are_empty(tmp_path, unseen):
    assert is_blank(unseen) and not is_blank(f"{unseen}.{unseen}")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}
    rows = [pair, pair | {"prompt": unseen}, pair | {"chosen": unseen}, pair | {"rejected": unseen}]
    assert read_pairs(write_pairs(tmp_path / "p.jsonl", rows)).dropped == {"empty_prompt": 1, "empty_completion": 2}
    rows = [{"prompt": "a", "completion": c} for c in ("b", unseen)] + [{"prompt": unseen, "completion": "b"}]
    assert read_samples(write_pairs(tmp_path / "s.jsonl", rows)).dropped == {"empty_prompt": 1, "empty_completion": 1}
    with pytest.raises(InputError, match=r"row 1: .* and not be blank"):
        read_prompts(write_pairs(tmp_path / "q.jsonl", [{"prompt": unseen}]))


def test_each_row_of_the_table_of_verdicts_has_a_test():
    """tests/verdicts.tsv names a test for each row of the table, which begins with the same words."""
    tests = Path(__file__).parent
    page = (tests.parent / "docs/troubleshooting.md").read_text()
    head, *rows = re.search(r"^\| in the data, or the model \|.*\n(?:\|.*\n)+", page, re.M).group().splitlines()
    shown = [line.split("\t") for line in (tests / "verdicts.tsv").read_text().splitlines()]
    assert len(rows) - 1 == len(shown) and head.count("|") == 4
    for row, (start, test) in zip(rows[1:], shown, strict=True):
        assert re.match(re.escape(f"| {start} | ") + "(honoured|counted|warned) ", row), row
        file, name = test.split("::")
        shape = f'"{name}"' if file.startswith("bad_input/") else f"def {name}("
        assert shape in (tests / file).read_text(), row
