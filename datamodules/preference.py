"""The LightningDataModule of preference pairs: read, split, encode, route, and hand over micro-batches."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.planned import PlannedDataModule, hash_of_rows
from mixdpo.batches.batch import PairCollator
from mixdpo.batches.loader import ResumableLoader
from mixdpo.batches.steps import MicroBatch, plan_steps
from mixdpo.batches.token_pool import TokenPool
from mixdpo.data.encoding import encoding_identity
from mixdpo.data.messages import doubts_about_directions, prompts_of, split_by_prompt
from mixdpo.data.pairs import read_pairs
from mixdpo.data.ratings import doubts_about_margins
from mixdpo.data.sources import Origin
from mixdpo.errors import InputError
from mixdpo.routing.route import Route, Routing
from mixdpo.routing.schedules import StepPlan
from mixdpo.signals.margins_file import MarginsFile, read_margins, text_hash
from mixdpo.storage.identity import content_hash


class PreferenceDataModule(PlannedDataModule):
    noun = "pair"
    summary_file = "route.json"
    cleans_by_stage = False

    def __init__(
        self,
        source: str | list[str],
        routing: Routing = Routing(),  # noqa: B008
        validation_threshold: float | None = None,
        margin: str | list[str] | None = None,
        margins_file: str | None = None,
        weight: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int = 512,
        share_prompt: bool = True,
        half: Literal[0, 1] | None = None,
        **options: Any,
    ) -> None:
        """Preference pairs with margins, in the order and on the routes that the margins decide.

        Args:
            source: Hub id (ID:CONFIG where it has several configurations), local folder, .parquet, .json, .jsonl,
                .jsonl.gz or .csv file, or `constraints` (built in). A list [a.jsonl, ORG/NAME] is read as one.
            routing: Which pairs are hard, and the order of training.
            validation_threshold: Margin below which validation reports a pair as hard; the route's τ if not given. Give
                a baseline that routes no pair or all pairs the τ of the run to compare with.
            margin: Column with the margin, or two columns [chosen, rejected] whose difference is the margin. If not
                given, columns with usual names are used.
            margins_file: Margins file of `run.py predict`. Margin columns of the data are then not read.
            weight: Column with the weight w of a pair, 0 or 1e-6 to 1e6. The loss of a step is Σ w ℓ / Σ w on either
                route, and every logged mean is weighted. Pairs of weight 0 are left out. Without a column all weigh 1.
            max_length: Longest prompt + completion, in tokens.
            max_prompt_length: Tokens that a prompt keeps at least, if its pair exceeds max_length. The prompt keeps
                more where the longer response leaves room. Its start, with the system message, and its end stay.
            share_prompt: Compute the prompt once for both responses; false gives each a copy. The numbers are the same.
            half: Train on this half of the prompts, drawn by data.seed; `predict` computes margins of the other half.
                Null is all prompts. `mixdpo cross-fit` sets it.
        """
        super().__init__(source, **options)
        self.routing, self.validation_threshold, self.share_prompt = routing, validation_threshold, share_prompt
        self.margin, self.margins_file, self.weight, self.half = margin, margins_file, weight, half
        self.encoding |= {"max_length": max_length, "max_prompt_length": max_prompt_length}
        self.documents = self.documents or share_prompt
        self._margins: MarginsFile | None = None
        self.texts: dict[int, str] = {}  # pair id -> hash of its text, where a margins file is read or written
        self.route: Route = None  # type: ignore[assignment]  # until setup
        self.margin_scale = 0.0, 1.0  # subtracted and divided by, for a loss that wants standardised margins
        self.pool: TokenPool | None = None  # of a module that cleans tokens, after setup

    def plan_rows(self, stage: str) -> None:
        """Read, split, encode and route. For a module that cleans tokens, make the pool of cleaning too: the
        chosen responses of the hard pairs.

        Raises:
            InputError: the margins do not fit the pairs, or nothing can be cleaned.
        """
        if self.route is not None:
            return
        self._needs_margin: bool | str = getattr(self.trainer.lightning_module, "needs_margin", False)
        self.identity = encoding_identity(self.encoder, **self.encoding)
        if stage == "predict":
            if self.margins_file is not None:
                raise InputError("remove data.margins_file: fit and validate read it, predict writes model.output")
            self.train_pairs = self.encode(self.read(self.source, self.split), str(self.source))
            self.texts = {pair_id: self.texts[pair_id] for pair_id in self.train_pairs["pair_id"]}  # what is encoded
            self.identity |= {"source": str(self.source), "data": content_hash(self.texts.items())}
            return rank_zero_info("\n".join(self.describe_counts()))
        if self.margins_file is not None:
            self._margins = read_margins(self.margins_file)
            self._margins.refuse_other(self.identity, "encoding of the pairs")
        train, held_out = self.read_and_split(stage)
        weights = ["chosen_weight"] * any(weight != 1 for weight in train["chosen_weight"])
        self._data = hash_of_rows(train, "pair_id", "prompt", "chosen", "rejected", *weights)
        self.train_pairs = self._with_margins(self.encode(train, "train"), self.source)
        if held_out is not None:
            source = self.source if isinstance(self.validation.given, int | float) else self.validation
            self.validation_pairs = self._with_margins(self.encode(held_out, "validation"), source)
        margins, ids = np.asarray(self.train_pairs["margin"]), np.asarray(self.train_pairs["pair_id"])
        self.route = self.routing.plan(margins, ids, seed=self.seed)
        self._weights = self.train_pairs["pair_weight"][:] if self.weight else [1.0] * len(ids)
        if self._needs_margin == "standardised":
            self.margin_scale = _mean_and_deviation(margins)
        read = (self.route.preference_share < 1) | (getattr(self.trainer.lightning_module, "easy_sft_weight", 0) > 0)
        unread = ~read & (np.asarray(self.train_pairs["chosen_weight"]) != 1)
        self.counts["train"]["weights_not_read"] = int(unread.sum())
        if held_out is not None and self.route.is_hard.any() and not self.validation_is_hard().any():
            said = f"validation: none of the {len(self.validation_pairs)} pairs is hard, so no metric is of hard pairs"
            self.doubts.append(f"{said}: raise data.validation, or set data.validation_threshold")
        rank_zero_info("\n".join([*self.describe_counts(), self._describe_route()]))
        if (cleaning := getattr(self.trainer.lightning_module, "cleaning", None)) is not None:
            by_batch = cleaning.selection is not None and cleaning.selection.scope == "batch"
            routing, is_hard = self.routing, self.route.is_hard
            vary = routing.reshuffle or routing.order == "paced"  # the steps that a pair is in
            if routing.hard_action != "sft" or not is_hard.any() or (vary and by_batch):
                needed = "data.routing.hard_action sft and, where selection.scope is batch,"
                fault = f"model.cleaning needs hard pairs, {needed} data.routing.reshuffle false and no order paced"
                raise InputError(f"{fault}; {is_hard.sum()} pairs are hard")
            hard = self.train_pairs.select(self._on_side(hard=True))
            samples = hard.map(_chosen_sample, remove_columns=hard.column_names, desc="Hard pairs")
            hard_pairs = f"{len(hard)}, {content_hash(hard['pair_id'])}"
            self.pool = TokenPool.of(samples, {"data": self._data, "hard pairs": hard_pairs, **self.identity})

    def read(self, source: Origin, split: str) -> Any:
        signal = getattr(self.trainer.lightning_module, "signal", None)
        rated = self.margins_file is None if signal is None else signal.needs == "rating"
        needed = bool(signal or self._needs_margin or self.routing.by_margin or self.validation_threshold is not None)
        margin = self.margin if rated else ()
        options = {"margin": margin, "margin_needed": needed, "weight": self.weight, "limit": self.limit}
        table = read_pairs(source, split=split, **options)
        doubts = doubts_about_margins(np.asarray(table.dataset["margin"])) + doubts_about_directions(table.dataset)
        self.doubts += [f"{source}: {doubt}" for doubt in doubts]
        if signal is not None or self.margins_file is not None:
            texts = {pair["pair_id"]: text_hash(pair) for pair in table.dataset}
            if changed := [i for i, (key, text) in enumerate(texts.items()) if self.texts.get(key, text) != text]:
                misfits = f"{len(changed)} pairs of {source} (first: {table.dataset[changed[0]]['place']})"
                fault = f"{misfits} have the pair_id of another pair of {self.source}"
                raise InputError(f"{fault}: leave pair_id out of both and compute the margins anew")
            self.texts |= texts
        rows = self.count_read(source, split, table)
        if self.half is not None and source is self.source:
            # another seed than that of the validation split, whose held-out prompts would all be of one half
            rows = rows.select(split_by_prompt(prompts_of(rows), 0.5, -1 - self.seed)[self.half ^ (signal is not None)])
        return rows

    def _with_margins(self, pairs: Any, source: Origin) -> Any:
        return self._margins.add_to(pairs, self.texts, str(source)) if self._margins else pairs

    def _describe_route(self) -> str:
        route, why = self.route.summary(), ""
        drawn = f" (draws {route['trained']} of {len(self.route.order)} pairs an epoch)" * (route["coverage"] < 1)
        if route["assignment"] != "margin":
            why = f", by assignment {route['assignment']}"
        elif route["threshold"] is not None:
            tied = f", and {route['hard_at_threshold']} of the {route['ties_at_threshold']} pairs tied at it"
            why = f": margin below {route['threshold']:.4g}{tied if route['hard_at_threshold'] else ''}"
        if "blended" in route:
            why += f"; {route['blended']} pairs are blended, mean preference share {route['mean_preference_share']:.0%}"
        hard = f"{route['hard']} of {route['pairs']} pairs ({route['hard_fraction']:.0%}) are hard{why}"
        actions = f"hard pairs: {route['hard_action']}; easy pairs: {route['easy_action']}"
        steps = f"{len(self._steps())} steps of {self.batch_size} pairs"
        return f"{hard}\n{actions}; order {route['order']}{drawn}, {steps}"

    def summary(self) -> dict[str, Any]:
        """The content of `route.json`: the route's summary, how many rows were read, dropped or truncated, warnings."""
        source = {"margins": {"file": self.margins_file, **self._margins.header}} if self._margins else {}
        run = {"counts": self.counts, "warnings": self.doubts, "batch_size": self.batch_size, "seed": self.seed}
        return {**self.route.summary(), "data": self._data, **run, **source, "micro_batches": self.cut or None}

    def order_of_training(self) -> Iterator[dict[str, Any]]:
        """Rows of order.csv: each pair of the first epoch, in order, with its optimizer step from 0."""
        columns = {name: np.asarray(self.train_pairs[name]) for name in ("pair_id", "row", "margin")}
        columns |= {"hard": self.route.is_hard * 1, "preference_share": self.route.preference_share}
        for step, pairs in enumerate(self._steps()):
            yield from ({"step": step, **{name: column[i] for name, column in columns.items()}} for i in pairs)

    def _steps(self, epoch: int = 0) -> list[tuple[int, ...]]:
        return plan_steps(self.route.epoch_order(epoch).tolist(), self.batch_size)

    def epoch_plan(self, epoch: int = 0) -> StepPlan:
        """A stage starts with the first step in which at least half the pairs belong to that stage or a later one."""
        by_sft, weights = 1 - self.route.preference_share, np.asarray(self._weights)
        shares = [np.average(by_sft[[*step]], weights=weights[[*step]]) for step in self._steps(epoch)]
        stages = [step[len(step) // 2] for step in plan_steps(self.route.stages.tolist(), self.batch_size)]  # they rise
        return StepPlan(np.array(shares), (0, *(1 + np.flatnonzero(np.diff(stages))).tolist()))

    def sizes(self) -> tuple[list[int], list[float]]:
        tokens = self._tokens(self.train_pairs, self.route.is_sft, self.route.sft_sides)
        return tokens, self._weights

    def loader(self, plan: list[MicroBatch]) -> ResumableLoader:
        routes = {"preference_share": self.route.preference_share.tolist(), "sft_sides": self.route.sft_sides}
        if self.pool is not None:
            routes["first_token"] = np.full(len(self.route.is_hard), -1)
            routes["first_token"][self._on_side(hard=True)] = self.pool.offsets[:-1]
        loader = self._make_loader(plan, self.train_pairs, self.route.is_hard.tolist(), **routes)
        loader.replan = self.micro_batches if self.routing.reshuffle else None
        return loader

    def plan_identity(self) -> dict[str, str]:
        weights = {"data.weight": content_hash(self._weights)}
        return {"data": self._data, **self.identity, **weights, "route": self.route.fingerprint()}

    def easy_samples(self) -> list[dict[str, Any]]:
        """The chosen responses of the easy pairs, which the default cleaning reference learns."""
        return [_chosen_sample(self.train_pairs[int(i)]) for i in self._on_side(hard=False)]

    def _on_side(self, *, hard: bool) -> np.ndarray:
        """Indices of the hard pairs, or of the easy ones, by pair id: the order of the file's rows decides nothing."""
        indices = np.flatnonzero(self.route.is_hard == hard)
        return indices[np.argsort(self.route.pair_ids[indices])]

    def pool_steps(self, epoch: int = 0) -> list[tuple[int, ...]]:
        number = dict(zip(self._on_side(hard=True).tolist(), range(len(self.route.is_hard)), strict=False))
        return [tuple(number[i] for i in step if i in number) for step in self._steps(epoch)]

    def validation_is_hard(self) -> np.ndarray:
        """(N,) bool, which held-out pairs are reported as hard."""
        threshold = self.route.threshold if self.validation_threshold is None else self.validation_threshold
        margins = np.asarray(self.validation_pairs["margin"])
        if np.isnan(threshold) or np.isnan(margins).any():  # without margins all pairs are on one route
            return np.full(len(margins), self.routing.hard_fraction == 1)
        return margins < threshold

    def val_dataloader(self) -> ResumableLoader:
        return self._evaluation_loader(self.validation_pairs, self.validation_is_hard().tolist(), set())

    def predict_dataloader(self) -> ResumableLoader:
        """Batches by length of the pairs whose margin is not known yet."""
        easy = [False] * len(self.train_pairs)
        return self._evaluation_loader(self.train_pairs, easy, self.trainer.lightning_module.file.margins)

    def _evaluation_loader(self, pairs: Any, is_hard: list[bool], known: set[int]) -> ResumableLoader:
        ids = pairs["pair_id"][:]
        batches = self.validation_batches(self._tokens(pairs, [False] * len(ids)), ids)
        left = [(tuple(i for i in batch if ids[i] not in known), weight, count) for batch, weight, count in batches]
        return self._make_loader([batch for batch in left if batch[0]], pairs, is_hard, evaluation=True)

    def _make_loader(self, plan: list[MicroBatch], pairs: Any, is_hard: list[bool], **options: Any) -> ResumableLoader:
        if self._margins is not None and self._margins.of_policy:  # the weights are loaded after setup
            module = self.trainer.lightning_module
            made_with = {"weights": module.base_weights()}
            if self._margins.header["needs"] == "policy":  # an adapter's reward may be of any adapter
                made_with["adapter_weights"] = module.start_fingerprint
            self._margins.refuse_other(made_with, "base model or adapter")
        collator = PairCollator(pairs, is_hard, share_prompt=self.share_prompt, pack=self.pack, **options)
        return ResumableLoader(plan, collator, workers=self.workers)

    def _tokens(self, pairs: Any, is_sft: Any, learnt: tuple[int, ...] = (0,)) -> list[int]:
        """Tokens that training computes for each pair, without the responses that SFT does not learn."""
        columns = zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], is_sft, strict=True)
        rows = ((prompt, [sides[i] for i in (learnt if sft else (0, 1))]) for prompt, *sides, sft in columns)
        return [len(prompt) * (1 if self.share_prompt else len(mine)) + sum(map(len, mine)) for prompt, mine in rows]


def _mean_and_deviation(margins: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of the margins (N,), whatever the order of the rows.

    Raises:
        InputError: all margins are the same.
    """
    margins = np.sort(margins)
    if margins[0] == margins[-1]:
        fault = f"the preference loss divides by the margins' deviation, and all {len(margins)} are {margins[0]:g}"
        raise InputError(f"{fault}: give other margins (data.margin, data.margins_file) or another loss")
    return float(margins.mean()), float(margins.std())


def _chosen_sample(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair's prompt and chosen response as an SFT sample."""
    start, weight = len(pair["prompt_ids"]), pair["chosen_weight"] * pair.get("pair_weight", 1.0)
    ids = [*pair["prompt_ids"], *pair["chosen_ids"]]
    sample = {"sample_id": pair["pair_id"], "source": "", "row": pair["row"], "truncated": pair["truncated"]}
    return {**sample, "input_ids": ids, "spans": [start, len(ids)], "response_weights": [weight]}
