"""A reward model as a judge: the sigmoid of the difference of two scores."""

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from mixdpo.batches.rows import build_rows
from mixdpo.data.chat_template import load_template
from mixdpo.data.encoding import EncodedPair, encode_pair
from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import NoResponse
from mixdpo.evaluation.verdicts import Order, Source
from mixdpo.model.identity import base_fingerprint
from mixdpo.model.loading import check_vocabulary, gpu_dtype, load_reward_model, load_tokenizer
from mixdpo.signals.signals import rewards

if TYPE_CHECKING:
    from mixdpo.evaluation.judge import Comparison


class RewardJudge:
    def __init__(self, model: str) -> None:
        """A `Judge` of mixdpo.evaluation.judge.

        Args:
            model: hub id or folder of a sequence classifier with one label, with its tokenizer and chat template.

        Raises:
            InputError: there is no such model, it is no sequence classifier with one label, or its template is refused.
        """
        self.name, on_gpu = model, torch.cuda.is_available()
        dtype = gpu_dtype() if on_gpu else "float32"  # bfloat16 is slower on most CPUs
        self._tokenizer = load_tokenizer(model)
        self._template = load_template(self._tokenizer, None)
        # eager: the attention that every architecture knows
        options: dict[str, Any] = {"quantization": "none", "attention": "eager", "device": "cuda" if on_gpu else "cpu"}
        self._model: Any = load_reward_model(model, dtype=dtype, **options)
        known = getattr(self._model.config, "max_position_embeddings", None)
        self._longest = min(known or self._tokenizer.model_max_length, self._tokenizer.model_max_length)
        self.about = {"kind": "reward model", "model": model, "dtype": dtype, "weights": base_fingerprint(self._model)}

    def orders(self, instruction: str) -> list[Order]:
        return ["model_first"]

    async def aclose(self) -> None:
        pass

    async def __call__(self, comparison: "Comparison", order: Order) -> tuple[float, Source, Counter[str]]:
        """Probability that the model's response is preferred.

        Raises:
            NoResponse: a response is longer than the model can read, or a score is not finite.
            InputError: the chat template refuses the prompt.
        """
        await asyncio.sleep(0)  # lets a signal end the run between two prompts
        pair = self._encode(comparison)
        check_vocabulary(self._model, self.name, max([*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]))
        tokens = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if tokens > self._longest:
            raise NoResponse(f"too long: {tokens} tokens, and the reward model reads {self._longest}")
        rows = build_rows([vars(pair)], [True], [True]).to(self._model.device)
        with torch.no_grad():
            of_model, of_baseline = rewards(self._model, rows)
        preference = (of_model - of_baseline).sigmoid().item()
        if not 0 <= preference <= 1:
            raise NoResponse(f"no finite score: {of_model.item()} and {of_baseline.item()}")
        return preference, "reward_model", Counter()

    def _encode(self, comparison: "Comparison") -> EncodedPair:
        prompt = [{"role": "user", "content": comparison.instruction}]
        try:
            return encode_pair(self._tokenizer, prompt, comparison.model, comparison.baseline, self._template)
        except InputError as error:
            raise InputError(f"row {comparison.index + 1} of the responses: {error}") from error
