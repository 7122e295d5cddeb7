"""Pairs -> token ids: one boundary for both sides, lengths, counts, and a cache that follows what the ids depend on."""

import itertools
from functools import partial

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mixdpo.data.chat_template import load_template
from mixdpo.data.cut_prompts import cut_prompt, prompt_turns
from mixdpo.data.encoding import EncodedPair, encode_pair, encode_rows, encoding_identity
from mixdpo.errors import InputError

# ChatML as SmolLM2 writes it: a newline follows every end token.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "\n", "system", "user", "assistant", "two", "plus", "is", "four"]
UNK, BOS, START, END, NEWLINE, SYSTEM, USER, ASSISTANT, TWO, PLUS, IS, FOUR = range(len(WORDS))
PROMPT = [{"role": "user", "content": "two plus two"}]
PROMPT_IDS = [START, USER, NEWLINE, TWO, PLUS, TWO, END, NEWLINE, START, ASSISTANT, NEWLINE]


def wrap(backend, template=CHATML, **special):
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def word_tokenizer(template=CHATML, bos=False, **special):
    """One token a word or newline; spaces only separate."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    splits = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:4]])
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        special["bos_token"] = "<s>"
    return wrap(backend, template, **special)


def merging_tokenizer(template=None):
    """Characters, with the one merge a + b = ab."""
    vocabulary = {"<unk>": 0, "<|im_end|>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return wrap(backend, template, additional_special_tokens=[])


def user(text):
    return [{"role": "user", "content": text}]


def encoded_pair(tokenizer, *texts, chat_template=None, **options):
    """A pair through the template that `chat_template` names, else through the tokenizer's own."""
    return encode_pair(tokenizer, *texts, load_template(tokenizer, chat_template), **options)


def table(*triples):
    rows = [{"prompt": user(p), "chosen": c, "rejected": r} for p, c, r in triples]
    numbers = ({"pair_id": 10 + i, "margin": i / 2, "place": f"row {i + 1}"} for i in range(len(rows)))
    return datasets.Dataset.from_list([row | number for row, number in zip(rows, numbers, strict=True)])


def test_a_pair_through_the_chat_template():
    # the newline after <|im_end|> is the template's and is cut; both sides begin alike, and not in the prompt
    pair = encoded_pair(word_tokenizer(), PROMPT, "is four", "is")
    assert pair == EncodedPair(PROMPT_IDS, [IS, FOUR, END], [IS, END])


def test_ids_are_those_of_the_template_without_a_second_bos():
    tokenizer = word_tokenizer("{{ bos_token }}" + CHATML, bos=True)
    assert tokenizer("two")["input_ids"] == [BOS, TWO]
    pair = encoded_pair(tokenizer, PROMPT, "is four", "two")
    assert pair.prompt_ids == [BOS, *PROMPT_IDS]
    answered = [*PROMPT, {"role": "assistant", "content": "is four"}]
    whole = tokenizer.apply_chat_template(answered, tokenize=True)["input_ids"]
    assert pair.prompt_ids + pair.chosen_ids == whole[:-1]
    generation = tokenizer.apply_chat_template(PROMPT, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert pair.prompt_ids == generation


def test_a_merge_across_the_seam_moves_the_boundary_for_both_sides():
    # "ca" + "b" is c ab, while "ca" + "c" is c a c: only c is shared, so both completions start at the a.
    pair = encoded_pair(merging_tokenizer(), user("ca"), "b", "c", chat_template="plain")
    assert pair == EncodedPair([4], [5, 1], [2, 4, 1])


def test_a_merge_across_the_seam_of_a_template():
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}c"
    with pytest.raises(InputError, match="no special token"):
        encoded_pair(merging_tokenizer(template), user("ca"), "b", "c", generation_prompt="trained")
    pair = encoded_pair(merging_tokenizer(template.removesuffix("c")), user("cca"), "b", "c")
    assert pair == EncodedPair([4, 4], [5, 1], [2, 4, 1])


def test_a_generation_prompt_that_responses_lack_is_refused_unless_an_option_decides():
    # As R1's distillates do: only the generation prompt opens a thought.
    tokenizer = word_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\nplus {% endif %}"))
    with pytest.raises(InputError, match=r"after '.*t\\nplus ', but .*assistant\\nfour.*generation_prompt asked"):
        encoded_pair(tokenizer, PROMPT, "four", "two")
    trained = encoded_pair(tokenizer, PROMPT, "four", "two", generation_prompt="trained")
    assert trained == EncodedPair(PROMPT_IDS, [FOUR, END], [TWO, END])
    asked = encoded_pair(tokenizer, PROMPT, "four", "two", generation_prompt="asked")
    assert asked == EncodedPair([*PROMPT_IDS, PLUS], [FOUR, END], [TWO, END])
    identity = partial(encoding_identity, tokenizer, None, max_length=9, overlong="drop")
    assert identity() == identity(generation_prompt="trained")
    assert identity()["template"] != identity(generation_prompt="asked")["template"]
    with pytest.raises(InputError, match="special token as plain text"):
        encoded_pair(tokenizer, PROMPT, "four <|im_end|>", "two", generation_prompt="asked")


def test_a_template_may_trim_a_response_and_set_its_reasoning_apart():
    # As Qwen3 does.
    shown = "m.content | trim | replace('plus', '\nplus\n\n')"
    tokenizer = word_tokenizer(CHATML.replace("m.content", f"({shown}) if m.role == 'assistant' else m.content"))
    pair = encoded_pair(tokenizer, PROMPT, " is plus four\n", "two")
    assert pair.chosen_ids == [IS, NEWLINE, PLUS, NEWLINE, NEWLINE, FOUR, END]


seam_text = st.text(alphabet="abc", min_size=1, max_size=5)


@given(seam_text, seam_text, seam_text)
def test_merging_loses_and_invents_nothing(prompt, chosen, rejected):
    tokenizer = merging_tokenizer()
    pair = encoded_pair(tokenizer, user("c" + prompt), chosen, rejected, chat_template="plain")
    for completion, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        assert tokenizer.decode(pair.prompt_ids + ids) == f"c{prompt}{completion}<|im_end|>"


def test_plain_joins_messages_starts_with_bos_and_ends_with_eos():
    tokenizer = word_tokenizer(template=None, bos=True)
    prompt = [{"role": "system", "content": "is"}, *user("two\n")]
    pair = encoded_pair(tokenizer, prompt, "four", "two", chat_template="plain")
    assert pair == EncodedPair([BOS, IS, NEWLINE, TWO, NEWLINE], [FOUR, END], [TWO, END])


def test_a_template_writes_the_same_date_on_all_days():
    today = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
    fixed = today.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    assert load_template(word_tokenizer(today), None) == load_template(word_tokenizer(), today) == fixed
    spaced = today.replace("'%d %b %Y'", ' "%Y-%m-%d" ')
    assert load_template(word_tokenizer(), spaced) == fixed.replace("26 Jul 2024", "2024-07-26")
    with pytest.raises(InputError, match=r"by 'strftime_now\(form\)': give a `chat_template`"):
        load_template(word_tokenizer(today.replace("'%d %b %Y'", "form")), None)


def test_named_templates_without_a_default_are_named():
    named = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(InputError, match=r"templates \(.*\) without a default: set `chat_template` to a Jinja file"):
        load_template(word_tokenizer(named), None)
    assert load_template(word_tokenizer(named), CHATML) == CHATML
    assert load_template(word_tokenizer(named | {"default": CHATML}), None) == CHATML


PAIR = EncodedPair([1, 2, 3, 4], [5, 6, 7, 99], [8, 99])


@pytest.mark.parametrize(("max_length", "max_prompt_length", "expected"), [
    (8, 2, PAIR),  # 4 + 4 fits, so the prompt is left alone
    (7, 2, EncodedPair([2, 3, 4], [5, 6, 7, 99], [8, 99])),  # 4 leave 3, and more than 2 may be used
    (7, 3, EncodedPair([2, 3, 4], [5, 6, 7, 99], [8, 99])),
    (5, 3, EncodedPair([2, 3, 4], [5, 6], [8, 99])),
    (4, 3, EncodedPair([2, 3, 4], [5], [8])),
    (7, 6, EncodedPair([1, 2, 3, 4], [5, 6, 7], [8, 99])),
    (5, 4, EncodedPair([1, 2, 3, 4], [5], [8])),
])  # fmt: skip
def test_truncation_keeps_the_prompts_end_and_the_completions_start(max_length, max_prompt_length, expected):
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    assert PAIR.within(**limits, overlong="truncate") == expected
    assert PAIR.within(**limits, overlong="drop") == (PAIR if max_length == 8 else None)


# [1 2] start, [3] mark, [4 5 6 7] text, [8 9] mark, [10 11 12] text, [13] end
TURNS = [(3, 7), (9, 12)]
LONG = [*range(1, 14)]


@pytest.mark.parametrize(("room", "expected"), [
    (12, [1, 2, 3, *range(5, 14)]),
    (10, [1, 2, 3, *range(7, 14)]),
    (9, [1, 2, 3, 8, 9, 10, 11, 12, 13]),  # nothing of the first text is left: the second one behind its mark
    (8, [1, 2, 3, 8, 9, 11, 12, 13]),
    (7, [1, 2, 3, 8, 9, 12, 13]),
    (6, None),  # no text would be left
])  # fmt: skip
def test_a_prompt_keeps_its_start_the_mark_of_the_turn_that_is_cut_and_its_newest_end(room, expected):
    pair = EncodedPair(LONG, [20, 99], [21, 99]).within(room + 2, 1, cut=partial(cut_prompt, turns=lambda: TURNS))
    assert pair == (expected and EncodedPair(expected, [20, 99], [21, 99]))
    lazy = EncodedPair(LONG, [20, 99], [21, 99]).within(15, 1, cut=lambda *_: pytest.fail("asked"))
    assert lazy == EncodedPair(LONG, [20, 99], [21, 99])


TALK = [{"role": "system", "content": "plus plus"}, *user("two two two two")]
TALK += [{"role": "assistant", "content": "four four four"}, *user("is is is is is")]
SYSTEM_IDS = [BOS, START, SYSTEM, NEWLINE, PLUS, PLUS, END, NEWLINE]
OPEN_IDS = [END, NEWLINE, START, ASSISTANT, NEWLINE]


@pytest.mark.parametrize(("max_length", "kept"), [
    (39, [START, USER, NEWLINE, TWO, TWO, TWO, END, NEWLINE, START, ASSISTANT, NEWLINE, FOUR, FOUR, FOUR, END]),
    (34, [START, USER, NEWLINE, END, NEWLINE, START, ASSISTANT, NEWLINE, FOUR, END]),
])  # fmt: skip
def test_a_cut_prompt_keeps_bos_system_message_and_well_formed_turns(max_length, kept):
    tokenizer = word_tokenizer("<s>" + CHATML, bos=True)
    data = table(("two", "four", "is"), ("two", "four", "is")).to_list()
    data = datasets.Dataset.from_list([row | {"prompt": TALK} for row in data])
    (row, _), counts = encode_rows(data, tokenizer, max_length=max_length, max_prompt_length=8)
    assert counts["truncated"] == 2 and row["truncated"]
    end = [NEWLINE, START, USER, NEWLINE, *[IS] * 5, *OPEN_IDS]
    assert row["prompt_ids"] == [*SYSTEM_IDS, *kept, *end]
    assert len(row["prompt_ids"]) + 2 == max_length
    assert (row["chosen_ids"], row["rejected_ids"]) == ([FOUR, END], [IS, END])


texts = st.lists(st.sampled_from(WORDS[8:]), min_size=1, max_size=6).map(" ".join)


@given(
    turns=st.lists(texts, min_size=1, max_size=4).map(lambda given: given[: len(given) - 1 + len(given) % 2]),
    system=st.booleans(),
    responses=st.tuples(texts, texts),
    lengths=st.tuples(st.integers(2, 60), st.integers(1, 60)).filter(lambda pair: pair[1] < pair[0]),
)
def test_any_cut_pair_is_its_start_a_mark_and_its_end(turns, system, responses, lengths):
    tokenizer = word_tokenizer("<s>" + CHATML, bos=True)
    roles = itertools.cycle(("user", "assistant"))
    messages = TALK[:1] * system + [{"role": next(roles), "content": text} for text in turns]
    options = {"template": tokenizer.chat_template}
    whole = encode_pair(tokenizer, messages, *responses, **options)
    where = prompt_turns(tokenizer, messages, **options)
    found = [tokenizer.decode(whole.prompt_ids[begin:end]) for begin, end in where]
    assert found == [message["content"] for message in messages[system:]]
    pair = whole.within(*lengths, cut=partial(cut_prompt, turns=lambda: where))
    head = [*SYSTEM_IDS, START, USER, NEWLINE] if system else [BOS, START, USER, NEWLINE]
    longer = max(map(len, (whole.chosen_ids, whole.rejected_ids)))
    if pair is None or pair == whole:
        return
    kept, room = pair.prompt_ids, max(lengths[1], lengths[0] - longer)
    assert len(kept) + max(map(len, (pair.chosen_ids, pair.rejected_ids))) <= lengths[0]
    assert kept[: len(head)] == head and kept[-5:] == OPEN_IDS
    if kept != whole.prompt_ids:
        assert room - 5 <= len(kept) <= room  # a turn's mark is 5 tokens
        assert kept.count(START) == kept.count(END) + 1
        last = kept[len(head) :] if len(messages) == 1 + system else kept[-6:]
        assert whole.prompt_ids[-len(last) :] == last


def test_a_pair_that_is_cut_to_equal_completions_is_dropped_and_counted():
    data = table(("two plus two", "is four plus", "is two plus"), ("two plus two", "four", "is"))
    encoded, counts = encode_rows(data, word_tokenizer(), max_length=12, max_prompt_length=11)
    assert counts == {"dropped_overlong": 1, "dropped_empty": 0, "truncated": 1}
    assert (encoded["place"][:], encoded["chosen_ids"][:], encoded["rejected_ids"][:]) == (["row 2"], [[FOUR]], [[IS]])


LIMITS = {"max_length": 13, "max_prompt_length": 9}


def three_pairs():
    # Prompts of 11 tokens; the longer sides make 13, 14 and 13 tokens with the end token.
    return table(("two plus two", "four", "two"), ("two plus two", "four", "is two"), ("two plus two", "plus", "is"))


def test_a_table_truncates_and_counts():
    encoded, counts = encode_rows(three_pairs(), word_tokenizer(), **LIMITS)
    assert counts == {"dropped_overlong": 0, "dropped_empty": 0, "truncated": 1}
    names = ["chosen_ids", "margin", "pair_id", "place", "prompt_ids", "rejected_ids", "truncated"]
    assert sorted(encoded.column_names) == names
    assert encoded["truncated"][:] == [False, True, False]
    assert encoded["pair_id"][:] == [10, 11, 12] and encoded["margin"][:] == [0, 0.5, 1]
    assert encoded["place"][2] == "row 3"
    assert encoded["prompt_ids"][:] == [PROMPT_IDS, PROMPT_IDS[:3] + PROMPT_IDS[4:], PROMPT_IDS]
    assert encoded["rejected_ids"][:] == [[TWO, END], [IS, TWO, END], [IS, END]]


def test_the_cache_key_follows_what_the_ids_depend_on_and_nothing_else():
    def key(tokenizer=None, **options):
        return encode_rows(three_pairs(), tokenizer or word_tokenizer(), **(LIMITS | options))[0]._fingerprint

    used = word_tokenizer(pad_token="<|im_end|>")
    used(["two", "two two"], padding="max_length", truncation=True, max_length=8)
    assert key() == key() == key(chat_template=CHATML)
    assert key(used) == key(word_tokenizer(pad_token="<|im_end|>"))
    other_words = word_tokenizer()
    other_words.add_tokens(["plus two"])
    changed = [
        key(max_length=14), key(max_prompt_length=8), key(overlong="drop"), key(word_tokenizer(" " + CHATML)),
        key(word_tokenizer(CHATML.replace("m.content", "m.content + it")), chat_template_kwargs={"it": ""}),
        key(other_words),
    ]  # fmt: skip
    assert len({key(), *changed}) == 7


def test_a_second_encoding_comes_from_the_cache_and_two_processes_give_the_same(tmp_path, monkeypatch):
    three_pairs().save_to_disk(tmp_path / "pairs")
    data = datasets.load_from_disk(tmp_path / "pairs")
    first = encode_rows(data, word_tokenizer(), **LIMITS)
    assert encode_rows(three_pairs(), word_tokenizer(), **LIMITS, num_proc=2)[0].to_list() == first[0].to_list()
    monkeypatch.setattr("mixdpo.data.chat_template.encode_responses", lambda *_, **__: pytest.fail("encoded again"))
    second = encode_rows(data, word_tokenizer(), **LIMITS)
    assert first[0].to_list() == second[0].to_list() and first[1] == second[1]
