"""Benchmarks through lm-eval: on a local task, the numbers that the model's own forward gives."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from test_export import write_run

from mixdpo.errors import InputError
from mixdpo.evaluation.harness import PAPERS, SHOTS, evaluate, table

pytest.importorskip("lm_eval")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{response}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
LIKELIHOOD = """\
output_type: loglikelihood
doc_to_target: " {{choices[response]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
QUESTIONS = [
    {"question": "user red blue", "choices": ["green tea", "sun moon sea"], "answer": 0},
    {"question": "cat dog", "choices": ["tree", "hill road"], "answer": 1},
    {"question": "book song rain wind", "choices": ["salt", "snow"], "answer": 1},
    {"question": "bird", "choices": ["fish red", "tea"], "answer": 0},
    {"question": "moon sun", "choices": ["wind rain", "song book"], "answer": 0},
]


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, rest in (("tiny_choice", CHOICE), ("tiny_likelihood", LIKELIHOOD)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    return str(folder)


def log_probability(model: Any, tokenizer: Any, question: str, response: str) -> float:
    """Of the response's tokens after the question, from one plain forward."""
    ids = tokenizer(f"{question} {response}")["input_ids"]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[at - 1, ids[at]]) for at in range(len(tokenizer(question)["input_ids"]), len(ids)))


@pytest.mark.parametrize("of", ["run", "base"])
def test_a_local_task_by_hand(
    of: str, tiny_model: str, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    run = write_run(tmp_path / "run", tiny_model, scale=0.3)
    if of == "run":
        model = PeftModel.from_pretrained(model, str(run / "adapter"))
    found = [[log_probability(model, tokenizer, row["question"], c) for c in row["choices"]] for row in QUESTIONS]
    right = [max(range(2), key=said.__getitem__) == row["answer"] for said, row in zip(found, QUESTIONS, strict=True)]
    mean = sum(said[row["answer"]] for said, row in zip(found, QUESTIONS, strict=True)) / len(QUESTIONS)

    evaluate(
        str(run) if of == "run" else tiny_model,
        "tiny_choice,tiny_likelihood",
        out=str(tmp_path / "results.json"),
        batch_size=2,
        include_path=tasks,
        dtype="float32",
    )
    written = json.loads((tmp_path / "results.json").read_text())
    accuracy = sum(right) / len(right)
    assert written["results"]["tiny_choice"]["acc,none"] == accuracy
    perplexity = written["results"]["tiny_likelihood"]["perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-mean), rel=1e-4)
    assert written["adapter"] == (str(run / "adapter") if of == "run" else "none") and written["base"] == tiny_model
    assert written["n-samples"]["tiny_choice"] == {"original": 5, "effective": 5}
    said = capsys.readouterr().out
    error = math.sqrt(accuracy * (1 - accuracy) / 4)  # of a mean of five
    assert f"| tiny_choice | 0 | 5 | acc | {accuracy:.4f} | {error:.4f} |" in said
    assert f"| tiny_likelihood | 0 | 5 | perplexity | {perplexity:.4f} |" in said


def test_the_chat_template_and_the_limit(tiny_model: str, tasks: str, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", tiny_model), tmp_path / "results.json"
    found = []
    for apply in (False, True):
        evaluate(str(run), "tiny_likelihood", str(out), 2, include_path=tasks, apply_chat_template=apply)
        written = json.loads(out.read_text())
        assert written["n-samples"]["tiny_likelihood"]["effective"] == 2
        found.append(written["results"]["tiny_likelihood"]["perplexity,none"])
    assert abs(found[0] - found[1]) > 0.01
    plain = write_run(tmp_path / "plain", tiny_model, chat_template="plain")
    with pytest.raises(InputError, match="trained on plain text"):
        evaluate(str(plain), "tiny_likelihood", include_path=tasks, apply_chat_template=True)


def test_what_is_refused(tiny_model: str, tasks: str, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "broken.yaml").write_text(TASK.format(name="broken", data=tmp_path / "none.jsonl") + CHOICE)
    for given, match in (
        ({"tasks": "broken"}, "'broken' could not be loaded.*none.jsonl"),
        ({"tasks": "tiny_choice", "limit": 0}, "limit 0: each must be at least 1"),
        ({"tasks": "tiny_choice", "batch_size": 0}, "batch_size 0"),
        ({"tasks": "tiny_choice", "include_path": str(tmp_path / "nowhere")}, "is no folder"),
        ({"tasks": "tiny_choice", "model": str(tmp_path)}, "could not be loaded"),
    ):
        with pytest.raises(InputError, match=match):
            evaluate(**{"model": tiny_model, "include_path": tasks, **given})


@pytest.mark.slow  # reads thousands of YAML files
def test_names_of_lm_evals_own_tasks(tiny_model: str, tasks: str) -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().task_index
    assert {name for names in PAPERS.values() for name in names.split(",")} | set(SHOTS) <= set(known)
    with pytest.raises(InputError, match=r"no task 'tiny_chioce': .*--include_path"):
        evaluate(tiny_model, "tiny_choice,tiny_chioce", include_path=tasks)


def test_without_lm_eval(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[lm-eval\]'"):
        evaluate(tiny_model)


def test_a_table_of_groups() -> None:
    values = {"acc,none": 0.25, "acc_stderr,none": 0.125, "f1,best": 0.5, "f1_stderr,best": "N/A", "sample_len": 7}
    results = {"results": {"group": {"alias": "g", "name": "group", **values}}, "n-shot": {"group": 5}}
    assert table(results, ["group"]).splitlines()[2:] == [
        "| group | 5 | 7 | acc | 0.2500 | 0.1250 |",
        "| group | 5 | 7 | f1 (best) | 0.5000 | – |",
    ]


def test_all_words_of_the_questions_are_known() -> None:
    words = {word for row in QUESTIONS for text in (row["question"], *row["choices"]) for word in text.split()}
    assert words <= {*WORDS, "user"}
