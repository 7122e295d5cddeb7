"""The LightningDataModule of preference pairs: read, split, encode, route, and hand over micro-batches."""

from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.planned import PlannedDataModule, check_apart
from mixdpo.batching import MicroBatch, PairCollator, ResumableLoader, cut_step, plan_steps
from mixdpo.errors import InputError
from mixdpo.models import load_tokenizer
from mixdpo.records import read_pairs, split_by_prompt
from mixdpo.routing import Route, Routing
from mixdpo.samples import TokenPool, content_hash
from mixdpo.schedules import StepPlan
from mixdpo.sft_tokenization import encoding_identity
from mixdpo.tokenization import Overlong, encode_pairs


class PreferenceDataModule(PlannedDataModule):
    summary_file = "route.json"
    cleans_by_stage = False

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
        super().__init__(batch_size, eval_batch_size)
        if isinstance(validation, float) and not 0 <= validation < 1:
            raise InputError(f"validation must be a share in [0, 1) or a source of pairs, not {validation}")
        self.source, self.tokenizer, self.routing, self.split = source, tokenizer, routing, split
        self.validation, self.margin, self.limit = validation, margin, limit
        self.validation_split, self.validation_threshold = validation_split or split, validation_threshold
        self.lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": overlong}
        self.chat_template, self.share_prompt = chat_template, share_prompt
        self.workers, self.processes, self.seed = workers, processes, seed
        self.route: Route | None = None
        self.counts: dict[str, Any] = {}
        self.train_pairs: Any = None
        self.validation_pairs: Any = None
        self._pool: TokenPool | None = None

    def setup(self, stage: str) -> None:
        """Read, split, encode and route; the pool of cleaning is made where the module cleans."""
        if self.route is not None:
            return
        self._encoder = load_tokenizer(self.tokenizer)
        if not self.validation and stage == "validate":
            raise InputError("there is nothing to validate on: data.validation is 0")
        read = self._read(self.source, self.split)
        if isinstance(self.validation, str):
            train, held_out = read, self._read(self.validation, self.validation_split)
            check_apart(train["prompt"], held_out["prompt"], held_out["row"], self.validation)
        elif self.validation:
            kept, out = split_by_prompt(read, self.validation, self.seed)
            train, held_out = read.select(kept), read.select(out)
        else:
            train, held_out = read, None
            self.trainer.limit_val_batches = 0
        self._data = content_hash(
            zip(*(train[name] for name in ("pair_id", "prompt", "chosen", "rejected")), strict=True)
        )
        self.train_pairs = self._encode(train, "train")
        self.validation_pairs = self._encode(held_out, "validation") if held_out is not None else None
        margins, ids = np.asarray(self.train_pairs["margin"]), np.asarray(self.train_pairs["pair_id"])
        self.route = self.routing.plan(margins, ids, seed=self.seed)
        rank_zero_info(self._describe())
        if getattr(self.trainer.lightning_module, "cleaning", None) is not None:
            self.cleaning_pool()

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

    def epoch_plan(self) -> StepPlan:
        assert self.route is not None
        hard_share = np.array([self.route.is_hard[list(step)].mean() for step in self._steps()])
        starts = [0]
        if self.route.ordering == "easy_to_hard" and (first_hard := int(np.argmax(hard_share >= 0.5))) > 0:
            starts.append(first_hard)
        return StepPlan(hard_share, tuple(starts))

    def micro_batches(self) -> list[MicroBatch]:
        assert self.route is not None
        tokens = self._tokens(self.train_pairs, self.route.is_hard)
        return [piece for step in self._steps() for piece in cut_step(step, tokens, **self.cut())]

    def loader(self, plan: list[MicroBatch]) -> ResumableLoader:
        assert self.route is not None
        first_token = None
        if self._pool is not None:
            first_token = np.full(len(self.route.is_hard), -1)
            first_token[np.flatnonzero(self.route.is_hard)] = self._pool.offsets[:-1]
        return self._make_loader(
            plan, self.train_pairs, self.route.is_hard.tolist(), evaluation=False, first_token=first_token
        )

    def fingerprint(self) -> str:
        assert self.route is not None
        return f"{self.route.fingerprint()} {self._data}"

    def cleaning_pool(self) -> TokenPool:
        """The chosen responses of the hard pairs, in the order of the data."""
        assert self.route is not None
        if self._pool is None:
            if not self.route.is_hard.any():
                raise InputError("model.cleaning has nothing to clean, since no pair is hard: set it to null")
            hard = self.train_pairs.select(np.flatnonzero(self.route.is_hard))
            samples = hard.map(_chosen_sample, remove_columns=hard.column_names, desc="Hard pairs")
            identity = {
                "data": self._data,
                **encoding_identity(self._encoder, self.chat_template, **self.lengths),
            }
            self._pool = TokenPool.of(samples, identity)
        return self._pool

    def easy_samples(self) -> list[dict[str, Any]]:
        """The chosen responses of the easy pairs, which the default cleaning reference learns."""
        assert self.route is not None
        return [_chosen_sample(self.train_pairs[int(i)]) for i in np.flatnonzero(~self.route.is_hard)]

    def pool_steps(self) -> list[tuple[int, ...]]:
        assert self.route is not None
        number = np.cumsum(self.route.is_hard) - 1
        return [tuple(int(number[i]) for i in step if self.route.is_hard[i]) for step in self._steps()]

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

    def _make_loader(self, plan: list[MicroBatch], pairs: Any, is_hard: list[bool], **options: Any) -> ResumableLoader:
        collator = PairCollator(pairs, is_hard, share_prompt=self.share_prompt, **options)
        return ResumableLoader(plan, collator, workers=self.workers)

    @staticmethod
    def _tokens(pairs: Any, is_hard: Any) -> list[int]:
        """Tokens that training a pair computes: a hard pair's rejected response is not among them."""
        columns = zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], is_hard, strict=True)
        return [len(p) + len(c) + (0 if hard else len(r)) for p, c, r, hard in columns]


def _chosen_sample(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair's prompt and chosen response as an SFT sample."""
    start = len(pair["prompt_ids"])
    ids = [*pair["prompt_ids"], *pair["chosen_ids"]]
    about = {"sample_id": pair["pair_id"], "source": "", "row": pair["row"], "truncated": pair["truncated"]}
    return {**about, "input_ids": ids, "spans": [start, len(ids)]}
