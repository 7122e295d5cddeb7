"""Conversations -> token ids in which exactly the responses, with their end tokens, are to be trained on."""

import gzip
import json

import datasets
import pytest
from conftest import SHARED, TEMPLATE, WORDS, write_pairs
from hypothesis import given
from hypothesis import strategies as st

from mixdpo.batches.token_pool import turns
from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import EncodedSample, encode_rows, encode_sample, encoding_identity
from mixdpo.errors import InputError
from mixdpo.model.loading import load_tokenizer
from mixdpo.model.packaged import PACKAGED

START, END, USER, ASSISTANT, RED, BLUE, GREEN, TEA = 2, 3, 4, 5, 6, 7, 8, 9  # conftest's vocabulary
# <s> user red blue <e> <s> assistant green tea <e> <s> user tea <e> <s> assistant red <e>
TWO_TURNS = [("user", "red blue"), ("assistant", "green tea"), ("user", "tea"), ("assistant", "red")]
TWO_TURNS_IDS = [START, USER, RED, BLUE, END, START, ASSISTANT, GREEN, TEA, END]
TWO_TURNS_IDS += [START, USER, TEA, END, START, ASSISTANT, RED, END]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def table(*conversations):
    messages, numbers = [chat(*turns) for turns in conversations], range(len(conversations))
    columns = {"sample_id": [10 + n for n in numbers], "messages": messages, "source": ["s"] * len(messages)}
    columns |= {"response_weights": [[1.0] * (len(turns) // 2) for turns in messages]}
    return datasets.Dataset.from_dict(columns | {"place": [f"row {n + 1}" for n in numbers]})


def eligible(sample):
    """Positions that the spans name."""
    return [at for start, end in turns(sample["spans"]) for at in range(start, end)]


def responses_by_header(ids):
    """Positions after each assistant header, up to and with the end token."""
    positions, inside = [], False
    for at, token in enumerate(ids):
        if inside:
            positions.append(at)
            inside = token != END
        elif ids[max(at - 1, 0) : at + 1] == [START, ASSISTANT]:
            inside = True
    return positions


def test_two_turns_by_hand(tokenizer):
    sample = encode_sample(tokenizer, chat(*TWO_TURNS), TEMPLATE)
    assert sample == EncodedSample(TWO_TURNS_IDS, [7, 10, 16, 18], [1.0, 1.0])


contents = st.lists(st.sampled_from([*WORDS, "user", "assistant"]), max_size=5).map(" ".join)
dialogues = st.lists(st.tuples(contents, contents), min_size=1, max_size=4)


@given(dialogue=dialogues, has_system=st.booleans(), data=st.data())
def test_exactly_what_follows_an_assistant_header_is_eligible(tokenizer, dialogue, has_system, data):
    messages = chat(("system", "sun")) if has_system else []
    for question, response in dialogue:
        messages += chat(("user", question), ("assistant", response))
    sample = encode_sample(tokenizer, messages, TEMPLATE)
    whole = tokenizer.apply_chat_template(messages)["input_ids"]  # conftest's tokenizer drops the last newline
    assert sample.input_ids == whole
    assert eligible(sample._asdict()) == responses_by_header(whole)
    assert len(sample.spans) == 2 * len(dialogue)
    limit = data.draw(st.integers(1, len(whole)))
    limited = sample.within(max_length=limit, overlong="truncate")
    kept = [at for at in responses_by_header(whole) if at < limit]
    assert (eligible(limited._asdict()) if limited else []) == kept
    assert limited is None or limited.input_ids == whole[:limit]


def test_plain_takes_one_response(tokenizer):
    sample = encode_sample(tokenizer, chat(("system", "blue"), ("user", "tea"), ("assistant", " red")), "plain")
    assert sample == EncodedSample([BLUE, TEA, RED, END], [2, 4], [1.0])
    with pytest.raises(InputError, match="'plain' has no turns for 2 responses: give a `chat_template`"):
        encode_sample(tokenizer, chat(*TWO_TURNS), "plain")
    # "re" + "d" is one word of this tokenizer: no token of the prompt is left
    with pytest.raises(InputError, match="share no token"):
        encode_sample(tokenizer, chat(("user", "re"), ("assistant", "d")), "plain")


@pytest.mark.parametrize("content", [
    "{{ m.content if loop.last or m.role == 'user' else 'sea' }}",  # an earlier response is hidden
    "{{ m.content if m.role == 'user' or not add_generation_prompt else 'sea' }}",  # … in the prompt alone
    "{{ m.content }}{% if loop.first and messages | length > 2 %} sea{% endif %}",  # an earlier question is changed
])  # fmt: skip
def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, content):
    template = TEMPLATE.replace("{{ m['content'] }}", content)
    assert encode_sample(tokenizer, chat(*TWO_TURNS[:2]), template).spans == [7, 10]
    with pytest.raises(InputError, match=r"earlier turn changes once message 4 follows|changes the prompt once"):
        encode_sample(tokenizer, chat(*TWO_TURNS[:2], ("user", "red"), ("assistant", "tea")), template)


def encode(tokenizer, *conversations, max_length=64, **options):
    return encode_rows(table(*conversations), tokenizer, max_length=max_length, **options)


@pytest.mark.parametrize(
    ("max_length", "spans"),  # 17: in the middle of the second response, 16: before it
    [(18, [7, 10, 16, 18]), (17, [7, 10, 16, 17]), (16, [7, 10]), (8, [7, 8])],
)
def test_truncation_keeps_the_first_tokens(tokenizer, max_length, spans):
    (sample,), counts = encode(tokenizer, TWO_TURNS, max_length=max_length)
    assert sample["input_ids"] == TWO_TURNS_IDS[:max_length] and sample["spans"] == spans
    assert sample["truncated"] == (max_length < 18)
    assert counts == {"dropped_overlong": 0, "dropped_empty": 0, "truncated": int(max_length < 18)}


def test_a_table_of_samples_and_what_it_drops(tokenizer):
    hidden = [("user", " ".join(["tea"] * 9)), ("assistant", "red")]  # its response starts at token 14
    rows = (TWO_TURNS, hidden, [("user", "red"), ("assistant", "")], TWO_TURNS[2:])
    encoded, counts = encode(tokenizer, *rows, max_length=14)
    names = ["input_ids", "place", "response_weights", "sample_id", "source", "spans", "truncated"]
    assert sorted(encoded.column_names) == names
    assert encoded.features["input_ids"].feature.dtype == encoded.features["spans"].feature.dtype == "int32"
    assert counts == {"dropped_overlong": 1, "dropped_empty": 1, "truncated": 1}
    assert encoded["sample_id"][:] == [10, 13] and encoded["place"][:] == ["row 1", "row 4"]
    assert encoded["spans"][:] == [[7, 10], [6, 8]]
    encoded, counts = encode(tokenizer, *rows, max_length=14, overlong="drop")
    assert counts == {"dropped_overlong": 2, "dropped_empty": 1, "truncated": 0}
    assert encoded["place"][:] == ["row 4"]


def test_the_identity_names_the_part_that_differs(tiny_model):
    def identity(tokenizer=None, chat_template=None, **lengths):
        lengths = {"max_length": 1024, "overlong": "truncate"} | lengths
        return encoding_identity(tokenizer or load_tokenizer(tiny_model), chat_template, **lengths)

    def differing(other):
        return [name for name in same if same[name] != other[name]]

    same = identity()
    assert same["lengths"] == "max_length 1024, truncate"
    assert identity(max_prompt_length=512)["lengths"] == "max_length 1024, max_prompt_length 512, truncate"
    assert all(len(same[name]) == 16 and int(same[name], 16) >= 0 for name in ("tokenizer", "template"))
    used, more_words = load_tokenizer(tiny_model), load_tokenizer(tiny_model)
    used(["red", "red tea"], padding="max_length", truncation=True, max_length=3)
    more_words.add_tokens(["grey"])
    assert differing(identity(used, TEMPLATE)) == []
    assert differing(identity(more_words)) == ["tokenizer"]
    assert differing(identity(chat_template="plain")) == ["template"]
    assert differing(identity(max_length=8)) == differing(identity(overlong="drop")) == ["lengths"]


@pytest.mark.real
def test_real_responses_decode_to_themselves(tmp_path):
    responses = ["Hello!\n", "Yes, it is: 1 < 2. ☕"]
    messages = chat(("user", "Hi"), ("assistant", responses[0]), ("user", "1 < 2?"), ("assistant", responses[1]))
    files = [write_pairs(tmp_path / "a.jsonl", [{"messages": messages}])]
    if (SHARED / "sft.jsonl.gz").is_file():
        files.append(str(SHARED / "sft.jsonl.gz"))
        with gzip.open(files[1], "rt") as file:
            responses += [json.loads(next(file))["output"] for _ in range(500)]
    tokenizer, decoded = load_tokenizer(PACKAGED), []
    for path in files:
        encoded, counts = encode_rows(read_samples(path, limit=500).dataset, tokenizer, max_length=4096)
        assert not any(counts.values())
        for sample in encoded:
            decoded += [tokenizer.decode(sample["input_ids"][start:end]) for start, end in turns(sample["spans"])]
    assert decoded == [response + "<|im_end|>" for response in responses]
