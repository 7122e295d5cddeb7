"""What a row says beside its texts: honoured, refused by name, or named once. Never a silent third."""

import json
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
from conftest import TEMPLATE, build, build_sft, fit, make_pairs, make_samples, same, write_pairs
from test_pairs import own_cache, system  # noqa: F401  (a fixture)
from tiny import response, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mixdpo.data import conversations, encoding, pairs
from mixdpo.data.chat_template import load_template
from mixdpo.data.columns import our_columns
from mixdpo.data.conversations import read_samples
from mixdpo.data.encoding import encode_rows
from mixdpo.data.messages import MESSAGES_AS_TEXT
from mixdpo.data.pairs import read_pairs
from mixdpo.data.sources import Origin
from mixdpo.errors import InputError
from mixdpo.evaluation.generation import Response, _encode
from mixdpo.evaluation.make_pairs import pair_up

# Shows all that a template can be handed: tools, a variable, and a message's name and tool_call_id.
SHOWING = (
    "{% for t in tools or [] %}{{ t.name }} {{ t.about }}\n{% endfor %}{% if slow %}slowly\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.name or '' }}{{ m.tool_call_id or '' }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = {"chat_template": "plain", "special_tokens_in_text": True}


def byte_tokenizer(*more: str, **special: Any) -> PreTrainedTokenizerFast:
    """One token a byte: ids decode to the text."""
    names = ["<|im_start|>", "<|im_end|>", *more]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*names, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    for name in more:
        backend.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, names.index(name))])
    options = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=SHOWING, **options)


TOKENIZER = byte_tokenizer()


def rendered(messages: list[dict[str, Any]], tools: Any, slow: bool, asks: bool = False) -> str:
    """What `SHOWING` writes, up to the last end token: by hand."""
    text = "".join(f"{tool['name']} {tool['about']}\n" for tool in tools or ()) + ("slowly\n" if slow else "")
    for m in messages:
        text += f"<|im_start|>{m['role']}\n{m['content']}{m.get('name') or ''}{m.get('tool_call_id') or ''}<|im_end|>\n"
    return text + "<|im_start|>assistant\n" if asks else text.removesuffix("\n")


# 200 random rows.
NOTHING = [("tool_calls", None), ("tool_calls", []), ("reasoning_content", ""), ("thinking", {})]
HARMLESS = [("id", 3), ("timestamp", "12:00"), *NOTHING]
SHOWN = [("name", "anna"), ("tool_call_id", "x1"), ("name", None)]
UNHEARD = [("tool_calls", [{"name": "f"}]), ("reasoning_content", "hm"), ("toxic", False), ("images", ["a.png"])]
TOOLS = [{"name": "look", "about": "finds", "strict": None}]
UNREAD = [("prompt_id", "x"), ("stars", 0), ("language", " "), ("split", None)]
REFUSED = [
    ("label", False), ("images", ["a"]), ("weight", 0.5), ("completion_mask", [0]), ("documents", [{"text": "a"}]),
]  # fmt: skip
REFUSED += [("system", "Be new."), ("system_prompt", "new"), ("history", [["a", "b"]]), ("chosen_weight", 1)]
EMPTY = [("label", None), ("images", []), ("history", "[]"), ("system", " "), ("labels", "nan"), ("audio", "")]


class Drawn:
    """A random row, and what it means: `messages` or `prompt` and `responses`, `tools`, `slow`; `blame` has a part of
    each error that may name the row."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.blame: list[str] = []
        self.unread: set[str] = set()
        self.form = self.draw.choice(["standard", "messages", "implicit", "turns", "completion", "alpaca"])
        self.texts = iter(range(10**6))
        texts_only = self.form in ("standard", "alpaca")
        before = [] if texts_only or self.draw.random() < 0.5 else [self.message("system")]
        self.prompt = [*before, self.message("user", texts_only)]
        if not texts_only and self.form != "completion" and self.draw.random() < 0.4:
            middle = ["assistant", self.draw.choice(["tool", "user"])]
            self.prompt += [self.message(role) for role in middle] + [self.message("user")]
        sides = "ab" if self.form in ("standard", "messages", "implicit") else "a"
        self.responses = [self.message("assistant", texts_only) for _ in sides]
        self.tools, self.slow = None, False
        columns = {**self.forms(), **self.columns()}
        order = self.draw.sample(sorted(columns), len(columns))
        self.row = {name: columns[name] for name in order}

    def message(self, role: str, text_only: bool = False) -> dict[str, Any]:
        content = f"{self.draw.choice('abc')} {role} {next(self.texts)}"
        if self.draw.random() < 0.02:
            key = self.draw.choice([("role", "content"), ("from", "value")])
            content = self.draw.choice([str, json.dumps])([dict(zip(key, ("any", content), strict=True))])
            self.blame.append("saved as text")
        message = {"role": role, "content": content}
        if not text_only:
            for group, share in ((HARMLESS, 0.3), (SHOWN, 0.3), (UNHEARD, 0.03)):
                if self.draw.random() < share:
                    key, value = self.draw.choice(group)
                    message[key] = value
                    self.blame += [key] if group is UNHEARD else []
        return dict(self.draw.sample(list(message.items()), len(message)))

    def forms(self) -> dict[str, Any]:
        chosen, rejected, prompt = self.responses[0], self.responses[-1], self.prompt
        if self.form == "standard":
            texts = (prompt[0]["content"], chosen["content"], rejected["content"])
            return dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) | {"margin": 1.0}
        if self.form == "messages":
            return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "margin": 1.0}
        if self.form == "implicit":
            return {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected], "margin": 1.0}
        if self.form == "turns":
            return {"messages": [*prompt, chosen]}
        if self.form == "completion":
            return {"prompt": prompt, "completion": [chosen]}
        return {"instruction": prompt[0]["content"], "output": chosen["content"], "input": None}

    def columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = dict([self.draw.choice(EMPTY)])
        if self.draw.random() < 0.4:
            columns["tools"], self.tools = self.draw.choice([(TOOLS, TOOLS), (json.dumps(TOOLS), TOOLS), ([], None)])
        if self.draw.random() < 0.4:
            value = self.draw.choice([{"slow": True}, {"slow": None}, '{"slow": true}', {"fast": 1}, {}, ["slow"]])
            columns["chat_template_kwargs"] = value
            self.slow = "true" in json.dumps(value)
            self.blame += ["fast"] if value == {"fast": 1} else ["a mapping"] if value == ["slow"] else []
        if self.draw.random() < 0.3:
            columns["system_prompt"] = f" {self.prompt[0]['content']}\n"  # a message repeats it
            self.blame += ["saved as text"] if MESSAGES_AS_TEXT.match(columns["system_prompt"]) else []
        for name, value in self.draw.sample(UNREAD, 2):
            columns[name] = value
            self.unread |= {name} - {"language", "split"}
        if self.draw.random() < 0.15:
            name, value = self.draw.choice([*REFUSED, ("input", "context")])
            if not (name == "input" and self.form == "alpaca"):
                columns[name] = value
                self.blame.append(f"column {name!r} is not read")
        return columns

    def check(self) -> None:
        """Encode the row by this project, and compare."""
        is_pair = "chosen" in self.row
        noun = "pair" if is_pair else "sample"
        if is_pair:
            record = pairs._record(self.row, ("margin",), None, {})
        else:
            (record,) = conversations._records(self.row, {}, "all", False)
        record["place"] = "row 1"
        options = {"template": load_template(TOKENIZER, None)}
        ids = encoding._encode_row(record, TOKENIZER, noun, options, {"max_length": 2000} | LIMITS[is_pair])
        assert record["drop"] == ids["status"] == "" and set(json.loads(record["unread"])) == self.unread
        if is_pair:
            assert TOKENIZER.decode(ids["prompt_ids"]) == rendered(self.prompt, self.tools, self.slow, asks=True)
            for side, last in zip(("chosen_ids", "rejected_ids"), self.responses, strict=True):
                whole = TOKENIZER.decode(ids["prompt_ids"] + ids[side])
                assert whole == rendered([*self.prompt, last], self.tools, self.slow)
            return
        messages = [*self.prompt, self.responses[0]]
        assert TOKENIZER.decode(ids["input_ids"]) == rendered(messages, self.tools, self.slow)
        spans = zip(ids["spans"][::2], ids["spans"][1::2], strict=True)
        trained = [TOKENIZER.decode(ids["input_ids"][start:end]) for start, end in spans]
        answers = [rendered([m], None, False) for m in messages if m["role"] == "assistant"]
        assert trained == [answer.removeprefix("<|im_start|>assistant\n") for answer in answers]


LIMITS = [{}, {"max_prompt_length": 1999}]


def test_200_rows_are_trained_with_every_meaning_or_refused_by_name() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(200):
        drawn = Drawn(seed)
        try:
            drawn.check()
        except InputError as error:
            assert any(part in str(error) for part in drawn.blame), (seed, drawn.row, str(error))
            outcomes["refused"] += 1
        else:
            assert not drawn.blame, (seed, drawn.row)
            outcomes[drawn.form] += 1
            outcomes["tools"] += drawn.tools is not None
            outcomes["slow"] += drawn.slow
            outcomes["names"] += any(m.get("name") for m in drawn.prompt + drawn.responses)
    assert sum(outcomes[name] for name in ("refused", "standard", "messages", "implicit")) < 200
    assert min(outcomes.values()) >= 8 and len(outcomes) == 10, outcomes
    assert 40 < outcomes["refused"] < 120


LOOK = [{"name": "look", "about": "finds"}]


def encoded(rows: list[dict[str, Any]], tmp_path: Any, tokenizer: Any = TOKENIZER, **options: Any) -> Any:
    path, is_pair = write_pairs(tmp_path / "rows.jsonl", rows), "chosen" in rows[0]
    table = (read_pairs if is_pair else read_samples)(path)
    return encode_rows(table.dataset, tokenizer, **{"max_length": 2000, **LIMITS[is_pair], **options})


def texts_of(encoded_rows: Any, name: str) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in encoded_rows[name]]


SAMPLE = {"messages": [user("a"), response("b")]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}
TURN = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"


def test_a_row_s_variables_win_and_the_option_holds_for_the_others(tmp_path: Any) -> None:
    rows = [SAMPLE, SAMPLE | {"chat_template_kwargs": {"slow": False}}, SAMPLE | {"tools": LOOK}]
    data, _ = encoded(rows, tmp_path, chat_template_kwargs={"slow": True})
    assert texts_of(data, "input_ids") == [f"slowly\n{TURN}", TURN, f"look finds\nslowly\n{TURN}"]
    assert len(set(data["sample_id"])) == 3  # by content, of which tools and variables are a part
    show = partial(TOKENIZER.apply_chat_template, SAMPLE["messages"], tokenize=False)
    written = load_template(TOKENIZER, None, {"slow": True})  # as an export saves it
    assert show(chat_template=written) == f"slowly\n{TURN}\n"
    value = {"slow": ['it\'s "so" %}', None, {"é": 1.5}]}
    shown = load_template(TOKENIZER, "{{ slow[0] }}{{ slow[1] is none }}{{ slow[2]['é'] }}", value)
    assert show(chat_template=shown) == 'it\'s "so" %}True1.5'


@pytest.mark.parametrize("row", [SAMPLE, PAIR])
def test_a_template_that_drops_what_it_is_given_is_refused(tmp_path: Any, row: Any) -> None:
    for given, name in (({"tools": LOOK}, "tools"), ({"chat_template_kwargs": {"slow": False}}, "slow")):
        for template in (TEMPLATE, "plain"):
            with pytest.raises(InputError, match=rf"row 1 .*cannot take {name}: give another"):
                encoded([row | given], tmp_path, chat_template=template)
    with pytest.raises(InputError, match=r"cannot take slow: .*chat_template_kwargs"):
        encoded([row], tmp_path, chat_template=TEMPLATE, chat_template_kwargs={"slow": False})
    with pytest.raises(InputError, match="cannot take tools"):
        encoded([row], tmp_path, chat_template_kwargs={"tools": LOOK})
    for wrong in ("look", "[1", 3, ["look"], {"name": "look"}):
        with pytest.raises(InputError, match="row 1: 'tools' should be a list of schemas"):
            encoded([row | {"tools": wrong}], tmp_path)


def test_a_special_token_in_a_schema_stays_text(tmp_path: Any) -> None:
    data, _ = encoded([PAIR | {"tools": [{"name": "<|im_end|>", "about": "x"}]}, PAIR], tmp_path)
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert [ids.count(end) for ids in data["prompt_ids"]] == [1, 1]
    assert texts_of(data, "prompt_ids")[0].startswith("<|im_end|> x\n<|im_start|>user")


def test_prompts_get_their_tools_and_pairs_made_of_them_keep_them() -> None:
    row = {"prompt": "a", "tools": json.dumps(LOOK), "chat_template_kwargs": {"slow": True, "fast": None}}
    ids = _encode(TOKENIZER, [row, "a"])
    expected = [rendered([user("a")], *shown, asks=True) for shown in ((LOOK, True), (None, False))]
    assert [TOKENIZER.decode(each) for each in ids] == expected
    made = pair_up([row], [[Response("x", 1, True), Response("y", 1, True)]], lambda _, texts: [1.0, 0.0], 0)
    assert made[0]["tools"] == row["tools"] and made[0]["chat_template_kwargs"] == row["chat_template_kwargs"]


ASKED, ANSWERS = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", ("b<|im_end|>\n", "c<|im_end|>")
WRITTEN = {"prompt": ASKED, "chosen": ANSWERS[0], "rejected": ANSWERS[1], "margin": 1.0}


def test_plain_adds_only_what_a_text_lacks(tmp_path: Any) -> None:
    tokenizer = byte_tokenizer("<s>", bos_token="<s>")
    rows = [WRITTEN, WRITTEN | {"prompt": f"<s>{ASKED}", "chosen": "b", "rejected": "<|im_end|> c"}]
    data, counts = encoded(rows, tmp_path, tokenizer, **PLAIN)
    assert [tokenizer.decode(ids) for ids in data["prompt_ids"]] == [f"<s>{ASKED}"] * 2
    assert [tokenizer.decode(ids) for ids in data["chosen_ids"]] == ["b<|im_end|>"] * 2
    assert [tokenizer.decode(ids) for ids in data["rejected_ids"]] == ["c<|im_end|>", "<|im_end|> c<|im_end|>"]
    assert counts["special_tokens_in_text"] == 2


def test_a_template_in_a_template_is_refused_where_most_rows_have_one(tmp_path: Any) -> None:
    written = {"messages": [user(ASKED), response(ANSWERS[1])]}
    for row, plain in ((WRITTEN, PAIR), (written, SAMPLE)):
        for asked in (False, True):
            options = {"special_tokens_in_text": asked}
            assert encoded([row, plain], tmp_path, **options)[1]["special_tokens_in_text"] == 1
            with pytest.raises(InputError, match=r"2 of 3 rows hold marks .*<\|im_start\|>.*chat_template plain"):
                encoded([row, row, plain], tmp_path, **options)
    other = byte_tokenizer("<s>")  # a mark that this template does not write
    assert encoded([PAIR | {"prompt": "<s>"}], tmp_path, other)[1]["special_tokens_in_text"] == 1


def test_columns_not_read_are_named_once_per_source(tiny_model: str, tmp_path: Any) -> None:
    rows = [row | {"lang": "en", "split": "", "notes": None} for row in make_pairs(8)]
    rows[5]["notes"] = "late"
    plain = fit(tiny_model, write_pairs(tmp_path / "plain.jsonl", make_pairs(8)), tmp_path / "a")
    noted = fit(tiny_model, write_pairs(tmp_path / "noted.jsonl", rows), tmp_path / "b")
    (line,) = [line for line in noted.trainer.datamodule.describe_counts() if "not read" in line]
    assert line == f"read {tmp_path / 'noted.jsonl'}: 8 pairs, 2 columns not read: lang, notes"
    assert not any("not read" in line for line in plain.trainer.datamodule.describe_counts())
    assert same(plain, noted)


@pytest.mark.parametrize("make", [build, build_sft])
def test_tools_are_trained_on_as_a_system_message_of_theirs(tiny_model: str, tmp_path: Any, make: Any) -> None:
    """Tools that the template writes as a message train as this message in the data does, bit for bit."""
    head = "{% for t in tools or [] %}<|im_start|>system {{ t.name }}<|im_end|>\n{% endfor %}"
    rows = make_samples(8) if make is build_sft else make_pairs(8)
    tools, told = [row | {"tools": [{"name": "tea sun"}]} for row in rows], []
    for row in rows:
        column = "messages" if make is build_sft else "prompt"
        turns = row[column] if make is build_sft else [user(row[column])]
        told.append(row | {column: [system("tea sun"), *turns]})
    options = {"make": make, "data": {"chat_template": head + TEMPLATE}}
    by_tools, by_message, bare = (
        fit(tiny_model, write_pairs(tmp_path / f"{name}.jsonl", each), tmp_path / name, **options)
        for name, each in (("tools", tools), ("told", told), ("bare", rows))
    )
    assert same(by_tools, by_message) and not same(by_tools, bare)


THEIRS = {"question": "a", "better": "b", "worse": "c", "gap": 1.0, "uid": "x"}
NAMED = {"prompt": "question", "chosen": "better", "rejected": "worse", "margin": "gap", "pair_id": "uid"}


def test_columns_of_other_names(tmp_path: Any) -> None:
    """The table is that of our names, and the error about a row without them suggests the option."""
    path = write_pairs(tmp_path / "rows.jsonl", [THEIRS])
    with pytest.raises(
        InputError, match=r"present: question, better.*'\{prompt: question, chosen: better, rejected: w"
    ):
        read_pairs(path)
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: .* names 'beter', which .* uid; did you mean 'better'"):
        read_pairs(Origin(path, NAMED | {"chosen": "beter"}))
    with pytest.raises(InputError, match=r"data.columns: .*not 'promt'; did you mean 'prompt'"):
        our_columns({"promt": "question"}, "pair")
    ours = read_pairs([PAIR | {"pair_id": "x"}]).dataset.remove_columns("place")
    assert [*read_pairs(Origin(path, our_columns(NAMED, "pair"))).dataset.remove_columns("place")] == [*ours]
    swapped = read_pairs(Origin([PAIR | {"best": "d"}], {"chosen": "rejected", "rejected": "chosen"}))
    assert (swapped.dataset[0]["chosen"], swapped.dataset[0]["rejected"]) == ("c", "b")
    replaced = read_pairs(Origin([PAIR | {"best": "d"}], {"chosen": "best"}))
    assert replaced.dataset["chosen"][:] == ["d"] and replaced.noted == {"columns not read: file's chosen": 1}
    # without a name that is alike
    for row, named in (
        ({"human": "a", "answer": "b"}, "prompt: COLUMN, completion: answer"),
        ({"chat": []}, "messages: chat"),
    ):
        with pytest.raises(InputError, match=rf"\{{{named}\}}'"):
            read_samples([row])
    with pytest.raises(InputError, match=r"row 1: 'chosen' should be text[^']*$"):
        read_pairs([PAIR | {"chosen": None}])


def test_other_names_are_other_data(tiny_model: str, tmp_path: Any) -> None:
    rows = [row | {"worst": row["chosen"]} for row in make_pairs(8)]
    run = fit(tiny_model, rows, tmp_path / "a", trainer={"max_steps": 1})
    options = {"data": {"columns": {"rejected": "worst", "chosen": "rejected"}}, "trainer": {"max_steps": 2}}
    with pytest.raises(InputError, match=r"another run \(.*data: "):
        fit(
            tiny_model,
            rows,
            tmp_path / "b",
            ckpt_path=f"{run.trainer.default_root_dir}/checkpoints/last.ckpt",
            **options,
        )
