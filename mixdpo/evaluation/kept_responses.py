"""Responses on disk: kept prompt by prompt as a model responds, and a cache of responses before training."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixdpo.data import chat_template as tokenization
from mixdpo.evaluation import generation
from mixdpo.evaluation.formats import Prompt, PromptResponses
from mixdpo.model import export
from mixdpo.storage.files import cache_root
from mixdpo.storage.store import Store


class ResponsesFile(Store):
    def __init__(self, path: str | Path, head: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """Continues a file, or makes a new one.

        Args:
            path: FILE.responses.sqlite.
            head: all that the responses depend on, in JSON's types.
            prompts: the prompts to respond to; their keys differ.

        Raises:
            InputError: the file holds other responses or something else, or another process is writing to the file.
        """
        super().__init__(path, head, noun="responses", remedy="remove it, or give another --name")
        self.prompts = {prompt.key: prompt for prompt in prompts}
        self.rows = {key: tuple(_read(value)) for key, value in self.get().items()}

    @property
    def missing(self) -> list[Prompt]:
        return [prompt for key, prompt in self.prompts.items() if key not in self.rows]

    @property
    def answered(self) -> list[PromptResponses]:
        """In the order of the prompts."""
        return [PromptResponses(prompt, self.rows[key]) for key, prompt in self.prompts.items() if key in self.rows]

    def keep(self, answered: Sequence[PromptResponses]) -> None:
        self.add({a.prompt.key: _written(a.responses) for a in answered})
        self.rows |= {a.prompt.key: a.responses for a in answered}


def kept_responses(of: Mapping[str, Any], make: Callable[[], list[generation.Response]]) -> list[generation.Response]:
    """The responses of `make`, or those kept from an earlier call with the same `of`.

    Args:
        of: all that the responses depend on, in JSON's types; machine and code are added.
    """
    key = hashlib.sha256(json.dumps({**of, **_machine()}, sort_keys=True).encode()).hexdigest()
    with Store(cache_root() / "responses" / "responses.sqlite", {}, noun="responses", cache=True) as store:
        if kept := store.get([key]):
            print(f"the responses are kept in {store.path}")
            return _read(kept[key])
        responses = make()
        store.add({key: _written(responses)})
    return responses


def _machine() -> dict[str, Any]:
    """Code, versions and processors, which decide how responses round and are generated."""
    import transformers

    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (generation, export, tokenization))
    versions = [torch.__version__, transformers.__version__]
    cpu = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"code": hashlib.sha256(code).hexdigest()[:16], "versions": versions, "cpu": cpu, "gpu": gpu}


def _written(responses: Sequence[generation.Response]) -> bytes:
    return json.dumps([vars(response) for response in responses]).encode()


def _read(value: bytes) -> list[generation.Response]:
    return [generation.Response(**row) for row in json.loads(value)]
