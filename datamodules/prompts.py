"""The LightningDataModule of prompts: read, checked, and handed over in batches of like length."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning as L
from jsonargparse import lazy_instance
from jsonargparse.typing import PositiveInt
from torch.utils.data import DataLoader

from mixdpo.data.sources import open_source
from mixdpo.errors import InputError, located
from mixdpo.evaluation.formats import AlpacaEval, Prompt


class PromptDataModule(L.LightningDataModule):
    def __init__(
        self,
        source: str,
        form: Callable[[int, Any], Any] = lazy_instance(AlpacaEval),  # noqa: B008
        split: str = "train",
        limit: PositiveInt | None = None,
        batch_size: PositiveInt = 16,
    ) -> None:
        """Prompts of a benchmark.

        Args:
            source: Local .json, .jsonl, .csv (each also .gz) or .parquet file, a folder, a hub data set, a file of one
                (hf://datasets/OWNER/NAME/FILE), or `heldout` for the built-in prompts of the task `constraints`.
            form: Class path of the format that reads rows and writes responses: AlpacaEval, ArenaHard, MTBench or, with
                a gold score, Constraints and GSM8K, all of mixdpo.evaluation.formats.
            split: Split of a hub data set or folder.
            limit: Number of prompts to respond to, from the first on; all if null.
            batch_size: Prompts whose responses are generated together.
        """
        super().__init__()
        self.source, self.form, self.split, self.limit, self.batch_size = source, form, split, limit, batch_size
        self.prompts: list[Prompt] = []

    def setup(self, stage: str) -> None:
        """
        Raises:
            InputError: a row lacks what its benchmark needs, or two rows have the same id.
        """
        if self.prompts:
            return
        opened = open_source(self.source, self.split)
        seen: dict[str, str] = {}
        for number, place, row in islice(opened.rows, self.limit):
            with located(f"{opened.name}, {place}"):
                prompt = self.form(number, row)
            if (first := seen.setdefault(prompt.key, place)) != place:
                raise InputError(f"{opened.name}: {first} and {place} have the same id {prompt.key}")
            self.prompts.append(prompt)
        if not self.prompts:
            raise InputError(f"{opened.name} holds no prompt: give a file with prompts")

    def predict_dataloader(self) -> Any:
        """Batches in which a prompt still lacks its response, longest first: the first batch is the peak of memory.

        All prompts are cut into batches, because sampling depends on the batch.
        """
        missing = {prompt.key for prompt in self.trainer.lightning_module.file.missing}  # type: ignore[union-attr]
        ordered = sorted(self.prompts, key=lambda prompt: -sum(map(len, prompt.turns)))
        cut = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        left: Any = [batch for batch in cut if any(prompt.key in missing for prompt in batch)]
        return DataLoader(left, batch_size=None, collate_fn=lambda batch: batch)

    test_dataloader = predict_dataloader
