"""`run.py predict` and `run.py test` on prompts: turn by turn, in the official forms, interrupted and resumed."""

import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, TEMPLATE, WORDS, adapter_weights, build, make_pairs, write_pairs
from lightning.pytorch.callbacks import ModelCheckpoint
from test_cli import in_process
from test_scoring import changed_model, plain_model
from tiny import response, user

from datamodules.prompts import PromptDataModule
from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.gold_evaluation import GoldEvaluation
from lightning_modules.callbacks.logging import Throughput
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.preference import PreferenceModule
from mixdpo.errors import InputError
from mixdpo.evaluation import generation, gold, kept_responses
from mixdpo.evaluation.formats import GSM8K, AlpacaEval, ArenaHard, Constraints, MTBench, Prompt, PromptResponses
from mixdpo.evaluation.generation import Response, generate
from mixdpo.evaluation.gold import Responses, compare, greedy, markdown
from mixdpo.model.adapters import Lora
from mixdpo.model.loading import load_base, load_tokenizer
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant
from mixdpo.storage.store import read_store

GSM = GSM8K()


def questions(count: int, turns: int = 2) -> list[dict[str, Any]]:
    """Of different lengths, in two categories."""
    texts = [[" ".join([WORDS[(i + t) % 20]] * (2 + i % 5)) for t in range(turns)] for i in range(count)]
    kinds = [{"question_id": 81 + i, "category": "writing" if i % 2 else "math"} for i in range(count)]
    return [kind | {"turns": said} for kind, said in zip(kinds, texts, strict=True)]


def responses(verb: str, form: str, source: str, folder: Path, base: str, *more: str) -> list[str]:
    return [
        *(verb, "--model", "lightning_modules.responses.ResponseModule", "--model.base", base),
        *("--model.quantization", "none", "--model.dtype", "float32", "--model.max_new_tokens", "6"),
        *("--data", "datamodules.prompts.PromptDataModule", "--data.source", source, "--data.batch_size", "3"),
        *("--data.form", f"mixdpo.evaluation.formats.{form}", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--runs", str(folder), "--name", "tiny", *more),
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tstamp"} for row in rows]


def test_second_turn_follows_the_first_response(tiny_model, tmp_path):
    source = write_pairs(tmp_path / "question.jsonl", questions(5))
    assert in_process(*responses("predict", "MTBench", source, tmp_path, tiny_model)) == 0
    rows = read(tmp_path / "tiny.jsonl")
    assert [row["question_id"] for row in rows] == [81, 82, 83, 84, 85]
    model, tokenizer = load_base(tiny_model, quantization="none", dtype="float32"), load_tokenizer(tiny_model)
    for row, question in zip(rows, questions(5), strict=True):
        chat: list[dict[str, str]] = []
        for said, text in zip(question["turns"], row["choices"][0]["turns"], strict=True):
            chat.append(user(said))
            ((alone,),) = generate(model, tokenizer, [chat], max_new_tokens=6, batch_size=1, progress=False)
            assert text == alone.text
            chat.append(response(text))
        assert row["generate_params"]["tokens"][1] == alone.tokens


def test_interrupted_equals_uninterrupted(tiny_model, tmp_path, monkeypatch):
    """Sampled, with a temperature for each category: cut off between the temperatures of a batch, then between
    batches."""
    source = write_pairs(tmp_path / "question.jsonl", questions(8))
    more = ("--model.temperature", "{writing: 0.9, math: 0.7}")
    assert in_process(*responses("predict", "MTBench", source, tmp_path / "whole", tiny_model, *more)) == 0
    whole = untimed(read(tmp_path / "whole/tiny.jsonl"))
    arguments = responses("predict", "MTBench", source, tmp_path / "cut", tiny_model, *more)
    real, calls = generation._complete, []
    kept = tmp_path / "cut/tiny.responses.sqlite"

    def dies(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*inputs, **options)

    monkeypatch.setattr(generation, "_complete", dies)
    for _ in range(2):
        calls.clear()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            in_process(*arguments)
            raise SystemExit  # Lightning may take the interrupt for a wish to stop
        assert 1 <= len(read_store(kept, "responses", "")[1]) < 8 and not (tmp_path / "cut/tiny.jsonl").exists()
    monkeypatch.setattr(generation, "_complete", lambda *i, **o: calls.append(2) or real(*i, **o))
    assert in_process(*arguments) == 0
    assert untimed(read(tmp_path / "cut/tiny.jsonl")) == whole
    assert len({json.dumps(row["choices"]) for row in whole}) > 1
    again = len(calls)
    assert in_process(*arguments) == 0 and len(calls) == again  # nothing is left to generate
    assert untimed(read(tmp_path / "cut/tiny.jsonl")) == whole


def test_other_responses_are_not_continued(tiny_model, tmp_path, capsys):
    source = write_pairs(tmp_path / "question.jsonl", questions(4, turns=1))
    assert in_process(*responses("predict", "MTBench", source, tmp_path, tiny_model)) == 0
    before = (tmp_path / "tiny.responses.sqlite").read_bytes()
    other = write_pairs(tmp_path / "other.jsonl", [row | {"question_id": -i} for i, row in enumerate(questions(4, 1))])
    for option, value, named in (
        ("--model.max_new_tokens", "5", "sampling.max_new_tokens: "),
        ("--model.seed", "1", "sampling.seed: "),
        ("--data.limit", "3", "prompts: "),
        ("--data.source", other, "prompts: "),
    ):
        assert in_process(*responses("predict", "MTBench", source, tmp_path, tiny_model, option, value)) == 1
        assert named in capsys.readouterr().err
    assert (tmp_path / "tiny.responses.sqlite").read_bytes() == before


def test_official_forms():
    said = Response("A response.", 4, True)
    alpaca = AlpacaEval()
    asked = alpaca(1, {"instruction": "Why?", "dataset": "koala"})
    (row,) = [alpaca.row(PromptResponses(asked, (said,)), "mine")]
    expected = {"dataset": "koala", "instruction": "Why?", "output": "A response.", "generator": "mine"}
    assert row == expected | {"tokens": 4, "ended": True}
    arena = ArenaHard()
    asked = arena(1, {"uid": "u1", "prompt": "Why?", "category": "hard_prompt"})
    (row,) = [arena.row(PromptResponses(asked, (said,)), "mine")]
    assert (row["uid"], row["model"], row["metadata"]["token_len"]) == ("u1", "mine", 4)
    assert row["messages"] == [user("Why?"), response({"answer": "A response."})]
    bench = MTBench()
    hub = bench(1, {"prompt_id": 5, "category": "math", "prompt": ["One?", "Two?"], "reference": []})
    official = bench(2, {"question_id": 4, "category": "math", "turns": ["One?", "Two?"]})
    rows = [bench.row(PromptResponses(each, (said, said)), "mine") for each in (hub, official)]
    assert [row["question_id"] for row in rows] == [5, 4]
    assert rows[0]["choices"] == [{"index": 0, "turns": ["A response.", "A response."]}]
    assert rows[0]["model_id"] == "mine" and rows[0]["answer_id"] != rows[1]["answer_id"]


@pytest.mark.parametrize(("form", "row", "message"), [
    (AlpacaEval(), {"prompt": "a"}, "'instruction' should be text"),
    (ArenaHard(), {"uid": "a", "prompt": " "}, "'prompt' is blank"),
    (MTBench(), {"question_id": "81", "turns": ["a"]}, "'question_id' should be a whole number"),
    (MTBench(), {"question_id": 81, "turns": ["a", 3]}, "'turns' should be text"),
    (GSM8K(), {"question": "a", "answer": "42"}, "should end in ####"),
    (Constraints(), {"prompt": "a", "constraints": [{"kind": "no such"}]}, "a constraint is written"),
])  # fmt: skip
def test_malformed_row_is_named(tmp_path, form, row, message):
    good = {"instruction": "a", "uid": "b", "prompt": "c", "question_id": 1, "turns": ["d"], "question": "e"}
    good |= {"answer": "#### 4", "constraints": [{"kind": "no_commas", "params": {}}]}
    source = write_pairs(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2: .*" + message):
        PromptDataModule(source, form).setup("predict")


def test_same_id_twice_is_named(tmp_path):
    source = write_pairs(tmp_path / "rows.jsonl", [{"uid": "a", "prompt": "c"}, {"uid": "a", "prompt": "d"}])
    with pytest.raises(InputError, match="row 1 and row 2 have the same id a"):
        PromptDataModule(source, ArenaHard()).setup("predict")


def test_gsm8k_by_hand():
    prompt = GSM(1, {"question": "2 + 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"})
    right = ["2 + 2 = 5, so\n#### 4", "It is 4.", "##### 12. Add them\nIt is 4", "#### 4. She has 4 of 20"]
    right += ["#### 4\n\nQuestion: next one\n#### 10"]
    wrong = ["#### $1,204.00 for all", "4 apples and 5 pears", "no number", "#### -4", "", "#### 1. Add\n#### 4"]
    scores = {text: GSM.score(prompt, text) for text in right + wrong}
    assert scores == {**dict.fromkeys(right, 1), **dict.fromkeys(wrong, 0)}
    prompt = GSM(1, {"question": "How much?", "answer": "#### 1,204"})
    texts = ("#### $1,204.00", "It costs 1204.", "1,204", "#### 1205")
    assert [GSM.score(prompt, text) for text in texts] == [1, 1, 1, 0]


@pytest.mark.shared
def test_gsm8k_takes_the_published_responses():
    """Every published response scores 1, the next one's 0 (but where both are the same number)."""
    data = PromptDataModule(str(SHARED / "gsm8k_test.jsonl.gz"), GSM)
    data.setup("test")
    rows = [prompt.row for prompt in data.prompts]
    assert len(rows) == 1319 and {GSM.score(prompt, str(prompt.row["answer"])) for prompt in data.prompts} == {1}
    for prompt, other in zip(data.prompts, rows[1:] + rows[:1], strict=True):
        assert GSM.score(prompt, other["answer"]) == (other["final"] == prompt.row["final"])


@pytest.mark.shared
def test_published_questions_are_read():
    data = PromptDataModule(str(SHARED / "mt_bench_questions.jsonl"), MTBench())
    data.setup("predict")
    assert len(data.prompts) == 80 and all(len(prompt.turns) == 2 for prompt in data.prompts)
    data = PromptDataModule(str(SHARED / "alpaca_eval_instructions.csv"), AlpacaEval())
    data.setup("predict")
    assert len(data.prompts) == 805


def test_gold_score_of_gsm8k_beside_its_own_output(tiny_model, tmp_path):
    """`response` is a column of the benchmark, and stays its gold response."""
    rows = [{"question": f"{WORDS[i]}?", "answer": f"so\n#### {i}", "output": "of the row"} for i in range(3)]
    command = responses("test", "GSM8K", write_pairs(tmp_path / "gsm.jsonl", rows), tmp_path, tiny_model)
    assert in_process(*command) == 0
    written = json.loads((tmp_path / "tiny.json").read_text())
    assert [row["answer"] for row in written] == [row["answer"] for row in rows]
    assert "of the row" not in {row["output"] for row in written}


def test_gold_score(tiny_model, tmp_path):
    both = {"constraints": [{"kind": kind, "params": {}} for kind in ("no_commas", "has_number")]}
    parts = ["seen"] * 4 + ["unseen"] * 2
    rows = [both | {"prompt_id": f"p{i}", "prompt": WORDS[i], "part": part} for i, part in enumerate(parts)]
    source = write_pairs(tmp_path / "prompts.jsonl", rows)
    assert in_process(*responses("test", "Constraints", source, tmp_path, tiny_model)) == 0
    table, written = (tmp_path / "tiny.md").read_text(), json.loads((tmp_path / "tiny.json").read_text())
    assert [row["score"] for row in written] == [0.5] * 6  # words without commas or digits
    assert "| all prompts | 6 | 0.500 [0.500, 0.500] |" in table and "| unseen | 2 |" in table


def test_run_brings_its_base_adapter_and_template(tiny_model, tmp_path):
    """The responses are the policy's, merged or not, asked with the template of training. A PEFT folder does not say
    quantization and dtype: they are what is said here."""
    from test_export import write_run

    run = write_run(tmp_path / "run", tiny_model, scale=0.5)
    shutil.copytree(run / "adapter", tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": tiny_model}))
    source = write_pairs(tmp_path / "question.jsonl", questions(4, turns=1))
    choices = {}
    for name, more in {
        "base": (),
        "policy": ("--model.run", str(run)),
        "merged": ("--model.run", str(run), "--model.dequantise", "true"),
        "peft": ("--model.run", str(tmp_path / "peft")),
    }.items():
        assert in_process(*responses("predict", "MTBench", source, tmp_path / name, tiny_model, *more)) == 0
        choices[name] = [row["choices"] for row in read(tmp_path / name / "tiny.jsonl")]
    assert choices["policy"] == choices["merged"] == choices["peft"] != choices["base"]


def test_a_prompt_that_cannot_be_asked_is_named_by_its_id(tiny_model, tmp_path, capsys):
    template = tmp_path / "template"
    refuses = "{% if 'moon' in messages[0]['content'] %}{{ raise_exception('no moon') }}{% endif %}"
    template.write_text(refuses + TEMPLATE)
    rows = [{"uid": f"u{i}", "prompt": f"{WORDS[i]} {WORDS[i]}"} for i in range(7)]  # WORDS[5] is moon
    command = responses("predict", "ArenaHard", write_pairs(tmp_path / "q.jsonl", rows), tmp_path, tiny_model)
    assert in_process(*command, "--model.chat_template", str(template)) == 1
    assert "prompt u5: " in capsys.readouterr().err


class Echo(BaseHTTPRequestHandler):
    """Says what was asked, in capitals; the first request of each server fails."""

    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked: list[dict[str, Any]] = self.server.asked  # type: ignore[attr-defined]
        with self.lock:
            asked.append(body)
            fails = len(asked) == 1
        words = body["messages"][-1]["content"].upper().split()
        choice = {"message": {"content": " ".join(words[:2])}, "finish_reason": "length" if len(words) > 2 else "stop"}
        response = json.dumps({"choices": [choice], "usage": {"completion_tokens": len(words[:2])}}).encode()
        self.send_response(500 if fails else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(handler: Any) -> Iterator[tuple[Any, str]]:
    """A server and its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def test_responses_of_a_server(tmp_path):
    """Two turns by an OpenAI-compatible server; the key is in no file."""
    source = write_pairs(tmp_path / "question.jsonl", questions(4))
    with serving(Echo) as (server, url), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-secret")
        arguments = responses("predict", "MTBench", source, tmp_path, "served", "--model.server", url)
        assert in_process(*arguments) == 0
    rows = read(tmp_path / "tiny.jsonl")
    for row, question in zip(rows, questions(4), strict=True):
        said = [" ".join(turn.upper().split()[:2]) for turn in question["turns"]]
        assert row["choices"] == [{"index": 0, "turns": said}]
        assert row["generate_params"]["ended"] == [len(turn.split()) == 2 for turn in question["turns"]]
    assert len(server.asked) == 9 and server.asked[0]["max_tokens"] == 6
    assert {len(body["messages"]) for body in server.asked} == {1, 3}
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.glob("tiny*"))


def test_a_server_that_does_not_know_the_model(tmp_path, capsys):
    """The remedy names no option of `mixdpo judge`."""

    def refuse(self: Any) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(404)

    source = write_pairs(tmp_path / "question.jsonl", questions(1))
    with serving(type("Missing", (Echo,), {"do_POST": refuse})) as (_, url):
        assert in_process(*responses("predict", "MTBench", source, tmp_path, "served", "--model.server", url)) == 1
    message = capsys.readouterr().err
    assert "check the model's name and the server's URL" in message and "--base_url" not in message


def test_a_prompt_that_a_server_refuses_loses_no_other(tmp_path, monkeypatch, capsys):
    """Nor a turn of another, and nothing is asked twice; a folder of the model's name is nothing to it."""

    def refuse(self: Any) -> None:
        if (length := int(self.headers["Content-Length"])) > 2000:
            self.rfile.read(length)
            return self.send_error(400, "too long")
        return Echo.do_POST(self)

    (tmp_path / "served").mkdir()
    (tmp_path / "served/config.yaml").write_text("of: no run")
    monkeypatch.chdir(tmp_path)
    rows = questions(3)
    rows[1]["turns"][1] = "moon " * 500
    source = write_pairs(tmp_path / "question.jsonl", rows)
    handler = type("Short", (Echo,), {"do_POST": refuse})
    with serving(handler) as (server, url):
        arguments = responses("predict", "MTBench", source, tmp_path, "served", "--model.server", url)
        assert in_process(*arguments) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "gave no response to 1 prompts (first: 82: HTTP 400" in said and "lower model.max_new_tokens" in said
        assert len(read_store(tmp_path / "tiny.responses.sqlite", "responses", "")[1]) == 2
        asked, served = len(server.asked), server.asked[:]
        assert in_process(*arguments) == 1
        assert len(server.asked) == asked + 1  # the first turn of the one that failed
    assert len({body["seed"] for body in served}) == 3 + 2


@pytest.mark.parametrize(("verb", "form", "more", "message"), [
    ("test", "MTBench", (), "MTBench has no gold score"),
    ("predict", "MTBench", ("--model.temperature", "{math: 0.5}"), "no value for category 'writing'"),
    ("fit", "MTBench", (), "does not fit"),
    ("predict", "MTBench", ("--model.max_new_tokens", "255"), "max_new_tokens"),
    ("predict", "MTBench", ("--model.run", "nowhere", "--model.server", "x"), "give one model: model.run, or"),
    ("predict", "MTBench", ("--model.run", "nowhere"), "nowhere"),
])  # fmt: skip
def test_impossible_wishes(tiny_model, tmp_path, capsys, verb, form, more, message):
    source = write_pairs(tmp_path / "question.jsonl", questions(4, turns=1))
    assert in_process(*responses(verb, form, source, tmp_path / "runs", tiny_model, *more)) == 1
    assert message in capsys.readouterr().err


def test_file_of_a_hub_data_set(monkeypatch, tmp_path):
    import huggingface_hub

    local = write_pairs(tmp_path / "alpaca_eval.jsonl", [{"instruction": "Why?"}])

    def download(repository: str, file: str, repo_type: str) -> str:
        assert (repository, file, repo_type) == ("tatsu-lab/alpaca_eval", "some/alpaca_eval.jsonl", "dataset")
        return shutil.copy(local, tmp_path / "downloaded.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = PromptDataModule("hf://datasets/tatsu-lab/alpaca_eval/some/alpaca_eval.jsonl")
    data.setup("predict")
    assert data.prompts == [Prompt("1", ("Why?",), {"instruction": "Why?"})]
    for source in ("hf://datasets/a/b", "hf://datasets/c/d/e.csv"):
        with pytest.raises(InputError, match=r"(?s)cannot be read.*Give hf://datasets/OWNER/NAME/FILE"):
            PromptDataModule(source).setup("predict")


# The gold score before and after training: the table by hand, and the callback around a short run.
def scored(scores: Sequence[float], tokens: Sequence[int], ended: Sequence[bool]) -> Responses:
    given = [Response("text", length, end) for length, end in zip(tokens, ended, strict=True)]
    return Responses(given, np.array(scores))


# Seen prompts gain 1 each, so their interval has no width; of the others one gains ½ and one loses ½.
BEFORE = scored([0.0, 0.25, 0.5, 1.0], [10, 20, 30, 64], [True, True, True, False])
AFTER = scored([1.0, 1.25, 1.0, 0.5], [20, 30, 40, 50], [True, True, True, True])
PARTS = ["seen", "seen", "new", "new"]


def test_compare_by_hand() -> None:
    rows = compare(BEFORE, AFTER, PARTS)
    expected = {  # n, before, after, difference
        "gold score, all prompts": (4, 1.75 / 4, 3.75 / 4, 0.5),
        "gold score, seen": (2, 0.125, 1.125, 1.0),
        "gold score, new": (2, 0.75, 0.75, 0.0),
        "response length, tokens": (4, 31.0, 35.0, 4.0),
        "ended by itself": (4, 0.75, 1.0, 0.25),
    }
    assert list(rows) == list(expected)
    for name, values in expected.items():
        assert [rows[name][key] for key in ("n", "before", "after", "difference")] == pytest.approx(values), name
    assert (rows["gold score, seen"]["low"], rows["gold score, seen"]["high"]) == (1.0, 1.0)
    # two resampled differences of ±½: means −½, 0 and ½ with chances ¼, ½ and ¼
    assert (rows["gold score, new"]["low"], rows["gold score, new"]["high"]) == (-0.5, 0.5)
    # four of which one is 1: the mean is 0 in 32 % of the resamples and above ¾ in 0.4 %
    assert (rows["ended by itself"]["low"], rows["ended by itself"]["high"]) == (0.0, 0.75)


def test_compare_without_scores() -> None:
    before, after = (Responses(one.given, np.full(4, np.nan)) for one in (BEFORE, AFTER))
    assert list(compare(before, after, PARTS)) == ["response length, tokens", "ended by itself"]


def test_markdown_by_hand() -> None:
    keys = ("n", "before", "after", "difference", "low", "high")
    given = {"gold score, seen": (2, 0.125, 1.0625, 0.9375, -0.25, 1.0)}
    given |= {"response length, tokens": (2, 31, 28.5, -2.5, -4, 0.75)}
    rows = {name: dict(zip(keys, values, strict=True)) for name, values in given.items()}
    assert markdown(rows, {"optimizer steps": "7"}).splitlines() == [
        "| held-out prompts | n | before | after | difference [95 % interval] |",
        "|---|---|---|---|---|",
        "| gold score, seen | 2 | 0.125 | 1.062 | +0.938 [-0.250, +1.000] |",
        "| response length, tokens | 2 | 31.0 | 28.5 | -2.5 [-4.0, +0.8] |",
        "",
        "| training and held-out rows | |",
        "|---|---|",
        "| optimizer steps | 7 |",
    ]


class CountsWord:
    """A scorer from outside the project: how often the response says the row's word."""

    def __call__(self, row: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
        return [float(text.split().count(row["word"])) for text in texts]


def write_prompts(folder: Path) -> str:
    parts = ["even", "odd"] * 3
    rows = [{"prompt": f"{WORDS[i]} {WORDS[-i]} 7", "word": WORDS[0], "part": part} for i, part in enumerate(parts)]
    return write_pairs(folder / "prompts.jsonl", rows)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_prompts(tmp_path)


def run(model: str, folder: Path, callback: Any, **options: Any) -> tuple[PreferenceModule, dict[str, torch.Tensor]]:
    """A fit with dropout, so that any random number that the evaluation draws would show in the adapter."""
    source, ckpt_path = write_pairs(folder.with_suffix(".jsonl"), make_pairs(12)), options.pop("ckpt_path", None)
    callbacks = [*([callback] if callback else []), RunFiles(), ExactResume(), Throughput()]
    defaults: dict[str, Any] = {"lora": Lora(rank=4, alpha=8, dropout=0.3), "schedule": Constant(warmup=0.0), "lr": 5.0}
    defaults |= {"data": {"validation": 0.2}, "trainer": {"callbacks": callbacks}}
    trainer, module, data = build(model, source, folder, **{**defaults, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, adapter_weights(module)


def evaluation(prompts: str, **options: Any) -> GoldEvaluation:
    return GoldEvaluation(prompts, **{"scorer": CountsWord(), "max_new_tokens": 4, "batch_size": 2, **options})


Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def watched(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Weights]]:
    """Runs that start from the adapter of the run `start`: alone, and watched with a dequantised copy and without."""
    folder, weights = tmp_path_factory.mktemp("watched"), {}
    held_out, adapter = write_prompts(folder), str(folder / "start/adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_responses, "cache_root", lambda: folder / "cache")
        run(tiny_model, folder / "start", None)
        _, weights["alone"] = run(tiny_model, folder / "alone", None, adapter=adapter)
        for name, dequantise in (("copy", True), ("as_trained", False)):
            callback = evaluation(held_out, dequantise=dequantise)
            module, weights[name] = run(tiny_model, folder / name, callback, adapter=adapter)
            policy = {name: p.requires_grad for name, p in module.model.named_parameters()}
            assert module.model.training and policy == {name: ".policy." in name for name in policy}
    return folder, weights


def test_files_of_the_run(watched: tuple[Path, dict[str, Weights]]) -> None:
    folder = watched[0] / "copy"
    results, rows = (json.loads((folder / name).read_text()) for name in ("results.json", "responses.json"))
    assert (folder / "results.md").read_text() == markdown(results["heldout_prompts"], results["summary"]) + "\n"
    assert results["summary"]["optimizer steps"] == str(results["steps"]) != "0"
    assert (
        " [0.000, 1.000] (" in results["summary"]["reward accuracy, 1 easy held-out pairs (the longer response wins)"]
    )
    assert [row["part"] for row in rows] == ["even", "odd"] * 3
    for row in rows:
        for when in ("before", "after"):
            assert row[when]["score"] == row[when]["text"].split().count(row["word"])
            assert 1 <= row[when]["tokens"] <= 4 and row[when]["ended"] in (True, False)
    for name, chosen in (("all prompts", rows), ("even", rows[::2]), ("odd", rows[1::2])):
        means = results["heldout_prompts"][f"gold score, {name}"]
        for when in ("before", "after"):
            assert means[when] == pytest.approx(sum(row[when]["score"] for row in chosen) / len(chosen))


@pytest.mark.parametrize("name", ["copy", "as_trained"])
def test_before_is_the_start_and_after_is_the_policy(name, tiny_model, watched) -> None:
    """Before is the adapter that training starts from, neither the bare base nor the trained policy. The run is the one
    without the callback."""
    folder, weights = watched
    prompts = str(folder / "prompts.jsonl")
    expected = {"base": plain_responses(plain_model(tiny_model), prompts, load_tokenizer(tiny_model))}
    expected |= {each: responses_of(tiny_model, folder / each / "adapter", prompts) for each in ("start", name)}
    assert len({tuple(texts) for texts in expected.values()}) == 3, "the three models respond alike: nothing could fail"
    rows = json.loads((folder / name / "responses.json").read_text())
    assert [row["before"]["text"] for row in rows] == expected["start"]
    assert [row["after"]["text"] for row in rows] == expected[name]
    assert all(torch.equal(value, weights[name][key]) for key, value in weights["alone"].items())


def plain_responses(model: Any, prompts: str, tokenizer: Any) -> list[str]:
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    return [each.text for each in greedy(model, tokenizer, rows, max_new_tokens=4, batch_size=2)]


def responses_of(model: str, adapter: Path, prompts: str) -> list[str]:
    from peft import PeftModel

    policy = PeftModel.from_pretrained(plain_model(model), str(adapter))
    return plain_responses(policy, prompts, load_tokenizer(model))


def test_after_is_what_adapter_holds(tiny_model: str, prompts: str, tmp_path: Path) -> None:
    """The best policy where a checkpoint monitors a metric, although RunFiles, which loads it, comes later."""
    best = ModelCheckpoint(monitor="val/all/sft_loss", mode="max", dirpath=tmp_path / "best")  # the first epoch's
    callbacks = [evaluation(prompts), RunFiles(), ExactResume(), Throughput(), best]
    data = {"validation": 0.3, "routing": Routing(hard_fraction=1.0)}
    run(tiny_model, tmp_path / "run", None, data=data, lr=0.5, trainer={"callbacks": callbacks, "max_epochs": 3})
    assert "epoch=0" in best.best_model_path
    rows = json.loads((tmp_path / "run/responses.json").read_text())
    assert [row["after"]["text"] for row in rows] == responses_of(tiny_model, tmp_path / "run/adapter", prompts)
    results = (tmp_path / "run/results.md").read_text()
    assert f"| of the best val/all/sft_loss | {best.best_model_score:.4f} |" in results
    # the last validation's, of another policy
    assert "reward accuracy" not in results and "displacement" not in results


def test_before_is_the_start_of_a_continued_run(tiny_model, prompts, tmp_path, monkeypatch) -> None:
    """The reference was refreshed before the checkpoint, which is what its responses would be of."""
    options: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 0.3, "schedule": Constant(warmup=0.0)}

    def trained(name: str, ckpt_path: str | None = None, how: Any = None, **trainer: Any) -> GoldEvaluation:
        first = evaluation(prompts, **(how or {})), RefreshReference(every=1, role="reference")
        callbacks = [*first, RunFiles(), ExactResume(), Throughput(), LastCheckpoint()]
        trainer |= {"callbacks": callbacks, "max_epochs": 2}
        run(tiny_model, tmp_path / name, None, ckpt_path=ckpt_path, trainer=trainer, **options)
        return first[0]

    cut = trained("cut", max_steps=3)
    monkeypatch.setattr("mixdpo.evaluation.kept_responses.cache_root", lambda: tmp_path / "cache")
    checkpoint = str(tmp_path / "cut/checkpoints/last.ckpt")
    rest = trained("rest", checkpoint, {"batch_size": 2, "dequantise": False})  # what memory allows may change
    assert cut.before is not None and rest.before is not None and rest.before.rows() == cut.before.rows()
    steps = [json.loads((tmp_path / name / "results.json").read_text())["steps"] for name in ("cut", "rest")]
    assert steps[0] == 3 < steps[1]
    rows = json.loads((tmp_path / "cut/responses.json").read_text())
    assert any(row["before"]["text"] != row["after"]["text"] for row in rows), "refreshing changed no response"
    write_pairs(Path(prompts), [{"prompt": "other", "word": "red"}])
    with pytest.raises(InputError, match=r"another run.*GoldEvaluation\.prompts: "):
        trained("other", checkpoint)
    with pytest.raises(InputError, match=r"another run.*GoldEvaluation\.max_new_tokens: "):
        trained("longer", checkpoint, {"max_new_tokens": 3})


class TwiceThat(CountsWord):
    def __call__(self, row: Mapping[str, Any], texts: Sequence[str]) -> list[float]:
        return [2 * score for score in super().__call__(row, texts)]


def test_responses_of_the_start_are_kept(tiny_model, prompts, tmp_path, monkeypatch, capsys) -> None:
    """Generated once for runs from the same start; again for whatever they depend on. Scores are never kept."""
    generated: list[int] = []
    count = iter(range(99))

    def greedy(*arguments: Any, **options: Any) -> Any:
        generated.append(1)
        return gold.greedy(*arguments, **options)

    def times(callback: GoldEvaluation, **options: Any) -> int:
        """How often a run of one step generates."""
        generated.clear()
        callbacks = {"callbacks": [RunFiles(), ExactResume(), Throughput(), callback], "max_steps": 1}
        run(options.pop("model", tiny_model), tmp_path / f"run{next(count)}", None, trainer=callbacks, **options)
        return len(generated)

    monkeypatch.setattr("lightning_modules.callbacks.gold_evaluation.greedy", greedy)
    first, second, third = evaluation(prompts), evaluation(prompts), evaluation(prompts, scorer=TwiceThat())
    assert times(first) == 2 and "the responses are kept in" not in capsys.readouterr().out
    assert times(second, lr=1.0, lora=Lora(rank=2)) == 1 and "the responses are kept in" in capsys.readouterr().out
    assert times(third) == 1
    assert first.before is not None and second.before is not None and third.before is not None
    assert first.before.rows() == second.before.rows() and third.before.given == first.before.given
    assert third.before.scores.tolist() == (2 * first.before.scores).tolist()
    for name, other in {"dequantise": False, "max_new_tokens": 3}.items():
        assert times(evaluation(prompts, **{name: other})) == 2, name
    assert times(evaluation(prompts), adapter=str(tmp_path / "run0/adapter")) == 2
    template = tmp_path / "template"
    template.write_text(TEMPLATE.replace("<|im_start|>", "<|im_start|>red "))
    assert times(evaluation(prompts), data={"validation": 0.2, "chat_template": str(template)}) == 2
    assert times(evaluation(prompts), model=changed_model(tiny_model, tmp_path / "changed")) == 2
    assert times(evaluation(prompts)) == 1  # nothing was written over


def test_responses_that_cannot_be_kept_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept_responses, "cache_root", lambda: tmp_path / "file")
    responses = [Response("red", 2, True)]
    with pytest.warns(UserWarning, match=rf"responses, {tmp_path}/file/.*, cannot be used .*MIXDPO_CACHE"):
        assert kept_responses.kept_responses({}, lambda: responses) == responses


def test_kept_responses_depend_on_the_code_and_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def times() -> int:
        """How often they have been generated."""
        kept_responses.kept_responses({}, lambda: made.append(1) or [])  # type: ignore[func-returns-value]
        return len(made)

    assert [times(), times()] == [1, 1]
    (tmp_path / "other.py").touch()
    for count, module in enumerate(("generation", "export", "tokenization"), 2):
        with monkeypatch.context() as patch:
            patch.setattr(kept_responses, module, SimpleNamespace(__file__=tmp_path / "other.py"))
            assert times() == count, module
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for card, count in (("A", 5), ("B", 6), ("A", 6)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        assert times() == count
