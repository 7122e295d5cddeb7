"""The LightningDataModule of SFT data: read, split, encode, slice into stages, hand over micro-batches."""

from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.planned import PlannedDataModule, hash_of_rows
from mixdpo.batches.batch import SampleCollator
from mixdpo.batches.loader import ResumableLoader
from mixdpo.batches.steps import MicroBatch, Slices, plan_stages
from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.conversations import TrainOn, read_samples
from mixdpo.data.encoding import encoding_identity
from mixdpo.data.sources import Origin
from mixdpo.errors import InputError
from mixdpo.routing.schedules import StepPlan
from mixdpo.storage.identity import content_hash


class SFTDataModule(PlannedDataModule):
    noun = "sample"
    summary_file = "plan.json"
    cleans_by_stage = True

    def __init__(
        self,
        source: str | list[str],
        slices: Slices = Slices(),  # noqa: B008
        max_length: int = 2048,
        train_on: TrainOn = "all",
        one_response_per_sample: bool = False,
        **options: Any,
    ) -> None:
        """Conversations to imitate. Every response is trained on, with its end token; prompts are not. A response that
        the data marks with `weight: 0`, `train: false` or `loss: false` is not trained on; other weights multiply its
        tokens' losses. Blank responses are not trained on, and are counted.

        Args:
            source: Hub id (ID:CONFIG where it has several configurations), local folder, .parquet, .json, .jsonl,
                .jsonl.gz or .csv file. A list [a.jsonl, ORG/NAME] is read as one. Rows are `messages`; or `prompt` and
                `completion`; or `instruction`, `input` and `output`.
            slices: Stages of the training data, for self-evolving token cleaning and its controls.
            max_length: Longest conversation, in tokens.
            train_on: `all` trains on every response of a row, `last` on its last response only.
            one_response_per_sample: Make a sample of each trained response, with all messages before it as its prompt.
                Set this for templates that show earlier turns differently (Qwen3, Phi-3). max_length holds for each
                sample.
        """
        super().__init__(source, **options)
        self.reading: dict[str, Any] = {"train_on": train_on, "one_each": one_response_per_sample}
        self.slices = slices
        self.encoding |= {"max_length": max_length}
        self.pool: TokenPool = None  # type: ignore[assignment]  # until setup

    def plan_rows(self, stage: str) -> None:
        if self.pool is not None:
            return
        train, held_out = self.read_and_split(stage)
        self.pool = self._pool_of(train, "train")
        self.validation_pool = self._pool_of(held_out, "validation") if held_out is not None else None
        held_out_sources = set(self.validation_pool.samples["source"]) if self.validation_pool else set()
        self.sources = {name: i for i, name in enumerate(sorted({*self.pool.samples["source"], *held_out_sources}))}
        # with more sources, only the held-out loss over all sources is reported
        self.reported_sources = sorted(held_out_sources - {""}) if len(held_out_sources) <= 50 else []
        self.stages = plan_stages(len(self.pool.samples), self.slices, batch_size=self.batch_size)
        if self.slices.count > 1 and self.trainer.max_epochs != 1:
            raise InputError("slices are stages of one epoch: set trainer.max_epochs 1, or data.slices.passes")
        sizes = ", ".join(f"slice {stage.slice}: {len(stage.steps)}" for stage in self.stages)
        rank_zero_info("\n".join([*self.describe_counts(), f"steps of {self.batch_size} samples: {sizes}"]))

    def read(self, source: Origin, split: str) -> Any:
        return self.count_read(source, split, read_samples(source, split=split, limit=self.limit, **self.reading))

    def _pool_of(self, samples: Any, name: str) -> TokenPool:
        data = hash_of_rows(samples, "sample_id", "messages")
        identity = {"data": data, **encoding_identity(self.encoder, **self.encoding)}
        pool = TokenPool.of(self.encode(samples, name), identity)
        self.counts[name]["response tokens"] = len(pool)
        return pool

    def summary(self) -> dict[str, Any]:
        """The content of `plan.json`: the stages, how many rows were read, dropped and truncated, and warnings."""
        stages = [{"slice": s.slice, "samples": len(s.samples), "steps": len(s.steps)} for s in self.stages]
        run = {"counts": self.counts, "warnings": self.doubts, "batch_size": self.batch_size, "seed": self.slices.seed}
        return {"stages": stages, "data": self.pool.identity["data"], **run, "micro_batches": self.cut or None}

    def _steps(self, epoch: int = 0) -> list[tuple[int, ...]]:
        return [step for stage in self.stages for step in stage.steps]

    pool_steps = _steps

    def epoch_plan(self, epoch: int = 0) -> StepPlan:
        starts = np.cumsum([0, *(len(stage.steps) for stage in self.stages)])
        return StepPlan(np.zeros(starts[-1]), tuple(int(start) for start in starts[:-1]))

    def sizes(self) -> tuple[list[int], np.ndarray]:
        return [len(ids) for ids in self.pool.samples["input_ids"]], self.pool.totals()

    def plan_identity(self) -> dict[str, str]:
        return {**self.pool.identity, "steps": content_hash(self._steps())}

    def val_dataloader(self) -> ResumableLoader:
        samples = self.validation_pool.samples
        plan = self.validation_batches([len(ids) for ids in samples["input_ids"]], samples["sample_id"][:])
        return self.loader(plan, self.validation_pool)

    def loader(self, plan: list[MicroBatch], pool: TokenPool | None = None) -> ResumableLoader:
        collator = SampleCollator(self.pool if pool is None else pool, self.sources, pack=self.pack)
        return ResumableLoader(plan, collator, workers=self.workers)
