"""Callbacks of token cleaning: refresh a reference, and score and select the tokens that come next."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from mixdpo.errors import InputError
from mixdpo.model.adapters import add_reference, check_alike, copy_adapter, factor_distance
from mixdpo.model.identity import adapter_fingerprint
from mixdpo.token_cleaning.cleaning import Cleaning, always_kept, column_scores, weigh
from mixdpo.token_cleaning.run_tokens import RunTokens, read_masks
from mixdpo.token_cleaning.scorers import ExcessLoss, TokenStatistics, is_online
from mixdpo.token_cleaning.scoring import Losses, add_losses, open_losses
from mixdpo.token_cleaning.summary import describe, summarise


class RefreshReference(Callback):
    def __init__(
        self,
        every: PositiveInt | Literal["stage"] = "stage",
        ema: ClosedUnitInterval = 0.0,
        role: Literal["cleaning_reference", "reference"] = "cleaning_reference",
    ) -> None:
        """Copies the policy into a reference again and again: self-evolving token cleaning, or DPO's moving reference.

        A new cleaning_reference scores the tokens that come next. A new reference is compared with the policy from then
        on. With `every: stage` and slices of the data,
        slice t is cleaned by the model that slices 0 to t − 1 have trained. With `role: reference` and pairs in
        buckets, each bucket starts from its own reference (Curri-DPO, arXiv 2403.07230).

        Args:
            every: At the start of each stage but the first, or every so many optimizer steps.
            ema: New reference = ema · old + (1 − ema) · policy, matrix by matrix; 0 is a copy. TR-DPO (arXiv
                2404.09656) averages weights instead, with α = 1 − ema: ROLE/distance in metrics.csv is how far ours is
                from its average (`factor_distance`).
            role: cleaning_reference scores tokens. reference belongs to the preference loss; until the first refresh
                it is the base, or `model.adapter`. With ema the base is an adapter too: the A that the policy starts
                with, and a B of zeros.
        """
        self.every, self.ema, self.role = every, ema, role
        self._refreshed_at = 0

    def __str__(self) -> str:
        return f"every {self.every}, ema {self.ema}"

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        exists = self.role in pl_module.model.peft_config
        if not (exists if self.role == "cleaning_reference" else getattr(pl_module, "needs_reference", False)):
            raise InputError(f"RefreshReference: neither the scorer nor the loss reads a {self.role}: leave it out")
        if self.every == "stage" and len(trainer.datamodule.epoch.stage_starts) == 1:
            raise InputError("RefreshReference: the run has one stage: set data.slices, data.routing.order or `every`")
        if self.ema and getattr(pl_module, "stage_start", None) == "fresh_adapter":
            raise InputError("RefreshReference: stacked adapters have no moving average: set ema to 0")
        if exists:
            check_alike(pl_module.model, "policy", self.role)
        elif self.ema:
            add_reference(pl_module.model, self.role)  # a fresh policy: its B is 0, so this is the base

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step, stage_of = trainer.global_step, trainer.datamodule.stage_of
        is_due = stage_of(step) != stage_of(step - 1) if self.every == "stage" else step % self.every == 0
        if not is_due or step in (0, self._refreshed_at):  # nothing learnt yet, or a later micro-batch of the same step
            return
        model = pl_module.model
        self._refreshed_at = step
        if self.role not in model.peft_config:
            add_reference(model, self.role)  # until now the base was the reference
        if self.ema:
            pl_module.callback_values[f"{self.role}/distance"] = factor_distance(model, "policy", self.role, self.ema)
        if self.role == "cleaning_reference":
            if "previous" in model.peft_config:
                copy_adapter(model, "cleaning_reference", "previous")
            pl_module.reference_version += 1
        copy_adapter(model, "policy", self.role, decay=self.ema)
        if self.role == "reference":
            pl_module.reference_changed()


class CleanTokens(Callback):
    """Scores and selects the tokens of each stage before the stage begins, and gives every batch its tokens' weights.

    A module with `cleaning` adds this callback. The run's folder gets `cleaning/`: samples/, scores.npy, weights.npy,
    decided.npy, stages.json. A checkpoint holds the scores and weights so far, so a resumed run does not score again.
    """

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning = cleaning
        self._tokens: RunTokens = None  # type: ignore[assignment]  # until on_train_start
        self._restored: dict[str, Any] = {}
        self._losses: dict[str, Losses] = {}
        self._column = ""  # hash of the scores that the data holds
        self._losses_of: list[int] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._check(trainer, pl_module)
        data, cleaning, pool = trainer.datamodule, self.cleaning, trainer.datamodule.pool
        dtype = f"{pl_module.loading['dtype']}, {trainer.precision}"
        identity = {**pool.identity, "model": pl_module.base_weights(), "dtype": dtype}
        self._tokens = RunTokens.undecided(pool, identity, data.tokenizer)
        if restored := self._restored:
            self._tokens.restore(restored)
        self._scored: list[int] | None = restored.get("scored")  # stage and reference version of the weights
        self._open_stage: dict[str, Any] | None = restored.get("open")  # the stage whose tokens are not all decided yet
        self._masks = read_masks(Path(cleaning.masks), identity, len(pool)) if cleaning.masks is not None else None
        self._always_keep = always_kept(cleaning.selection, pool, data.tokenizer)
        if self._masks is None and (column := getattr(cleaning.scorer, "column", None)) is not None:
            self._losses["column"] = column_scores(column, data.source, data.split, pool), None
            self._column = hashlib.sha256(self._losses["column"][0]).hexdigest()[:16]
            if restored and restored["column"] != self._column:
                raise InputError(f"the checkpoint's run had other numbers in the column {column!r}: give its data")
            rank_zero_info(f"the scores of {len(pool):,} response tokens come from the column {column!r}")
        if trainer.is_global_zero:
            self._tokens.write_samples(Path(trainer.default_root_dir) / "cleaning")
        self._write(trainer)  # of a resumed run: what was decided before

    def _check(self, trainer: L.Trainer, pl_module: Any) -> None:
        cleaning = self.cleaning
        if trainer.world_size > 1 and is_online(cleaning.scorer):
            raise InputError(f"{cleaning.scorer} scores tokens in each step: give --trainer.devices 1")
        by_batch = is_online(cleaning.scorer) and cleaning.selection and cleaning.selection.scope == "batch"
        if by_batch and trainer.datamodule.micro_batch_tokens == "auto":  # the card would decide what is ranked
            raise InputError("selection.scope batch ranks a micro-batch: set data.micro_batch_tokens to a number")
        if cleaning.warm_up_stages >= len(trainer.datamodule.epoch.stage_starts):
            raise InputError("cleaning.warm_up_stages leaves no stage to clean: raise data.slices.count")
        refreshed = any(isinstance(callback, RefreshReference) for callback in trainer.callbacks)
        is_made = cleaning.reference or pl_module.adapter or refreshed
        if cleaning.warm_up_stages and "cleaning_reference" in cleaning.roles and not is_made:
            raise InputError("nothing makes the warmed-up policy the cleaning_reference: add callback RefreshReference")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        token = (batch.host or batch).token.numpy()
        if not trainer.strategy.reduce_boolean_decision(bool((token >= 0).any()), all=False):
            return  # easy pairs on all ranks: the first hard pair on any rank starts the scoring on all
        now = [trainer.datamodule.stage_of(trainer.global_step), pl_module.reference_version]
        warm_up = now[0] < self.cleaning.warm_up_stages
        online = is_online(self.cleaning.scorer) and not warm_up
        if now != self._scored or (online and now != self._losses_of):
            self._score(trainer, pl_module, now, warm_up, online)
        if online:
            device = batch.token.device
            batch.losses = {name: torch.from_numpy(loss[token]).to(device) for name, (loss, _) in self._losses.items()}
            batch.always_keep = self._always_keep[token]
        else:
            batch.reweigh(np.where(token >= 0, self._tokens.weights[token], np.float32(1)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if getattr(batch, "scores", None) is not None and batch.count:
            token = (batch.host or batch).token.numpy()
            self._tokens.scores[token] = batch.scores.float().cpu().numpy()
            self._tokens.weights[token] = (batch.token_weight / batch.data_weight).float().cpu().numpy()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._finish_stage(trainer)

    def _score(self, trainer: L.Trainer, pl_module: Any, now: list[int], warm_up: bool, online: bool) -> None:
        """Decide the tokens of the coming steps: all of them after a refresh, else those not decided yet."""
        samples, steps = trainer.datamodule.upcoming_samples(trainer.global_step)
        renewed = self._scored is None or now[1] != self._scored[1]
        due = now != self._scored and (renewed or (self._tokens.decided[samples] < 0).any())
        if online or (due and not warm_up and self._masks is None):
            # all samples of a resumed stage: in other batches the losses would round differently
            self._prepare_losses(pl_module, samples if due else self._tokens.in_progress(), now)
        if due:
            self._finish_stage(trainer)
            self._clean(trainer, samples, steps, warm_up, online)
        self._scored = now

    def _prepare_losses(self, pl_module: Any, samples: np.ndarray, now: list[int]) -> None:
        """Compute the losses of the roles that the scorer reads, except the policy.

        The losses of the base, and of a given reference before its first refresh, are kept on disk for later runs.
        """
        pool, model = self._tokens.pool, pl_module.model
        adapters = {role: adapter_fingerprint(model, role) for role in self.cleaning.roles if role != "policy"}
        if isinstance(self.cleaning.scorer, ExcessLoss) and len(adapters) > 1 and len(set(adapters.values())) == 1:
            same = f"{' and '.join(adapters)} are one model"
            raise InputError(f"every score would be 0: {same}. Give model.cleaning.reference or warm_up_stages")
        computed = {"computed": str([pl_module.loading["attention"], *pl_module.fused_layers, pl_module.device.type])}
        for role, adapter in adapters.items():
            lasting = role == "base" or (self.cleaning.reference is not None and now[1] == 0)
            if role not in self._losses or not lasting:
                identity = {**self._tokens.identity, "adapter": adapter, **computed} if lasting else None
                self._losses[role] = open_losses(pool, identity)
            with pl_module.trainer.precision_plugin.forward_context():  # Lightning's own is around the steps only
                add_losses(self._losses[role], model, role, pool, samples)
        self._losses_of = now

    def _clean(self, trainer: L.Trainer, samples: np.ndarray, steps: np.ndarray, warm_up: bool, online: bool) -> None:
        """Decide the weights of these samples' tokens. An online scorer decides in each step instead."""
        run, step, threshold = self._tokens, trainer.global_step, None
        tokens, offsets = run.pool.tokens(samples), run.pool.offsets_of(samples)
        run.scores[tokens], run.weights[tokens] = np.nan, 1 if warm_up else np.nan
        run.decided[samples] = len(run.stages)
        if not (warm_up or online) and self._masks is not None:
            run.weights[tokens] = self._masks[tokens]
            if not ((run.weights[tokens] >= 0) & np.isfinite(run.weights[tokens])).all():
                raise InputError("cleaning.masks lacks weights of some tokens: give masks of a run that reached all")
        elif not (warm_up or online) and len(tokens):
            losses = {role: torch.from_numpy(values[tokens]) for role, (values, _) in self._losses.items()}
            sample = torch.from_numpy(np.repeat(samples, np.diff(offsets)))
            scores = self.cleaning.scorer(TokenStatistics(losses, sample, torch.from_numpy(tokens))).numpy()
            options = {"batch": steps, "always_keep": self._always_keep[tokens]}
            run.scores[tokens] = scores
            run.weights[tokens], threshold = weigh(self.cleaning.selection, scores, offsets, **options)
        stage = trainer.datamodule.stage_of(step)
        self._open_stage = {"stage": stage, "step": step, "warm_up": warm_up, "threshold": threshold}
        if not online:
            self._finish_stage(trainer)

    def _finish_stage(self, trainer: L.Trainer) -> None:
        """Summarise the stage whose weights are complete, and write the folder `cleaning`."""
        run, samples = self._tokens, self._tokens.in_progress()
        if self._open_stage is None or not len(samples):
            return
        stage, self._open_stage = self._open_stage, None
        samples = samples[~np.isnan(run.weights[run.pool.offsets[samples]])]  # max_steps may end a stage early
        tokens, sources = run.pool.tokens(samples), np.array(run.pool.samples["source"][:])[samples]
        values = run.weights[tokens], run.scores[tokens], run.pool.offsets_of(samples)
        summary = summarise(*values, sources, stage["threshold"])
        how = {"scorer": None, "selection": None} if stage["warm_up"] else self.cleaning.describe()
        run.stages.append({"stage": stage["stage"], "step": stage["step"], **how, **summary})
        self._write(trainer)
        rank_zero_info(describe(run.stages[-1]))

    def _write(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            self._tokens.write(Path(trainer.default_root_dir) / "cleaning")

    def state_dict(self) -> dict[str, Any]:
        own = {"scored": self._scored, "open": self._open_stage, "column": self._column} if self._tokens else {}
        return {**self._tokens.state(), **own} if own else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
