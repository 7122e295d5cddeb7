"""Edges of every constraint, by hand; the shipped prompts and pairs."""

import json
from dataclasses import asdict
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.constraints.kinds import KINDS, TASK
from mixdpo.constraints.prompts import held_out_prompts, training_prompts
from mixdpo.constraints.scoring import Constraint, ConstraintScorer

# kind, params, texts that satisfy it, texts that do not
NOT_ONE, NO_OBJECT = ["Tea", "A. B.", "A.\nB.", "A\nb.", "A. b"], ["{}", "[1]", '"a"', "{'a': 1}", '{"a": NaN}', "{a"]
NO_LIST = ["1. a", "1. a\n3. b", "2. a\n1. b", "1. a 2. b"]
EDGES = [
    ("max_words", {"n": 3}, ["one", "one two three", "well-known - - - tea now", "a\nb\nc"], ["one two three four"]),
    ("min_words", {"n": 3}, ["one two three", "a b c d"], ["one two", "one two -", "a-b-c"]),
    ("lowercase", {}, ["tea, 2 cups!", "é"], ["Tea", "tea I", "1 2 3"]),
    ("uppercase", {}, ["TEA, 2 CUPS!", "É"], ["TEa", "TEA i", "1 2 3"]),
    ("no_commas", {}, ["a; b"], ["a, b", "1,000"]),
    ("bullets", {"n": 2}, ["- a\n- b", "Two:\n* a\n\n • b"], ["- a", "- a\n- b\n- c", "-a\n-b", "- a\n-", "a - b - c"]),
    ("include_word", {"word": "tea"}, ["Tea!", "(tea)", "iced-tea"], ["team", "steal", "green_tea"]),
    ("avoid_word", {"word": "it"}, ["its item", "sit"], ["It.", "it's", "a\nit"]),
    ("starts_with", {"phrase": "Well"}, ["Well, tea", "Well", "  Well now"], ["Wellness", "well", '"Well']),
    ("ends_with", {"phrase": "Enjoy!"}, ["Tea. Enjoy!", "Enjoy!\n"], ["Enjoy", "Enjoy!!", 'Enjoy!"', "enjoy!"]),
    ("one_sentence", {}, ["Tea is 3.5 dollars.", "Why?!", 'She said "go."'], NOT_ONE),
    ("two_sentences", {}, ["A. B!", "A.\nB?", "Really?! Yes."], ["A.", "A. B", "A. B. C.", "A.B."]),
    ("ends_question", {}, ["Tea?", "Tea? "], ["Tea?.", '"Tea?"', "Is it tea"]),
    ("has_number", {}, ["2 cups", "a1"], ["two cups"]),
    ("no_digits", {}, ["two cups"], ["2 cups", "a1"]),
    ("quoted", {}, ['"tea"', ' "a b." '], ['"tea', 'tea"', '""', '"a" "b"', "“tea”", "'tea'", '"']),
    ("json_object", {}, ['{"answer": "tea"}', '{"a": [1, null]}'], NO_OBJECT),
    ("json_object", {}, ['{\n"a": {}\n}'], ['```json\n{"a": 1}\n```', 'Sure: {"a": 1}', "[" * 100_000 + "1"]),
    ("numbered_list", {"n": 2}, ["1. a\n2. b", "Two:\n1) a\n2) b\nDone 3."], NO_LIST),
    ("parentheses", {}, ["tea (hot)", "((a))"], ["tea ()", "tea (hot", "tea (!)", ")a("]),
    ("ends_exclamation", {}, ["Tea!", "Tea?!"], ["Tea!?", "Tea! Now."]),
    ("repeat_word", {"word": "tea", "n": 2}, ["Tea and tea", "tea tea tea"], ["tea team", "tea", "teatea"]),
    ("titled", {}, ["<<Tea>> Hot.", "<<a b>>"], ["Tea <<a>>", "<Tea> a", "<<>> a", "<< >> a", "<<a\nb>> c"]),
]
WORDLESS = ["", " ", "\n\t", "...", "!?", '"-"']


@pytest.mark.parametrize(("kind", "params", "right", "wrong"), EDGES)
def test_edges(kind, params, right, wrong):
    constraint = Constraint(kind, params)
    assert [text for text in right if not constraint.holds(text)] == []
    assert [text for text in wrong + WORDLESS if constraint.holds(text)] == []


def test_every_kind_has_edges_and_there_are_enough():
    assert {kind for kind, *_ in EDGES} == set(KINDS)
    assert len(KINDS) >= 16
    assert sum(not kind.trained for kind in KINDS.values()) >= 4


def drawn_constraints():
    def of_kind(name):
        values = {key: st.sampled_from(choices) for key, choices in KINDS[name].choices.items()}
        return st.builds(Constraint, st.just(name), st.fixed_dictionaries(values))

    return st.sampled_from(sorted(KINDS)).flatmap(of_kind)


@given(drawn_constraints(), st.text())
def test_any_text_is_judged_and_outer_space_is_ignored(constraint, text):
    assert constraint.holds(text) == constraint.holds(f" \n{text}\t")


def test_score_is_the_share_that_holds():
    constraints = [Constraint("lowercase", {}), Constraint("max_words", {"n": 2}), Constraint("ends_question", {})]
    row = {"constraints": [asdict(constraint) for constraint in constraints]}
    # "green tea": lower case, two words, no question mark
    assert ConstraintScorer()(row, ["green tea", "GREEN TEA OR BLACK", "", "tea?"]) == [2 / 3, 0, 0, 1]


def kinds_of(row):
    return [constraint["kind"] for constraint in row["constraints"]]


def test_prompts_are_seeded_distinct_and_free_of_contradictions():
    rows = training_prompts(400, seed=3)
    assert rows == training_prompts(400, seed=3) != training_prompts(400, seed=4)
    assert rows[:50] == training_prompts(50, seed=3)
    assert len({row["prompt"] for row in rows}) == len({row["prompt_id"] for row in rows}) == 400
    for row in rows:
        aspects = [aspect for kind in kinds_of(row) for aspect in KINDS[kind].aspects]
        assert 1 <= len(row["constraints"]) <= 3
        assert len(aspects) == len(set(aspects))
    assert {kind for row in rows for kind in kinds_of(row)} == {name for name, kind in KINDS.items() if kind.trained}


def test_held_out_prompts_share_no_subject_and_unseen_ones_no_kind():
    assert not set(TASK["training_subjects"]) & set(TASK["held_out_subjects"])
    rows = held_out_prompts()
    assert [row["part"] for row in rows] == ["seen"] * 150 + ["unseen"] * 60
    training_requests = {r.format(subject) for r in TASK["requests"] for subject in TASK["training_subjects"]}
    for row in rows:
        assert not any(row["prompt"].startswith(request) for request in training_requests)
        assert all(KINDS[kind].trained == (row["part"] == "seen") for kind in kinds_of(row))


def read_shipped(name):
    with (files("mixdpo") / "constraints" / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_shipped_held_out_file_is_what_the_code_makes():
    assert read_shipped("constraints_heldout.jsonl") == held_out_prompts()


def test_shipped_pairs_carry_their_true_scores_and_meet_no_held_out_prompt():
    rows, held_out = read_shipped("constraints_pairs.jsonl"), read_shipped("constraints_heldout.jsonl")
    assert [row["pair_id"] for row in rows] == list(range(len(rows))) and len(rows) >= 300
    for row in rows:
        scores = ConstraintScorer()(row, [row["chosen"], row["rejected"]])
        assert [row["score_chosen"], row["score_rejected"]] == scores
        assert row["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-6) and row["margin"] > 0
        assert row["chosen"].strip() != row["rejected"].strip() != ""
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}
    trained = {kind for row in rows for kind in kinds_of(row)}
    assert not trained & {kind for row in held_out if row["part"] == "unseen" for kind in kinds_of(row)}
    assert all(KINDS[kind].trained for kind in trained)
