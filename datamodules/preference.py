"""The LightningDataModule of preference pairs: read, split, encode, route, and hand over micro-batches."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from mixdpo.batching import MicroBatch, PairCollator, ResumableLoader, cut_step, plan_steps
from mixdpo.errors import InputError
from mixdpo.models import load_tokenizer
from mixdpo.records import read_pairs, split_by_prompt
from mixdpo.routing import Route, Routing
from mixdpo.schedules import StepPlan
from mixdpo.tokenization import Overlong, encode_pairs


class PreferenceDataModule(L.LightningDataModule):
    def __init__(
        self,
        source: str,
        tokenizer: str,
        routing: Routing = Routing(),  # noqa: B008
        split: str = "train",
        validation: float | str = 0.1,
        validation_split: str | None = None,
        validation_threshold: float | None = None,
        margin: str | list[str] | None = None,
        limit: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 8,
        max_length: int = 1024,
        max_prompt_length: int = 512,
        overlong: Overlong = "truncate",
        chat_template: str | None = None,
        share_prompt: bool = True,
        workers: int = 0,
        processes: int | None = None,
        seed: int = 0,
    ) -> None:
        """Preference pairs with margins, in the order and on the routes that the margins say.

        Args:
            source: Hub id, local folder, .parquet, .json, .jsonl, .jsonl.gz or .csv file, or `constraints` (built in).
            tokenizer: Hub id or folder; linked to model.base.
            routing: Which pairs are hard, and the order of training.
            split: Split of a hub data set or folder to train on.
            validation: Share of the prompts (not pairs) held out, or another source of pairs; 0 for none.
            validation_split: Split of `validation`, where that is a source with several; `split` if not given.
            validation_threshold: Margin below which validation reports a pair as hard; the route's τ if not given. Give
                it to baselines that route no pair or all pairs, to compare them with a run that routes some.
            margin: Column with the margin, or two columns [chosen, rejected] whose difference it is; found by the usual
                names if not given.
            limit: Read the first so many pairs only.
            batch_size: Pairs per optimizer step, over all devices and accumulated micro-batches. How many of them run
                at once is batch_size / trainer.accumulate_grad_batches / devices.
            eval_batch_size: Pairs per validation batch.
            max_length: Longest prompt + completion, in tokens.
            max_prompt_length: Longest prompt of a pair that exceeds max_length, in tokens.
            overlong: Truncate keeps a prompt's end and a completion's start; drop leaves such pairs out. Both counted.
            chat_template: Jinja template, a file with one, or `plain` for none; the tokenizer's own if not given.
            share_prompt: Compute the prompt once for both responses; false gives each its own copy, same numbers.
            workers: Processes that prepare batches.
            processes: Processes that tokenise, once; the result is cached.
            seed: For the validation split and the order of ties.
        """
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(f"batch_size ({batch_size}) and eval_batch_size ({eval_batch_size}) must be at least 1")
        if isinstance(validation, float) and not 0 <= validation < 1:
            raise InputError(f"validation must be a share in [0, 1) or a source of pairs, not {validation}")
        self.source, self.tokenizer, self.routing, self.split = source, tokenizer, routing, split
        self.validation, self.margin, self.limit = validation, margin, limit
        self.validation_split, self.validation_threshold = validation_split or split, validation_threshold
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": overlong}
        self.chat_template, self.share_prompt = chat_template, share_prompt
        self.workers, self.processes, self.seed = workers, processes, seed
        self.route: Route | None = None
        self.counts: dict[str, Any] = {}
        self.train_pairs: Any = None
        self.validation_pairs: Any = None
        self._loader: ResumableLoader | None = None
        self._consumed = 0

    def setup(self, stage: str) -> None:
        if self.route is not None:
            return
        self._encoder = load_tokenizer(self.tokenizer)
        if not self.validation and stage == "validate":
            raise InputError("there is nothing to validate on: data.validation is 0")
        read = self._read(self.source, self.split)
        if isinstance(self.validation, str):
            train, held_out = read, self._read(self.validation, self.validation_split)
            _check_apart(train, held_out, self.validation)
        elif self.validation:
            kept, out = split_by_prompt(read, self.validation, self.seed)
            train, held_out = read.select(kept), read.select(out)
        else:
            train, held_out = read, None
            self.trainer.limit_val_batches = 0
        self.train_pairs = self._encode(train, "train")
        self.validation_pairs = self._encode(held_out, "validation") if held_out is not None else None
        margins, ids = np.asarray(self.train_pairs["margin"]), np.asarray(self.train_pairs["pair_id"])
        self.route = self.routing.plan(margins, ids, seed=self.seed)
        rank_zero_info(self._describe())

    def _read(self, source: str, split: str) -> Any:
        pairs = read_pairs(source, split=split, margin=self.margin, limit=self.limit)
        self.counts[f"read/{source}"] = {"pairs": len(pairs.dataset), **pairs.dropped}
        return pairs.dataset

    def _encode(self, pairs: Any, name: str) -> Any:
        encoded, counts = encode_pairs(
            pairs, self._encoder, **self.lengths, chat_template=self.chat_template, num_proc=self.processes
        )
        self.counts[name] = {"pairs": len(encoded), **counts}
        return encoded

    def _describe(self) -> str:
        """The route and every pair left out, in a few lines: nothing is dropped or rerouted silently."""
        assert self.route is not None
        facts = self.route.summary()
        lines = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in counts.items()) for name, counts in self.counts.items()]
        lines.append(
            f"route: {facts['hard']} of {facts['pairs']} pairs are hard (margin < {facts['threshold']:.4g}; "
            f"{facts['ties_at_threshold']} pairs tie at it, {facts['hard_at_threshold']} of them hard), "
            f"order {facts['order']}, {len(self._steps())} steps of {self.batch_size} pairs"
        )
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """What `route.json` holds: the route's facts and the counts of what was read, dropped and truncated."""
        assert self.route is not None
        return {**self.route.summary(), "counts": self.counts, "batch_size": self.batch_size, "seed": self.seed}

    def _steps(self) -> list[tuple[int, ...]]:
        assert self.route is not None
        return plan_steps(self.route.order.tolist(), self.batch_size)

    def step_plan(self) -> StepPlan:
        """The optimizer steps of the whole run, over all epochs and up to max_steps, for the schedule."""
        assert self.route is not None and self.trainer is not None
        one = np.array([self.route.is_hard[list(step)].mean() for step in self._steps()])
        starts = [0]
        if self.route.ordering == "easy_to_hard" and (first_hard := int(np.argmax(one >= 0.5))) > 0:
            starts.append(first_hard)
        max_steps, max_epochs = self.trainer.max_steps, self.trainer.max_epochs
        if max_steps < 0 and (max_epochs is None or max_epochs < 0):
            raise InputError("give trainer.max_epochs or trainer.max_steps: a schedule needs an end")
        if max_steps == 0 or max_epochs == 0:
            raise InputError("trainer.max_steps or trainer.max_epochs is 0: there is nothing to train")
        epochs = max_epochs if max_epochs and max_epochs > 0 else -(-max_steps // len(one))
        total = len(one) * epochs if max_steps < 0 else min(max_steps, len(one) * epochs)
        if starts == [0]:  # one stage: a baseline's schedule does not restart with each epoch
            return StepPlan(np.tile(one, epochs)[:total])
        all_starts = [start + epoch * len(one) for epoch in range(epochs) for start in starts]
        return StepPlan(np.tile(one, epochs)[:total], tuple(start for start in all_starts if start < total))

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):
            raise InputError("GradientAccumulationScheduler would shift the steps: set trainer.accumulate_grad_batches")
        if self.trainer.limit_train_batches != 1.0 and not self.trainer.fast_dev_run:
            raise InputError("trainer.limit_train_batches cuts the curriculum: use data.limit or trainer.max_steps")
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if self.batch_size < micro_batches:
            raise InputError(
                f"data.batch_size {self.batch_size} is less than trainer.accumulate_grad_batches × devices "
                f"{micro_batches}: there would be micro-batches without a pair"
            )
        plan: list[MicroBatch] = []
        tokens = self._tokens(self.train_pairs, self.route.is_hard)
        for step in self._steps():
            plan += cut_step(
                step,
                tokens,
                accumulate=self.trainer.accumulate_grad_batches,
                world=self.trainer.world_size,
                rank=self.trainer.global_rank,
            )
        self._loader = self._make_loader(plan, self.train_pairs, self.route.is_hard.tolist(), evaluation=False)
        self._loader.load_state_dict({"consumed": self._consumed})
        self._consumed = 0
        return self._loader

    def validation_is_hard(self) -> np.ndarray:
        """(N,) bool, which held-out pairs are reported as hard."""
        threshold = self.route.threshold if self.validation_threshold is None else self.validation_threshold
        return np.asarray(self.validation_pairs["margin"]) < threshold

    def val_dataloader(self) -> ResumableLoader:
        is_hard = self.validation_is_hard().tolist()
        tokens = self._tokens(self.validation_pairs, [False] * len(is_hard))
        by_length = sorted(range(len(tokens)), key=lambda i: -tokens[i])
        world, rank = self.trainer.world_size, self.trainer.global_rank
        batches = [(batch, 1.0, len(batch)) for batch in plan_steps(by_length, self.eval_batch_size)]
        batches += [((by_length[-1],), 0.0, 1)] * (-len(batches) % world)
        return self._make_loader(batches[rank::world], self.validation_pairs, is_hard, evaluation=True)

    def _make_loader(
        self, plan: list[MicroBatch], pairs: Any, is_hard: list[bool], *, evaluation: bool
    ) -> ResumableLoader:
        collator = PairCollator(pairs, is_hard, evaluation=evaluation, share_prompt=self.share_prompt)
        return ResumableLoader(plan, collator, workers=self.workers)

    @staticmethod
    def _tokens(pairs: Any, is_hard: Any) -> list[int]:
        """Tokens that training a pair computes: a hard pair's rejected response is not among them."""
        columns = zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], is_hard, strict=True)
        return [len(p) + len(c) + (0 if hard else len(r)) for p, c, r, hard in columns]

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self._loader.consumed if self._loader else 0, "run": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the middle of the epoch. Held here as well as in the loader because Lightning may build the
        loader before it restores its state."""
        if self.trainer.state.fn != "fit":
            return  # validation of a checkpoint may use any pairs
        now = self._identity()
        changed = {key: (old, now[key]) for key, old in state["run"].items() if old != now[key]}
        if changed:
            raise InputError(
                f"the checkpoint belongs to another run: (then, now) is {changed}. Continue with the config.yaml "
                "beside it, or start anew from its adapter/ folder (model.adapter)."
            )
        self._consumed = state["consumed"]
        if self._loader is not None:
            self._loader.load_state_dict({"consumed": self._consumed})

    def _identity(self) -> dict[str, Any]:
        """What must stay for a position to mean the same pairs."""
        assert self.route is not None and self.trainer is not None
        return {
            "route": self.route.fingerprint(),
            "batch_size": self.batch_size,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "devices": self.trainer.world_size,
        }


def _check_apart(train: Any, held_out: Any, source: str) -> None:
    """No held-out prompt may be trained on: accuracy on it would mean nothing."""
    known = {str(prompt) for prompt in train["prompt"]}
    shared = [row for row, prompt in zip(held_out["row"], held_out["prompt"], strict=True) if str(prompt) in known]
    if shared:
        raise InputError(
            f"{len(shared)} of {len(held_out)} held-out pairs of {source} have a prompt that is trained on (first: row "
            f"{shared[0]}): give another data.validation or data.validation_split"
        )
