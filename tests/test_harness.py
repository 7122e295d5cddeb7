"""Benchmarks through lm-eval: on a local task, the numbers that the model's own forward gives."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from test_export import write_run
from test_preference_module import plain_log_prob

from mixdpo.errors import InputError
from mixdpo.evaluation.harness import PAPERS, SHOTS, evaluate

pytest.importorskip("lm_eval")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
LIKELIHOOD = """output_type: loglikelihood
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"""
ASKED = [("user red blue", "green tea", "sun moon sea", 0), ("cat dog", "tree", "hill road", 1)]
ASKED += [("book song rain wind", "salt", "snow", 1), ("bird", "fish red", "tea", 0)]
ASKED += [("moon sun", "wind rain", "song book", 0)]
QUESTIONS = [{"question": asked, "choices": [*both], "answer": answer} for asked, *both, answer in ASKED]


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, rest in (("tiny_choice", CHOICE), ("tiny_likelihood", LIKELIHOOD)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    return str(folder)


@pytest.mark.parametrize("of", ["run", "base"])
def test_a_local_task_by_hand(of, tiny_model, tasks, tmp_path, capsys) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    run = write_run(tmp_path / "run", tiny_model, scale=0.3)
    if of == "run":
        model = PeftModel.from_pretrained(model, str(run / "adapter"))
    ids_of = {text: tokenizer(text)["input_ids"] for row in QUESTIONS for text in (row["question"], *row["choices"])}
    with torch.no_grad():
        pairs = [[(ids_of[row["question"]], ids_of[choice]) for choice in row["choices"]] for row in QUESTIONS]
        values = [[float(plain_log_prob(model, *ids)) for ids in two] for two in pairs]
    answers = [row["answer"] for row in QUESTIONS]
    accuracy = sum(max((0, 1), key=two.__getitem__) == a for two, a in zip(values, answers, strict=True)) / len(answers)
    mean = sum(two[answer] for two, answer in zip(values, answers, strict=True)) / len(answers)
    name, options = str(run) if of == "run" else tiny_model, {"include_path": tasks, "dtype": "float32"}
    evaluate(name, "tiny_choice,tiny_likelihood", str(tmp_path / "results.json"), batch_size=2, **options)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["results"]["tiny_choice"]["acc,none"] == accuracy
    perplexity = written["results"]["tiny_likelihood"]["perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-mean), rel=1e-4)
    assert written["adapter"] == (str(run / "adapter") if of == "run" else "none") and written["base"] == tiny_model
    assert written["n-samples"]["tiny_choice"] == {"original": 5, "effective": 5}
    printed = capsys.readouterr().out
    error = math.sqrt(accuracy * (1 - accuracy) / 4)  # of a mean of five
    for task, metric, *numbers in (("choice", "acc ", accuracy, error), ("likelihood", "perplexity", perplexity)):
        line = next(line for line in printed.splitlines() if line.startswith(f"|tiny_{task}") and f"|{metric}" in line)
        cells = [float(cell) for cell in line.split("|") if re.fullmatch(r" *[\d.]+ *", cell)][1:]  # without n-shot
        assert cells[: len(numbers)] == pytest.approx(numbers, rel=1e-3)


def test_what_is_refused(tiny_model: str, tasks: str, tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", tiny_model))
    (tmp_path / "tasks" / "broken.yaml").write_text(TASK.format(name="broken", data=tmp_path / "none.jsonl") + CHOICE)
    for given, match in (
        ({"tasks": "broken"}, "'broken' could not be loaded.*none.jsonl"),
        ({"tasks": "tiny_choice", "model": str(tmp_path)}, "cannot load"),
        ({"tasks": "tiny_choice", "model": run, "quantization": "nf4"}, "with quantization none: leave --quantization"),
    ):
        with pytest.raises(InputError, match=match):
            evaluate(**{"model": tiny_model, "include_path": tasks, **given})


@pytest.mark.slow  # reads thousands of YAML files
def test_names_of_lm_evals_own_tasks(tiny_model: str, tasks: str) -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().task_index
    assert {name for names in PAPERS.values() for name in names.split(",")} | set(SHOTS) <= set(known)
    with pytest.raises(InputError, match=r"'tiny_chioce' could not be loaded.*--include_path"):
        evaluate(tiny_model, "tiny_choice,tiny_chioce", include_path=tasks)


def test_without_lm_eval(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[lm-eval\]'"):
        evaluate(tiny_model)
