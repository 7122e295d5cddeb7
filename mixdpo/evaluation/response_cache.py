"""Responses of an untrained model, kept on disk: every run of a study would generate the same ones again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixdpo.data import chat_template as tokenization
from mixdpo.evaluation import generation
from mixdpo.evaluation.generation import Generation
from mixdpo.model import export
from mixdpo.storage.files import cache_root, or_without, read_json, write_json


def kept_responses(of: Mapping[str, Any], make: Callable[[], list[Generation]]) -> list[Generation]:
    """What `make` returns, from a file where it was made before with the same `of`.

    A file that is damaged is replaced, and one that cannot be written is done without, with a warning.

    Args:
        of: all that the responses depend on, in JSON's types; the machine and the code that generates are added here.
    """
    depends = {**of, **_machine()}
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_root() / "answers" / f"{name}.json"
    with or_without("answers", path):
        if path.exists():
            print(f"the responses are kept in {path}")
            return [Generation(**row) for row in read_json(path, {"answers"}, "delete it")["answers"]]
    responses = make()
    with or_without("answers", path):
        write_json(path, {"of": depends, "answers": [asdict(response) for response in responses]})
    return responses


def _machine() -> dict[str, Any]:
    """What rounds differently or generates differently."""
    import transformers

    modules = generation, export, tokenization
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return {
        "code": hashlib.sha256(code).hexdigest()[:16],
        "versions": [torch.__version__, transformers.__version__],
        "cpu": [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
