"""Responses of an untrained model, kept on disk: every run of a study would generate the same ones again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mixdpo.data import chat_template as tokenization
from mixdpo.data import control_tokens
from mixdpo.evaluation import generation
from mixdpo.evaluation.generation import Response
from mixdpo.model import export
from mixdpo.storage.files import cache_root
from mixdpo.storage.store import Store


def kept_responses(of: Mapping[str, Any], make: Callable[[], list[Response]]) -> list[Response]:
    """What `make` returns, from a file where it was made before with the same `of`.

    Args:
        of: all that the responses depend on, in JSON's types; the machine and the code that generates are added here.
    """
    key = hashlib.sha256(json.dumps({**of, **_machine()}, sort_keys=True).encode()).hexdigest()
    with Store(cache_root() / "responses" / "responses.sqlite", {}, noun="responses", cache=True) as store:
        if kept := store.get([key]):
            print(f"the responses are kept in {store.path}")
            return [Response(**row) for row in json.loads(kept[key])]
        responses = make()
        store.add({key: json.dumps([vars(response) for response in responses]).encode()})
    return responses


def _machine() -> dict[str, Any]:
    """What rounds differently or generates differently."""
    import transformers

    modules = generation, export, tokenization, control_tokens
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return {
        "code": hashlib.sha256(code).hexdigest()[:16],
        "versions": [torch.__version__, transformers.__version__],
        "cpu": [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
