"""Shared by both data modules: rows read, split and encoded; steps planned before training, continued exactly."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder

from mixdpo.batches.loader import ResumableLoader
from mixdpo.batches.steps import MicroBatch, cut_step, plan_steps
from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.encoding import IDS, Overlong, encode_rows
from mixdpo.data.messages import prompt_texts, split_by_prompt
from mixdpo.data.sources import is_one_file
from mixdpo.errors import InputError
from mixdpo.model.loading import load_tokenizer
from mixdpo.routing.schedules import StepPlan
from mixdpo.storage.identity import hash63, refuse_other_run

# callbacks that would change the steps which were planned, and what to do instead
REFUSED: dict[type, str] = {
    GradientAccumulationScheduler: "would shift the steps: set trainer.accumulate_grad_batches",
    LearningRateFinder: "would train steps that are not planned: compare a few --model.optimizer.lr in short runs",
    BatchSizeFinder: "would change the steps: set data.batch_size, and trainer.accumulate_grad_batches to what fits",
}


class PlannedDataModule(L.LightningDataModule, ABC):
    """A data module whose optimizer steps are all known before training."""

    noun: str
    """What a row is, "pair" or "sample"."""
    summary_file: str
    cleans_by_stage: bool
    """Whether the tokens of a stage are scored and ranked when it begins, or those of the whole epoch at once."""

    def __init__(
        self,
        source: str,
        tokenizer: str,
        split: str = "train",
        validation: float | str = 0.1,
        validation_split: str | None = None,
        limit: PositiveInt | None = None,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 8,
        pack: NonNegativeInt = 8192,
        overlong: Overlong = "truncate",
        chat_template: str | None = None,
        special_tokens_in_text: bool = False,
        workers: NonNegativeInt = 0,
        processes: PositiveInt | None = None,
        seed: int = 0,
    ) -> None:
        """Rows of text as planned batches.

        Args:
            tokenizer: Hub id or folder; linked to model.base.
            split: Split of a hub data set or folder to train on.
            validation: Share of the prompts (not rows) held out, or another source; 0 for none.
            validation_split: Split of `validation`, where that is a source with several, as a file is not; `split` if
                not given.
            limit: Stop reading after so many usable rows.
            batch_size: Rows (pairs, samples) per optimizer step, over all devices and accumulated micro-batches. How
                many of them run at once is batch_size / trainer.accumulate_grad_batches / devices.
            eval_batch_size: Rows per validation batch.
            pack: So many tokens of a micro-batch at most stand in one sequence, blind to each other, which leaves
                nothing to pad; 0 gives each row of data its own, padded to the longest.
            overlong: Truncate cuts a row that is too long to max_length; drop leaves it out. Both are counted.
            chat_template: Jinja template, a file with one, or `plain` for none; the tokenizer's own if not given.
            special_tokens_in_text: Let the name of a special token in a text, such as <|im_end|>, become that token; by
                default it is plain text. Such rows are counted either way.
            workers: Processes that prepare batches.
            processes: Processes that tokenise, once; the result is cached.
            seed: For the validation split; of pairs also for ties at the cut, shuffled orders and random assignment.
        """
        super().__init__()
        if isinstance(validation, float) and not 0 <= validation < 1:
            raise InputError(f"validation must be a share in [0, 1) or another source, not {validation}")
        self.source, self.tokenizer, self.split, self.limit = source, tokenizer, split, limit
        whole = isinstance(validation, str) and is_one_file(validation)
        self.validation, self.validation_split = validation, validation_split or ("train" if whole else split)
        # plain numbers: a checkpoint that holds jsonargparse's own kind of number could not be read again
        self.batch_size, self.eval_batch_size, self.pack = int(batch_size), int(eval_batch_size), int(pack)
        self.chat_template = chat_template
        self.encoding: dict[str, Any] = {"overlong": overlong, "special_tokens_in_text": special_tokens_in_text}
        self.workers, self.processes, self.seed = workers, processes, seed
        self.counts: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}  # "train" and "validation" -> token ids, after setup
        self._loader: ResumableLoader | None = None
        self._consumed = 0

    @property
    def documents(self) -> bool:
        """Whether sequences are computed beside others that they must not see."""
        return self.pack > 0

    @property
    def encoded(self) -> list[Any]:
        """The tables of token ids after setup."""
        return list(self.tables.values())

    @abstractmethod
    def read(self, source: str, split: str) -> Any:
        """The rows of a source as a data set; counts what is dropped."""

    @abstractmethod
    def prompts(self, rows: Any) -> Iterable[Any]:
        """What stands before the first response of each row: rows that share it land on one side of the split."""

    def read_and_split(self, stage: str) -> tuple[Any, Any]:
        """Rows to train on, and those held out or None."""
        for kind in [kind for kind in REFUSED if any(isinstance(each, kind) for each in self.trainer.callbacks)]:
            raise InputError(f"remove the callback {kind.__name__}: it {REFUSED[kind]}")
        if not self.validation and stage == "validate":
            raise InputError("there is nothing to validate on: data.validation is 0")
        train = self.read(self.source, self.split)
        if isinstance(self.validation, str):
            held_out = self.read(self.validation, self.validation_split)
            _check_apart(self.prompts(train), self.prompts(held_out), held_out["row"], self.validation)
            return train, held_out
        if self.validation:
            kept, out = split_by_prompt(self.prompts(train), self.validation, self.seed)
            return train.select(kept), train.select(out)
        self.trainer.limit_val_batches = 0
        return train, None

    @cached_property
    def encoder(self) -> Any:
        return load_tokenizer(self.tokenizer)

    def encode(self, rows: Any, name: str) -> Any:
        """The rows as token ids, kept as the table of this name; counts what is cut or dropped."""
        encoded, counts = encode_rows(
            rows, self.encoder, **self.encoding, chat_template=self.chat_template, num_proc=self.processes
        )
        self.counts[name] = {f"{self.noun}s": len(encoded), **counts}
        self.tables[name] = encoded
        return encoded

    def count_read(self, source: str, split: str, table: Any) -> Any:
        """The data set of a table that was read; counts its rows and what it dropped."""
        name = f"read/{source}" if split == "train" else f"read/{source}, split {split}"
        self.counts[name] = {f"{self.noun}s": len(table.dataset), **table.dropped}
        return table.dataset

    def describe_counts(self) -> list[str]:
        """Every row left out or cut, in a few lines: nothing is dropped silently."""
        return [f"{name}: " + ", ".join(f"{k} {v}" for k, v in counts.items()) for name, counts in self.counts.items()]

    def rows_of(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Row in the source, id and texts of the rows of training that a batch calls by these `ids`."""
        table, key = self.tables["train"], f"{self.noun}_id"
        place = {row_id: index for index, row_id in enumerate(table[key])}
        rows = [table[place[row_id]] for row_id in ids]
        names = [name for name in IDS if name in table.column_names]
        texts = [{name.removesuffix("_ids"): self.encoder.decode(row[name]) for name in names} for row in rows]
        return [{"row": row["row"], key: row[key], **text} for row, text in zip(rows, texts, strict=True)]

    def validation_batches(self, lengths: Sequence[int], ids: Sequence[int]) -> list[MicroBatch]:
        """This rank's batches of held-out rows, by length, then by id; filler of weight 0 gives all ranks as many."""
        by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], ids[i]))
        batches: list[MicroBatch] = [(b, 1.0, len(b)) for b in plan_steps(by_length, self.eval_batch_size)]
        batches += [((by_length[-1],), 0.0, 1)] * (-len(batches) % self.trainer.world_size)
        return batches[self.trainer.global_rank :: self.trainer.world_size]

    @abstractmethod
    def epoch_plan(self, epoch: int = 0) -> StepPlan:
        """The steps and stages of one epoch. As many, and starting at the same steps, in all epochs."""

    @abstractmethod
    def _steps(self, epoch: int = 0) -> list[tuple[int, ...]]:
        """The rows of each optimizer step of one epoch."""

    @abstractmethod
    def sizes(self) -> tuple[list[int], Sequence[int]]:
        """Of each row: the tokens that training it computes, and what it adds to `Batch.step_total`."""

    def micro_batches(self, epoch: int = 0) -> list[MicroBatch]:
        """One epoch as this rank computes it: every step in exactly accumulate × world pieces."""
        trainer, (tokens, counted) = self.trainer, self.sizes()
        parts = {
            "accumulate": trainer.accumulate_grad_batches,
            "world": trainer.world_size,
            "rank": trainer.global_rank,
        }
        plan: list[MicroBatch] = []
        for step in self._steps(epoch):
            total = int(sum(counted[row] for row in step))
            plan += [(rows, weight, total) for rows, weight, _ in cut_step(step, tokens, **parts)]
        return plan

    @abstractmethod
    def loader(self, plan: list[MicroBatch]) -> ResumableLoader:
        """The micro-batches of the plan as tensors."""

    @abstractmethod
    def plan_identity(self) -> dict[str, str]:
        """Part by part, all that must stay for a position in the epoch to mean the same rows and tokens."""

    @abstractmethod
    def cleaning_pool(self) -> TokenPool:
        """The response tokens that token cleaning may cut."""

    def pool_steps(self, epoch: int = 0) -> list[tuple[int, ...]]:
        """The samples of the cleaning pool in each step of one epoch."""
        return self._steps(epoch)

    def upcoming_samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What the stage (or the epoch) of optimizer step `step` trains from this step on, and the run's next epoch if
        there is one: samples of the cleaning pool, in rising order, and the step of its epoch in which each comes next.
        """
        length, ends = len(self.epoch), [*self.epoch.stage_starts[1:], len(self.epoch)]
        epoch, step = divmod(step, length)
        end = ends[bisect_right(ends, step)] if self.cleans_by_stage else length
        coming = list(enumerate(self.pool_steps(epoch)))[step:end]
        # with schedule_steps, max_steps only pauses the run
        total = self._steps_of_run(self.trainer.lightning_module.schedule_steps or self.trainer.max_steps)
        if (left := total - (epoch + 1) * length) > 0:  # a third epoch comes after all of the second
            coming += list(enumerate(self.pool_steps(epoch + 1)))[:left]
        comes: dict[int, int] = {}
        for number, samples in coming:
            for sample in samples:
                comes.setdefault(sample, number)
        in_order = sorted(comes)
        return np.array(in_order, dtype=np.int64), np.array([comes[sample] for sample in in_order], dtype=np.int64)

    @cached_property
    def epoch(self) -> StepPlan:
        return self.epoch_plan()

    def step_plan(self, total: int | None = None) -> StepPlan:
        """The optimizer steps of the whole run, over all epochs and up to max_steps, for the schedule; or `total`."""
        total = self._steps_of_run(self.trainer.max_steps) if total is None else total
        return StepPlan.of_epochs([self.epoch_plan(epoch) for epoch in range(-(-total // len(self.epoch)))], total)

    def _steps_of_run(self, max_steps: int) -> int:
        max_epochs = -1 if self.trainer.max_epochs is None else self.trainer.max_epochs
        if max_steps < 0 and max_epochs < 0:
            raise InputError("give trainer.max_epochs or trainer.max_steps: a schedule needs an end")
        if max_steps == 0 or max_epochs == 0:
            raise InputError("trainer.max_steps or trainer.max_epochs is 0: there is nothing to train")
        return min(steps for steps in (max_steps, len(self.epoch) * max_epochs) if steps >= 0)

    def stage_of(self, step: int) -> int:
        """Number, from 0, of the stage that optimizer step `step` of the run belongs to."""
        starts = self.epoch.stage_starts
        if len(starts) == 1:
            return 0
        number, step = divmod(step, len(self.epoch))
        return number * len(starts) + bisect_right(starts, step) - 1

    def train_dataloader(self) -> ResumableLoader:
        if self.trainer.limit_train_batches != 1.0 and not self.trainer.fast_dev_run:
            raise InputError("trainer.limit_train_batches cuts the curriculum: use data.limit or trainer.max_steps")
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if self.batch_size < micro_batches:
            raise InputError(
                f"data.batch_size {self.batch_size} is less than trainer.accumulate_grad_batches × devices "
                f"{micro_batches}: there would be micro-batches without a row"
            )
        self._loader = self.loader(self.micro_batches())
        self._loader.load_state_dict({"consumed": self._consumed})
        self._consumed = 0
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self._loader.consumed if self._loader else 0, "run": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the middle of the epoch. Held here as well as in the loader because Lightning may build the
        loader before it restores its state."""
        if self.trainer.state.fn != "fit":
            return  # validation of a checkpoint may use any rows
        refuse_other_run(state["run"], self._identity())
        self._consumed = state["consumed"]
        if self._loader is not None:
            self._loader.load_state_dict({"consumed": self._consumed})

    def _identity(self) -> dict[str, Any]:
        """What must stay for a position to mean the same rows."""
        cut = {"accumulate_grad_batches": self.trainer.accumulate_grad_batches, "devices": self.trainer.world_size}
        return {**self.plan_identity(), "batch_size": self.batch_size, **cut}


def _check_apart(train: Iterable[Any], held_out: Iterable[Any], rows: Sequence[int], source: str) -> None:
    """No held-out prompt may be trained on: a number measured on it would mean nothing."""
    known = {hash63(str(prompt_texts(prompt))) for prompt in train}
    shared = [row for row, prompt in zip(rows, held_out, strict=True) if hash63(str(prompt_texts(prompt))) in known]
    if shared:
        raise InputError(
            f"{len(shared)} of {len(rows)} held-out rows of {source} have a prompt that is trained on (first: row "
            f"{shared[0]}): give another data.validation or data.validation_split"
        )
