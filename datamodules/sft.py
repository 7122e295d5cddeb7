"""The LightningDataModule of SFT data: read, split, encode, plant noise, slice into stages, hand over micro-batches."""

from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.planned import PlannedDataModule, check_apart
from mixdpo.batching import MicroBatch, ResumableLoader, cut_step, plan_steps
from mixdpo.errors import InputError
from mixdpo.models import load_tokenizer
from mixdpo.records import split_by_prompt
from mixdpo.samples import Slices, Stage, TokenPool, content_hash, plan_stages
from mixdpo.schedules import StepPlan
from mixdpo.sft_batching import SFTCollator
from mixdpo.sft_records import read_samples
from mixdpo.sft_tokenization import encode_samples, encoding_identity
from mixdpo.token_cleaning.planted_noise import PlantedNoise, plant
from mixdpo.tokenization import Overlong


class SFTDataModule(PlannedDataModule):
    summary_file = "stages.json"
    cleans_by_stage = True

    def __init__(
        self,
        source: str,
        tokenizer: str,
        slices: Slices = Slices(),  # noqa: B008
        split: str = "train",
        validation: float | str = 0.1,
        validation_split: str | None = None,
        limit: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 8,
        max_length: int = 2048,
        overlong: Overlong = "truncate",
        chat_template: str | None = None,
        pack: int = 0,
        noise: PlantedNoise | None = None,
        workers: int = 0,
        processes: int | None = None,
        seed: int = 0,
    ) -> None:
        """Conversations to imitate; every assistant turn, its end token included, can be trained on, the prompt never.

        Args:
            source: Hub id, local folder, .parquet, .json, .jsonl, .jsonl.gz or .csv file. Rows are `messages`; or
                `prompt` and `completion`; or `instruction`, `input` and `output`.
            tokenizer: Hub id or folder; linked to model.base.
            slices: Stages of the training data, for self-evolving token cleaning and its controls.
            split: Split of a hub data set or folder to train on.
            validation: Share of the prompts held out, or another source; 0 for none.
            validation_split: Split of `validation`, where that is a source with several; `split` if not given.
            limit: Read the first so many rows only.
            batch_size: Samples per optimizer step, over all devices and accumulated micro-batches.
            eval_batch_size: Samples per validation batch.
            max_length: Longest conversation, in tokens.
            overlong: Truncate keeps the first max_length tokens; drop leaves longer conversations out. Both counted.
            chat_template: Jinja template, a file with one, or `plain` for none; the tokenizer's own if not given.
            pack: Put samples of up to so many tokens together into one row, blind to each other; 0 gives each its own.
            noise: Known-bad tokens planted into the training responses, to measure whether cleaning finds them.
            workers: Processes that prepare batches.
            processes: Processes that tokenise, once; the result is cached.
            seed: For the validation split.
        """
        super().__init__(batch_size, eval_batch_size)
        if isinstance(validation, float) and not 0 <= validation < 1:
            raise InputError(f"validation must be a share in [0, 1) or a source of rows, not {validation}")
        if pack < 0:
            raise InputError(f"pack must be 0 or a number of tokens, not {pack}")
        self.source, self.tokenizer, self.slices, self.split = source, tokenizer, slices, split
        self.validation, self.validation_split, self.limit = validation, validation_split or split, limit
        self.lengths = {"max_length": max_length, "overlong": overlong}
        self.chat_template, self.pack, self.noise = chat_template, pack, noise
        self.workers, self.processes, self.seed = workers, processes, seed
        self.counts: dict[str, Any] = {}
        self.sources: list[str] = []
        self.stages: list[Stage] = []
        self.pool: TokenPool | None = None
        self.validation_pool: TokenPool | None = None

    def setup(self, stage: str) -> None:
        if self.pool is not None:
            return
        if not self.validation and stage == "validate":
            raise InputError("there is nothing to validate on: data.validation is 0")
        self._encoder = load_tokenizer(self.tokenizer)
        train, held_out = self._read(self.source, self.split), None
        if isinstance(self.validation, str):
            held_out = self._read(self.validation, self.validation_split)
            prompts = [[_prompt(row) for row in rows["messages"]] for rows in (train, held_out)]
            check_apart(*prompts, held_out["row"], self.validation)
        elif self.validation:
            kept, out = split_by_prompt([_prompt(row) for row in train["messages"]], self.validation, self.seed)
            train, held_out = train.select(kept), train.select(out)
        else:
            self.trainer.limit_val_batches = 0
        self.pool = self._encode(train, "train", self.noise)
        self.validation_pool = self._encode(held_out, "validation", None) if held_out is not None else None
        self.sources = sorted({*self.pool.samples["source"], *(self._held_out_sources())})
        self.stages = plan_stages(len(self.pool.samples), self.slices, batch_size=self.batch_size)
        if self.slices.count > 1 and self.trainer.max_epochs != 1:
            raise InputError(
                "slices are stages of one epoch: set trainer.max_epochs 1; data.slices.passes repeats them"
            )
        rank_zero_info(self._describe())

    def _read(self, source: str, split: str) -> Any:
        samples = read_samples(source, split=split, limit=self.limit)
        self.counts[f"read/{source}"] = {"samples": len(samples.dataset), **samples.dropped}
        return samples.dataset

    def _encode(self, samples: Any, name: str, noise: PlantedNoise | None) -> TokenPool:
        encoded, counts = encode_samples(
            samples, self._encoder, **self.lengths, chat_template=self.chat_template, num_proc=self.processes
        )
        if noise is not None:
            encoded = plant(encoded, noise, self._encoder)
        identity = {
            "data": content_hash(zip(samples["sample_id"], samples["messages"], strict=True)),
            **encoding_identity(self._encoder, self.chat_template, **self.lengths),
            "noise": "none" if noise is None else f"rate {noise.rate}, seed {noise.seed}, {content_hash([noise])}",
        }
        pool = TokenPool.of(encoded, identity)
        self.counts[name] = {"samples": len(encoded), "response tokens": len(pool), **counts}
        return pool

    def _held_out_sources(self) -> list[str]:
        return list(self.validation_pool.samples["source"]) if self.validation_pool else []

    def _describe(self) -> str:
        lines = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in counts.items()) for name, counts in self.counts.items()]
        sizes = ", ".join(f"slice {stage.slice}: {len(stage.steps)}" for stage in self.stages)
        return "\n".join([*lines, f"steps of {self.batch_size} samples: {sizes}"])

    def summary(self) -> dict[str, Any]:
        """What `stages.json` holds: the stages, and the counts of what was read, dropped and truncated."""
        stages = [
            {"slice": stage.slice, "samples": len(stage.samples), "steps": len(stage.steps)} for stage in self.stages
        ]
        return {"stages": stages, "counts": self.counts, "batch_size": self.batch_size, "seed": self.slices.seed}

    def _steps(self) -> list[tuple[int, ...]]:
        return [step for stage in self.stages for step in stage.steps]

    def epoch_plan(self) -> StepPlan:
        starts = np.cumsum([0, *(len(stage.steps) for stage in self.stages)])
        return StepPlan(np.zeros(starts[-1]), tuple(int(start) for start in starts[:-1]))

    def micro_batches(self) -> list[MicroBatch]:
        assert self.pool is not None
        tokens = [len(ids) for ids in self.pool.samples["input_ids"]]
        responses = np.diff(self.pool.offsets)
        plan: list[MicroBatch] = []
        for step in self._steps():
            total = int(responses[list(step)].sum())
            plan += [(indices, weight, total) for indices, weight, _ in cut_step(step, tokens, **self.cut())]
        return plan

    def loader(self, plan: list[MicroBatch]) -> ResumableLoader:
        return ResumableLoader(plan, SFTCollator(self.pool, self.sources, pack=self.pack), workers=self.workers)

    def fingerprint(self) -> str:
        assert self.pool is not None
        return content_hash([self._steps(), *sorted(self.pool.identity.items())])

    def cleaning_pool(self) -> TokenPool:
        assert self.pool is not None
        return self.pool

    def pool_steps(self) -> list[tuple[int, ...]]:
        return self._steps()

    def val_dataloader(self) -> ResumableLoader:
        assert self.validation_pool is not None and self.trainer is not None
        lengths = [len(ids) for ids in self.validation_pool.samples["input_ids"]]
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        world, rank = self.trainer.world_size, self.trainer.global_rank
        batches: list[MicroBatch] = [(batch, 1.0, 1) for batch in plan_steps(by_length, self.eval_batch_size)]
        batches += [((by_length[-1],), 0.0, 1)] * (-len(batches) % world)
        collator = SFTCollator(self.validation_pool, self.sources, pack=self.pack)
        return ResumableLoader(batches[rank::world], collator, workers=self.workers)


def _prompt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """What stands before the first answer: samples that share it land on one side of the validation split."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first]
