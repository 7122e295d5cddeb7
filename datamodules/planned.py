"""Shared by both data modules: read, split and encode rows; plan the steps before training; resume exactly."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder

from datamodules.cutting import cut_by_tokens, cut_into
from mixdpo.batches.loader import ResumableLoader
from mixdpo.batches.steps import MicroBatch, cut_step, plan_steps
from mixdpo.data.chat_template import GenerationPrompt
from mixdpo.data.columns import our_columns
from mixdpo.data.encoding import IDS, Overlong, encode_rows
from mixdpo.data.messages import prompts_of, refuse_shared_prompts, split_by_prompt
from mixdpo.data.sources import Origin, is_one_file
from mixdpo.errors import InputError
from mixdpo.model.loading import load_tokenizer
from mixdpo.routing.schedules import StepPlan
from mixdpo.storage.identity import content_hash, refuse_other_run

REFUSED = (GradientAccumulationScheduler, LearningRateFinder, BatchSizeFinder)
"""Callbacks that would change the planned steps."""


class PlannedDataModule(L.LightningDataModule):
    """A data module whose optimizer steps are all known before training. `doubts` are warnings about data that is
    trained on, but probably means something else. `tables` are "train" and "validation" -> token ids, after setup.

    A subclass has these attributes:
        noun: the word for a row, "pair" or "sample".
        cleans_by_stage: whether tokens are scored and ranked at the start of each stage, or those of the whole epoch
            at once.
        plan_rows: a stage of Lightning -> reads, encodes and plans the rows, once.
        read: a source and its split -> the rows as a data set; counts the dropped rows.
        epoch_plan: an epoch -> its steps and stages. All epochs have as many, starting at the same steps.
        _steps: an epoch -> the rows of each optimizer step.
        sizes: () -> for each row, the tokens that training computes, and what the row adds to `Batch.step_total`.
        loader: a plan -> its micro-batches as tensors.
        plan_identity: () -> in parts, all that decides which rows a position in the epoch means.
        pool_steps: an epoch -> the samples of the cleaning pool in each step.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # what a subclass has

    _loader: ResumableLoader | None = None
    _consumed = 0
    cut: Mapping[str, Any] = {}
    """How the steps are cut, for route.json or plan.json, if by tokens: `cut_into`."""

    def __init__(
        self,
        source: str | list[str],
        tokenizer: str,
        split: str = "train",
        columns: dict[str, str] | None = None,
        validation: float | str | list[str] = 0.1,
        validation_split: str | None = None,
        limit: PositiveInt | None = None,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 8,
        micro_batch_tokens: PositiveInt | Literal["auto"] | None = None,
        pack: NonNegativeInt = 2**20,
        overlong: Overlong = "truncate",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        generation_prompt: GenerationPrompt | None = None,
        special_tokens_in_text: bool = False,
        workers: NonNegativeInt = 0,
        processes: PositiveInt | None = None,
        seed: int = 0,
    ) -> None:
        """Rows of text as planned batches.

        Args:
            tokenizer: Hub id or folder; linked to model.base.
            split: Split of a hub data set or folder to train on, or a slice such as train[:1000]. A word such as test
                in the name of a file, or of its folder, is the file's split. Without any such word all are `train`.
            columns: Columns with other names in the data: {chosen: better}, our name and the file's. Of all sources.
            validation: Share of the prompts (not rows) held out, the same for every seed, or another source; 0: none.
            validation_split: Split of the source that `validation` names; `split` if null.
            limit: Number of usable rows to read; all if null.
            batch_size: Rows (pairs, samples) per optimizer step, over all devices and accumulated micro-batches.
            eval_batch_size: Rows per validation batch.
            micro_batch_tokens: Cut steps into the fewest micro-batches of at most so many tokens, not into
                trainer.accumulate_grad_batches. auto: what the whole card holds, by estimate; the trainer's on a CPU.
            pack: Most tokens of a packed sequence, whose rows are blind to each other; 0 pads each row to the longest.
            overlong: Truncate cuts a longer row to max_length; drop leaves the row out. Both are counted.
            chat_template: Jinja template, a file with one, or `plain` for none; the tokenizer's own if not given.
            chat_template_kwargs: Variables of the template, such as {enable_thinking: false}. A row's own win.
            generation_prompt: For a template that opens a response (with <think>) only to ask for one. `asked` trains
                responses behind this opening, `trained` without it. Null refuses such a template.
            special_tokens_in_text: Read a special token's name in a text (<|im_end|>) as the token, not as characters.
            workers: Processes that prepare batches.
            processes: Processes that tokenise. The token ids are cached, so later runs tokenise nothing.
            seed: For pairs: seed of ties at the cut, shuffled orders, random assignment and halves.
        """
        super().__init__()
        self.source = Origin(source, our_columns(columns, self.noun))
        self.validation = self.source._replace(given=validation or 0)
        self.validation_split = validation_split or ("train" if is_one_file(validation) else split)
        # plain numbers: a checkpoint that holds jsonargparse's own kind of number could not be read again
        self.batch_size, self.eval_batch_size, self.pack = int(batch_size), int(eval_batch_size), int(pack)
        self.encoding: dict[str, Any] = {"overlong": overlong, "chat_template": chat_template}
        self.encoding["special_tokens_in_text"] = special_tokens_in_text
        self.encoding |= {"chat_template_kwargs": chat_template_kwargs, "generation_prompt": generation_prompt}
        self.tokenizer, self.split, self.limit, self.workers = tokenizer, split, limit, workers
        self.processes, self.seed, self.micro_batch_tokens = processes, seed, micro_batch_tokens
        self.documents = pack > 0  # whether sequences are computed beside others that they must not see
        self.counts, self.doubts, self.tables = dict[str, Any](), list[str](), dict[str, Any]()

    def setup(self, stage: str) -> None:
        """Read, encode and plan the rows. For training, cut the steps, before anything counts the micro-batches."""
        self.plan_rows(stage)
        if stage == "fit":
            self.row_sizes = self.sizes()  # reads all token ids
            cut_by_tokens(self)

    def read_and_split(self, stage: str) -> tuple[Any, Any]:
        """Rows to train on, and held-out rows or None.

        Raises:
            InputError: a callback would change the steps, or validation is asked for without held-out rows.
        """
        if refused := [type(each).__name__ for each in self.trainer.callbacks if isinstance(each, REFUSED)]:
            raise InputError(f"the callback {refused[0]} changes the planned steps: remove it and set data.batch_size")
        if not (share := self.validation.given) and stage == "validate":
            raise InputError("there is nothing to validate on, as data.validation is 0: give a share such as 0.1")
        train = self.read(self.source, self.split)
        if not isinstance(share, int | float):
            held_out = self.read(self.validation, self.validation_split)
            refuse_shared_prompts(train, held_out, str(self.validation))
            return train, held_out
        if share:
            kept, out = split_by_prompt(prompts_of(train), share, seed=0)
            return train.select(kept), train.select(out)
        self.trainer.limit_val_batches = 0
        return train, None

    @cached_property
    def encoder(self) -> Any:
        return load_tokenizer(self.tokenizer)

    def encode(self, rows: Any, name: str) -> Any:
        """The rows as token ids, kept in `tables[name]`. Truncated and dropped rows are counted in `counts[name]`."""
        encoded, counts = encode_rows(rows, self.encoder, num_proc=self.processes, **self.encoding)
        self.counts[name] = {f"{self.noun}s": len(encoded), **counts}
        self.tables[name] = encoded
        if (cut := counts["truncated"]) > 0.2 * len(rows):
            said = f"{name}: {cut:,} of {len(rows):,} {self.noun}s ({cut / len(rows):.0%}) are cut to data.max_length"
            self.doubts.append(f"{said} {self.encoding['max_length']}: raise it, or set data.overlong drop")
        return encoded

    def count_read(self, source: Origin, split: str, table: Any) -> Any:
        """The data set of a table. Its rows, dropped and noted rows are counted in `counts`."""
        name = f"read/{source}" if split == "train" else f"read/{source}, split {split}"
        name += " for validation" * (name in self.counts and source is self.validation)
        self.counts[name] = {f"{self.noun}s": len(table.dataset), **table.dropped, **table.noted}
        return table.dataset

    def describe_counts(self) -> list[str]:
        """A line of counts for each table, such as "train: 2,900 pairs, 31 truncated", and the warnings: no row is left
        out silently."""
        lines = []
        for name, counts in self.counts.items():
            # words with spaces hold the name of a file
            parts = ((n, what if " " in what else what.replace("_", " ")) for what, n in counts.items() if n)
            lines.append(
                f"{name.replace('read/', 'read ', 1)}: {', '.join(f'{count:,} {what}' for count, what in parts)}"
            )
        return lines + [f"warning: {doubt}" for doubt in self.doubts]

    def rows_of(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Row in the source, id and texts of the training rows with these `ids`."""
        table, key = self.tables["train"], f"{self.noun}_id"
        place = {row_id: index for index, row_id in enumerate(table[key])}
        rows = [table[place[row_id]] for row_id in ids]
        texts = [{n.removesuffix("_ids"): self.encoder.decode(row[n]) for n in IDS if n in row} for row in rows]
        where = [{name: row[name] for name in ("row", "place", key) if name in row} for row in rows]
        return [place | text for place, text in zip(where, texts, strict=True)]

    def validation_batches(self, lengths: Sequence[int], ids: Sequence[int]) -> list[MicroBatch]:
        """This rank's batches of held-out rows, longest first. Filler of weight 0 gives all ranks as many batches."""
        by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], ids[i]))
        batches: list[MicroBatch] = [(b, 1.0, len(b)) for b in plan_steps(by_length, self.eval_batch_size)]
        batches += [((by_length[-1],), 0.0, 1)] * (-len(batches) % self.trainer.world_size)
        return batches[self.trainer.global_rank :: self.trainer.world_size]

    def micro_batches(self, epoch: int = 0) -> list[MicroBatch]:
        """This rank's micro-batches of one epoch. Every step is cut into exactly accumulate × world micro-batches."""
        trainer, (tokens, counted) = self.trainer, self.row_sizes
        cut = {"accumulate": trainer.accumulate_grad_batches, "world": trainer.world_size, "rank": trainer.global_rank}
        plan: list[MicroBatch] = []
        for step in self._steps(epoch):
            total = float(sum(counted[row] for row in step))
            plan += [(rows, weight, total) for rows, weight, _ in cut_step(step, tokens, **cut)]
        return plan

    def upcoming_samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples (n,) of the cleaning pool that come next, in rising order, and for each sample the step (n,) of its
        epoch in which it comes next.

        They are all samples from optimizer step `step` to the end of its stage (or epoch), and those of the run's next
        epoch.
        """
        length, ends = len(self.epoch), [*self.epoch.stage_starts[1:], len(self.epoch)]
        epoch, step = divmod(step, length)
        end = ends[bisect_right(ends, step)] if self.cleans_by_stage else length
        coming = list(enumerate(self.pool_steps(epoch)))[step:end]
        # as many of the next one as the run has left: a third epoch comes after all of the second
        coming += zip(range(self._run_length() - (epoch + 1) * length), self.pool_steps(epoch + 1), strict=False)
        # of a sample that comes twice, the first time counts
        comes = {sample: number for number, samples in reversed(coming) for sample in samples}
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
        of_epochs = len(self.epoch) * self.trainer.max_epochs  # negative without a limit, as max_steps
        if not (total := min((steps for steps in (max_steps, of_epochs) if steps >= 0), default=0)):
            raise InputError("a schedule needs a last step: give trainer.max_epochs or trainer.max_steps, above 0")
        return total

    def _run_length(self) -> int:
        # schedule_steps is the whole run, and max_steps then only pauses it
        return self._steps_of_run(self.trainer.lightning_module.schedule_steps or self.trainer.max_steps)

    def all_steps(self) -> list[tuple[int, ...]]:
        """The steps of the run's epochs; those that are the same in several epochs once."""
        epochs = -(-self._run_length() // len(self.epoch))
        return list(dict.fromkeys(step for epoch in range(epochs) for step in self._steps(epoch)))

    def stage_of(self, step: int) -> int:
        """Number, from 0, of the stage that optimizer step `step` of the run belongs to."""
        starts = self.epoch.stage_starts
        number, step = divmod(step, len(self.epoch))
        return number * len(starts) + bisect_right(starts, step) - 1 if len(starts) > 1 else 0

    def train_dataloader(self) -> ResumableLoader:
        if self.trainer.limit_train_batches != 1.0 and not self.trainer.fast_dev_run:
            raise InputError("trainer.limit_train_batches cuts the curriculum: use data.limit or trainer.max_steps")
        self._loader = self.loader(self.micro_batches())
        self._loader.load_state_dict({"consumed": self._consumed})
        self._consumed = 0
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self._loader.consumed if self._loader else 0, "run": self._identity(), "cut": self.cut}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the middle of the epoch. Lightning may build the loader before or after this call, so module and
        loader both keep the position. `micro_batch_tokens: auto` cuts as the checkpoint's run did, on any card.

        Raises:
            InputError: the checkpoint's run had other data, routes or batches.
        """
        if self.trainer.state.fn != "fit":
            return  # validation of a checkpoint may use any rows
        if self.micro_batch_tokens == "auto":
            cut_into(self, state["run"]["accumulate_grad_batches"], state.get("cut", {}).get("limit"))
        refuse_other_run(state["run"], self._identity())
        self._consumed = state["consumed"]
        if self._loader is not None:
            self._loader.load_state_dict({"consumed": self._consumed})

    def _identity(self) -> dict[str, Any]:
        """Everything that decides which rows a position in the epoch means."""
        cut = {"accumulate_grad_batches": self.trainer.accumulate_grad_batches, "devices": self.trainer.world_size}
        return {**self.plan_identity(), "batch_size": self.batch_size, **cut}


def hash_of_rows(rows: Any, *columns: str) -> str:
    """Of these columns, and of what the chat template gets beside them."""
    return content_hash(zip(*(rows[name] for name in (*columns, "context") if name in rows.column_names), strict=True))
