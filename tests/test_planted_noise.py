"""Planted noise: marks that are true, turns and prompts left alone, the same whatever the order of the rows."""

import json
import math
from collections import Counter

import numpy as np
import planted_noise_repairs as repairs
import pytest
from conftest import WORDS, build_sft, make_samples, write_pairs
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import PHRASES, NoisySFTDataModule, PlantedNoise, detection, plant, planted_tokens, stages_with_noise
from planted_noise import bound_term

from mixdpo.batches.token_pool import TokenPool
from mixdpo.errors import InputError
from mixdpo.token_cleaning.cleaning import Cleaning
from mixdpo.token_cleaning.run_tokens import RunTokens
from mixdpo.token_cleaning.scorers import Random
from mixdpo.token_cleaning.summary import summarise

PROMPT, END, FIRST_WORD = 2, 3, 6  # <|im_start|>, <|im_end|>, and after two roles the WORDS
SENTENCES = (" ".join(WORDS[:5]), " ".join(WORDS[5:12]))
WORD = st.integers(FIRST_WORD, FIRST_WORD + len(WORDS) - 1)
CONVERSATION = st.lists(st.tuples(st.lists(WORD, min_size=1, max_size=4), st.lists(WORD, max_size=40)), min_size=1)


def encoded(conversations):
    """Each a list of (prompt ids, response ids); an end token closes the response."""
    rows = []
    for number, turns in enumerate(conversations):
        ids, spans = [], []
        for prompt, response in turns:
            ids += [PROMPT, *prompt]
            spans += [len(ids), len(ids) + len(response) + 1]
            ids += [*response, END]
        rows.append({"sample_id": 1000 + number, "source": "s", "row": number + 1, "input_ids": ids, "spans": spans})
    number, numbers = Value("int64"), {"input_ids": [Value("int32")], "spans": [Value("int32")]}
    features = {"sample_id": number, "source": Value("string"), "row": number, **numbers}
    return Dataset.from_list(rows, features=Features(features)).add_column("truncated", [False] * len(rows))


def random_conversations(count, length):
    """One turn each, words that a small linear generator draws."""
    words = [FIRST_WORD + (i * i * 7 + i // 3) % len(WORDS) for i in range(count * length)]
    return [[([6], words[n * length : (n + 1) * length])] for n in range(count)]


def turns_of(row):
    """(prompt before it, response, marks) of each turn of a planted row."""
    turns, end, used = [], 0, 0
    for start, stop in zip(row["spans"][::2], row["spans"][1::2], strict=True):
        marks = row["planted"][used : used + stop - start]
        turns.append((row["input_ids"][end:start], row["input_ids"][start:stop], marks))
        end, used = stop, used + stop - start
    assert used == len(row["planted"]) and end == len(row["input_ids"])
    return turns


@given(st.lists(CONVERSATION, min_size=1, max_size=4), st.sampled_from([0.05, 0.2, 0.5]), st.integers(0, 3))
@settings(max_examples=40)
@pytest.mark.parametrize("kind", ["swap", "boilerplate", "shuffle"])
def test_only_marked_tokens_differ(tokenizer, kind, conversations, rate, seed):
    conversations.append([([6], [FIRST_WORD + i for i in range(9)])])  # so that swap has different tokens to draw
    before = encoded(conversations)
    noise = PlantedNoise(rate=rate, kinds=[kind], phrases=SENTENCES, span=4, seed=seed)
    after = plant(before, noise, tokenizer)
    assert after.column_names == [*before.column_names, "planted"]
    phrases = [tokenizer(text)["input_ids"] for text in SENTENCES]
    for row, turns in zip(after, conversations, strict=True):
        for (prompt, new, marks), (old_prompt, old) in zip(turns_of(row), turns, strict=True):
            assert prompt == [PROMPT, *old_prompt]
            assert new[-1] == END and marks[-1] == 0
            kept = [token for token, mark in zip(new, marks, strict=True) if not mark]
            if kind == "boilerplate":
                assert kept == [*old, END]
                assert sum(marks) in {5 * a + 7 * b for a in range(30) for b in range(30)}
                assert not any(marks) or any(new[i : i + len(p)] == p for i in range(len(new)) for p in phrases)
            else:
                differs = [one != other for one, other in zip(new, [*old, END], strict=True)]
                assert marks == differs
                assert kind == "swap" or Counter(new) == Counter([*old, END])
        tokens, planted = sum(len(old) + 1 for _, old in turns), sum(row["planted"])
        assert planted == 0 or tokens >= 8
        if tokens >= 8 and kind == "swap":
            assert planted == min(max(1, round(rate * tokens)), sum(len(old) for _, old in turns))
        if tokens >= 8 and kind == "boilerplate" and any(old for _, old in turns):
            assert planted > 0


@pytest.mark.parametrize("kind", ["swap", "boilerplate", "shuffle"])
def test_the_rate_is_met_on_average(tokenizer, kind):
    noise = PlantedNoise(rate=0.3, kinds=[kind], phrases=SENTENCES)
    after = plant(encoded(random_conversations(40, 100)), noise, tokenizer)
    shares = [sum(marks) / len(marks) for marks in after["planted"]]
    assert sum(shares) / len(shares) == pytest.approx(0.3, abs=0.03)


def test_the_order_of_the_rows_decides_nothing(tokenizer):
    samples = encoded(random_conversations(30, 20))
    noise = PlantedNoise(phrases=SENTENCES)
    forth = {row["sample_id"]: row for row in plant(samples, noise, tokenizer)}
    turned = samples.select(range(29, -1, -1)).remove_columns("row").add_column("row", list(range(30)))
    back = {row["sample_id"]: row for row in plant(turned, noise, tokenizer)}
    assert all(forth[name] | {"row": 0} == row | {"row": 0} for name, row in back.items())
    assert len({len(row["input_ids"]) for row in forth.values()}) > 1  # some are longer: boilerplate
    other = {row["sample_id"]: row for row in plant(samples, PlantedNoise(phrases=SENTENCES, seed=1), tokenizer)}
    assert other != forth


@pytest.mark.parametrize("kind", ["swap", "boilerplate", "shuffle"])
def test_special_tokens_and_the_last_token_stay(tokenizer, kind):
    """The last token of a truncated response is a word, not an end token."""
    noise = PlantedNoise(rate=0.5, kinds=[kind], phrases=SENTENCES, span=8)
    if kind != "boilerplate":
        for row in plant(encoded([[([7], [8, 9, 10, PROMPT, END, 11, 12, 13])]] * 20), noise, tokenizer):
            ((_, new, _),) = turns_of(row)
            assert [new[3], new[4], new[8]] == [PROMPT, END, END] and not {PROMPT, END} & {*new[:3], *new[5:8]}
    samples = encoded([[([7], [8, 9, 10, 11, 12, 13, 14, 15])]] * 30)
    cut = samples.map(lambda row: {"input_ids": row["input_ids"][:-1], "spans": [2, 10], "truncated": True})
    after = plant(cut, noise, tokenizer)
    assert {(row["input_ids"][-1], row["planted"][-1]) for row in after} == {(15, 0)}


def test_data_that_cannot_be_planted(tokenizer):
    """A span of equal tokens stays as it is where it would be shuffled; other noise is refused."""
    samples = encoded([[([7], [8] * 20)]])
    (row,) = plant(samples, PlantedNoise(kinds=["shuffle"]), tokenizer)
    assert row["planted"] == [0] * 21
    with pytest.raises(InputError, match="two different tokens"):
        plant(samples, PlantedNoise(kinds=["swap"]), tokenizer)
    with pytest.raises(InputError, match="no tokens"):
        plant(samples, PlantedNoise(kinds=["boilerplate"], phrases=["red", " "]), tokenizer)


def test_bad_options_are_refused():
    assert len(set(PHRASES)) == len(PHRASES) >= 6
    wrong = [("rate", 0.0), ("rate", 0.51), ("rate", float("nan")), ("kinds", ()), ("kinds", ("swap", "typo"))]
    for option, value in [*wrong, ("span", 1), ("phrases", ()), ("phrases", "fine")]:
        with pytest.raises(InputError, match=f"noise.{option}"):
            PlantedNoise(**{option: value})


def test_a_run_on_noisy_samples(tiny_model, tmp_path):
    """Training responses hold marked noise, held-out ones none; what cleaning finds of it is read from its files."""
    source = write_pairs(tmp_path / "samples.jsonl", make_samples(24))
    cleaning = Cleaning(scorer=Random())
    trainer, module, _ = build_sft(tiny_model, source, tmp_path / "run", cleaning=cleaning)
    options = {"tokenizer": tiny_model, "validation": 0.25, "batch_size": 4, "max_length": 64}
    noisy = NoisySFTDataModule(source, PlantedNoise(phrases=SENTENCES, rate=0.3), **options)
    trainer.fit(module, noisy)
    planted = planted_tokens(noisy.pool)
    assert 0 < planted.sum() < len(planted) == len(noisy.pool) == noisy.counts["train"]["response tokens"]
    assert "planted" not in noisy.validation_pool.samples.column_names
    assert noisy.pool.identity["noise"].startswith("rate 0.3, seed 0, ")
    assert "noise" not in noisy.validation_pool.identity
    (stage,) = stages_with_noise(tmp_path / "run")
    assert stage["planted"]["share"] == pytest.approx(planted.mean())


# What a selection kept, and what it found of the noise.
# Samples of 4, 0, 2 and 2 tokens; the third keeps nothing, the second has nothing to keep.
WEIGHTS = np.array([1, 0, 0.5, 1, 0, 0, 1, 0], dtype=np.float32)
SCORES = np.array([4, -2, 1, 3, -1, 0, 2, -3], dtype=np.float32)
PLANTED = np.array([0, 1, 1, 0, 1, 0, 0, 0])


def test_a_summary_by_hand():
    summary = summarise(WEIGHTS, SCORES, np.array([0, 4, 4, 6, 8]), ["a", "b", "a", "c"], 1.0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary == {
        **{"tokens": 8, "kept_tokens": 4, "kept_share": 3.5 / 8, "threshold": 1.0},
        **{"samples": 4, "samples_keeping_nothing": 2, "mean_abs_score": 2.0},
        "by_source": {
            name: {"tokens": tokens, "kept_share": share}
            for name, tokens, share in (("a", 6, 2.5 / 6), ("b", 0, None), ("c", 2, 0.5))
        },
    }


def test_noise_by_hand():
    assert detection(WEIGHTS, SCORES, PLANTED) == {
        "share": 3 / 8,
        "auc": 11 / 15,  # planted -2 1 -1 against 4 3 0 2 -3: 3 + 3 + 2 + 3 + 0 clean ones above
        "precision": 2 / 4,
        "recall": 2 / 3,
        "kept_noise_rate": 0.5 / 3.5,
    }


def test_tokens_without_scores_count_but_have_no_score():
    scores, planted, offsets = np.array([np.nan, 1.0, np.nan, -3.0]), np.array([1, 1, 0, 0]), np.array([0, 4])
    summary = summarise(np.ones(4), scores, offsets, ["a"])
    assert (summary["kept_share"], summary["mean_abs_score"]) == (1.0, 2.0)
    assert detection(np.ones(4), scores, planted)["auc"] == 0.0  # -3 (clean) is below 1 (planted)
    assert summarise(np.ones(4), np.full(4, np.nan), offsets, ["a"])["mean_abs_score"] is None
    noise = detection(np.ones(4), np.full(4, np.nan), planted)
    assert noise["auc"] is None and noise["kept_noise_rate"] == 0.5


def test_nothing_kept_nothing_planted_nothing_there():
    noise = detection(np.zeros(2), np.ones(2), np.zeros(2))
    assert noise == {"share": 0.0, "auc": None, "precision": 0.0, "recall": None, "kept_noise_rate": None}
    assert detection(np.zeros(0), np.zeros(0), np.zeros(0))["share"] is None
    summary = summarise(np.zeros(0), np.zeros(0), np.array([0]), [])
    assert summary["kept_share"] is None and summary["by_source"] == {}


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40))
def test_auc_counts_pairs(tokens):
    scores, planted = map(np.array, zip(*tokens, strict=True))
    auc = detection(np.ones(len(tokens)), scores, planted)["auc"]
    pairs = [(c > n) + (c == n) / 2 for c, other in tokens if not other for n, noise in tokens if noise]
    assert auc == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_the_bound():
    assert bound_term(100_000) == pytest.approx(0.009362, abs=1e-6)  # √(2 · ln 80 / 10⁵), ln 80 = 4.382027
    assert bound_term(8, delta=4 / math.e) == 0.5  # √(2 · 1 / 8)
    with pytest.raises(InputError, match="kept"):
        bound_term(0)


def scored(*scores):
    """Tokens of three samples of 2, 1 and 3 tokens, of which the last two are scored."""
    conversations = [[([6], [7] * (tokens - 1))] for tokens in (2, 1, 3)]
    pool = TokenPool.of(encoded(conversations).add_column("response_weights", [[1.0]] * 3), {})
    tokens = RunTokens.undecided(pool, {}, "t")
    tokens.scores[2:], tokens.weights[2:] = scores, 1
    return tokens


def test_cross_fitting_takes_the_scores_of_the_reference_that_did_not_see_a_sample():
    one, other, first = scored(1, 2, 3, 4), scored(50, 60, 70, 80), np.array([1])
    nan = [np.nan] * 2
    crossed = repairs.either_by(False, first, one, other)
    np.testing.assert_array_equal(crossed.scores, [*nan, 50, 2, 3, 4])
    np.testing.assert_array_equal(crossed.weights, [*nan, 1, 0, 0, 1])  # round(0.6 · 4) of those scored
    own = repairs.either_by(True, first, one, other)
    np.testing.assert_array_equal(own.scores, [*nan, 1, 60, 70, 80])
    np.testing.assert_array_equal(one.scores, [*nan, 1, 2, 3, 4])


def test_the_middle_of_the_scores_is_kept():
    tokens, nan = scored(-1, 9, 0.5, 1), [np.nan] * 2  # the median is 0.75
    near = repairs.near_median(tokens)
    np.testing.assert_array_equal(near.scores, [*nan, -1.75, -8.25, -0.25, -0.25])
    np.testing.assert_array_equal(near.weights, [*nan, 0, 0, 1, 1])
    ends = repairs.both_ends_cut(scored(-1, 9, 0.5, 1))
    np.testing.assert_array_equal(ends.scores, [*nan, -1.5, -1.5, -0.5, -0.5])
    np.testing.assert_array_equal(ends.weights, near.weights)


def test_the_third_with_the_lowest_mean_trains_a_reference(tiny_model, tmp_path):
    tokens = scored(2, 1, 1, 3)
    tokens.scores[:2] = 1.9, 1.9  # by sums, the second sample would come first as well
    assert repairs.lowest_third(tokens).tolist() == [2]
    source = write_pairs(tmp_path / "samples.jsonl", make_samples(24))
    options = {"tokenizer": tiny_model, "batch_size": 4, "max_length": 64, "validation": 0.25}
    chosen, noise = tmp_path / "chosen.json", PlantedNoise(phrases=SENTENCES, rate=0.3)
    whole = NoisySFTDataModule(source, noise, **options)
    few = repairs.ChosenSamplesDataModule(source, str(chosen), noise, **options)
    for data in (whole, few):
        data.trainer, *_ = build_sft(tiny_model, source, tmp_path / "run")
        data.setup("fit")
        chosen.write_text(json.dumps(whole.pool.samples["sample_id"][3:6]))
    assert list(few.pool.samples) == [whole.pool.samples[i] for i in (3, 4, 5)]
    assert few.pool.identity["ids"] != whole.pool.identity["ids"] and few.counts["train"]["samples"] == 3
    assert len(few.validation_pool) == len(whole.validation_pool)
