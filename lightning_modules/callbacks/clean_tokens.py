"""Callbacks of token cleaning: refresh the reference, and score and select the tokens that come next."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from mixdpo.batches.token_pool import TokenPool
from mixdpo.errors import InputError
from mixdpo.model.adapters import add_reference, adds_nothing, check_alike, copy_adapter
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.token_cleaning.cleaning import Cleaning, always_kept, weigh
from mixdpo.token_cleaning.run_tokens import RunTokens, read_masks
from mixdpo.token_cleaning.scorers import ExcessLoss, TokenStatistics, is_online
from mixdpo.token_cleaning.scoring import add_losses, open_losses
from mixdpo.token_cleaning.summary import describe, summarise

ROLES = {"base": "base", "reference": "cleaning", "previous": "previous"}
"""Role in a scorer -> role of the model: a preference module's own reference is another one."""


class RefreshReference(Callback):
    def __init__(
        self,
        every: int | Literal["stage"] = "stage",
        ema: float = 0.0,
        role: Literal["cleaning", "reference"] = "cleaning",
    ) -> None:
        """Makes the policy a reference, again and again: self-evolving token cleaning, or a moving reference of DPO.

        What comes next is then scored by, or held against, the new reference. With `every: stage` and slices of the
        data, slice t is cleaned by the model that slices 0 to t − 1 have trained. With `role: reference` and pairs in
        buckets, each bucket starts from its own reference (Curri-DPO, arXiv 2403.07230).

        Args:
            every: At the start of each stage but the first, or every so many optimizer steps.
            ema: New reference = ema · old + (1 − ema) · policy, matrix by matrix; 0 is a copy.
            role: The reference of token cleaning, or the one of the preference loss (the base, or `model.adapter`,
                until the first refresh).
        """
        if every != "stage" and every < 1:
            raise InputError(f"RefreshReference.every must be 'stage' or a number of steps, not {every}")
        if not 0 <= ema < 1:
            raise InputError(f"RefreshReference.ema must lie in [0, 1), not {ema}")
        self.every, self.ema, self.role = every, ema, role
        self._refreshed_at = 0

    def __str__(self) -> str:
        return f"every {self.every}, ema {self.ema}"

    @property
    def state_key(self) -> str:
        return self._generate_state_key(role=self.role)  # a run may have one of each

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        exists = self.role in pl_module.model.peft_config
        if self.role == "cleaning" and not exists:
            raise InputError(
                "RefreshReference: nothing to refresh, since model.cleaning has no scorer that reads a reference"
            )
        if self.role == "reference" and not getattr(pl_module, "needs_reference", False):
            raise InputError("RefreshReference: role reference belongs to a preference loss that has a reference")
        if self.every == "stage" and len(trainer.datamodule.epoch.stage_starts) == 1:
            raise InputError(
                "RefreshReference: the run has one stage: set data.slices.count or data.routing.order (bucketed), or "
                "every to a number"
            )
        if self.ema and getattr(pl_module, "stage_start", None) == "fresh_adapter":
            raise InputError("RefreshReference.ema: the moving average of stacked adapters is not defined: use 0")
        if self.ema and not exists:
            raise InputError("RefreshReference.ema: there is no average of the base and an adapter: use 0")
        if exists:
            check_alike(pl_module.model, "policy", self.role)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step, stage_of = trainer.global_step, trainer.datamodule.stage_of
        if step == self._refreshed_at or step == 0:
            return  # a later micro-batch of the same step, or nothing learnt yet
        if stage_of(step) == stage_of(step - 1) if self.every == "stage" else step % self.every:
            return
        model = pl_module.model
        self._refreshed_at = step
        if self.role not in model.peft_config:
            add_reference(model, self.role)  # until now it was the base
        if self.role == "cleaning":
            if "previous" in model.peft_config:
                copy_adapter(model, "cleaning", "previous")
            pl_module.reference_version += 1
        copy_adapter(model, "policy", self.role, decay=self.ema)
        if self.role == "reference":
            pl_module.reference_changed()

    def state_dict(self) -> dict[str, Any]:
        return {"refreshed_at": self._refreshed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._refreshed_at = state_dict["refreshed_at"]


class CleanTokens(Callback):
    """Scores and selects the tokens of each stage before it begins, and hands every batch its tokens' weights.

    Added by a module with `cleaning`. Leaves `cleaning/` in the run's folder: samples/, scores.npy, weights.npy,
    stages.json. Its state in a checkpoint is the scores and weights so far, so a resumed run does not score again.
    """

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning = cleaning
        self._tokens: RunTokens = None  # type: ignore[assignment]  # until on_train_start
        self._restored: dict[str, Any] | None = None
        self._scored: list[int] | None = None  # stage and version of the reference that weights are of
        self._losses: dict[str, np.ndarray] = {}
        self._losses_of: list[int] | None = None
        self._always_keep: np.ndarray | None = None
        self._masks: np.ndarray | None = None
        self._open_stage: dict[str, Any] | None = None  # the stage whose tokens are not all decided yet

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.world_size > 1 and is_online(self.cleaning.scorer):
            raise InputError(
                f"{self.cleaning.scorer} reads the policy in each step, and each of several devices would know its own "
                "tokens' scores only: train on one, or use a scorer of base and reference"
            )
        pool: TokenPool = trainer.datamodule.cleaning_pool()
        identity = {
            **pool.identity,
            "model": base_fingerprint(pl_module.model),
            "dtype": f"{pl_module.loading['dtype']}, {trainer.precision}",
        }
        tokenizer = trainer.datamodule.tokenizer
        self._tokens = RunTokens.undecided(pool, identity, tokenizer)
        if self.cleaning.warm_up_stages >= len(trainer.datamodule.epoch.stage_starts):
            raise InputError("cleaning.warm_up_stages leaves no stage to clean: raise data.slices.count")
        refreshed = any(isinstance(c, RefreshReference) and c.role == "cleaning" for c in trainer.callbacks)
        needs_one = "reference" in self.cleaning.roles and self.cleaning.reference is None and not refreshed
        if needs_one and self.cleaning.warm_up_stages and pl_module.adapter is None:
            raise InputError(
                "cleaning.reference is null, and nothing makes the warmed-up policy the reference: add the callback "
                "lightning_modules.callbacks.RefreshReference, or give an adapter"
            )
        if self._restored is not None:
            self._tokens.restore(self._restored)
            self._scored, self._open_stage = self._restored["scored"], self._restored["open"]
        if self.cleaning.masks is not None:
            self._masks = read_masks(Path(self.cleaning.masks), identity, len(pool))
        self._always_keep = always_kept(self.cleaning.selection, pool, tokenizer)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "cleaning"
            folder.mkdir(exist_ok=True)
            self._tokens.write_samples(folder)
            self._tokens.write(folder)  # of a resumed run: what was decided before

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        token = batch.token.cpu().numpy()
        if not trainer.strategy.reduce_boolean_decision(bool((token >= 0).any()), all=False):
            return  # easy pairs on all ranks: hard ones are scored, at the same step everywhere, when the first comes
        now = [trainer.datamodule.stage_of(trainer.global_step), pl_module.reference_version]
        warm_up = now[0] < self.cleaning.warm_up_stages
        online = is_online(self.cleaning.scorer) and not warm_up
        if now != self._scored or (online and now != self._losses_of):
            samples, steps = trainer.datamodule.upcoming_samples(trainer.global_step)
            # a refreshed reference scores what comes next anew; else only what nobody has decided yet is due
            renewed = self._scored is None or now[1] != self._scored[1]
            due = now != self._scored and (renewed or (self._tokens.decided[samples] < 0).any())
            if online or (due and not warm_up and self._masks is None):
                # of a resumed stage the whole: in other batches the losses would round otherwise
                self._prepare_losses(pl_module, samples if due else self._tokens.in_progress(), now)
            if due:
                self._finish_stage(trainer)
                self._clean(trainer, samples, steps, warm_up, online)
            self._scored = now
        device = batch.token.device
        if online:
            batch.losses = {name: torch.from_numpy(values[token]).to(device) for name, values in self._losses.items()}
            batch.always_keep = None if self._always_keep is None else self._always_keep[token]
        else:
            weights = np.where(token >= 0, self._tokens.weights[token], np.float32(1))
            batch.token_weight = batch.token_weight * torch.from_numpy(weights).to(device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if getattr(batch, "scores", None) is not None and batch.count:
            token = batch.token.cpu().numpy()
            self._tokens.scores[token] = batch.scores.float().cpu().numpy()
            self._tokens.weights[token] = batch.token_weight.float().cpu().numpy()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._finish_stage(trainer)

    def _prepare_losses(self, pl_module: Any, samples: np.ndarray, now: list[int]) -> None:
        """Losses of the roles that the scorer reads besides the policy. Those of the base, and of a reference that was
        given and never refreshed, are kept on disk for every later round, ratio and run."""
        pool, model = self._tokens.pool, pl_module.model
        adapters = {
            name: "none" if adds_nothing(model, ROLES[name]) else adapter_fingerprint(model, ROLES[name])
            for name in self.cleaning.roles
            if name != "policy"
        }
        differs = isinstance(self.cleaning.scorer, ExcessLoss) and len(adapters) > 1
        if differs and len(set(adapters.values())) == 1:
            raise InputError(
                f"every score would be 0: {' and '.join(adapters)} of cleaning.scorer are the same model. Give "
                "model.cleaning.reference (no help where it is `previous` as well), or warm_up_stages of at least 1 "
                "and the callback RefreshReference"
            )
        computed = {"attention": pl_module.loading["attention"], "device": pl_module.device.type}
        for name, adapter in adapters.items():
            lasting = name == "base" or (self.cleaning.reference is not None and now[1] == 0)
            if name not in self._losses or not lasting:
                identity = {**self._tokens.identity, "adapter": adapter, **computed} if lasting else None
                self._losses[name] = open_losses(len(pool), identity)
            with pl_module.trainer.precision_plugin.forward_context():  # Lightning's own is around the steps only
                add_losses(self._losses[name], model, ROLES[name], pool, samples)
        self._losses_of = now

    def _clean(self, trainer: L.Trainer, samples: np.ndarray, steps: np.ndarray, warm_up: bool, online: bool) -> None:
        """Decide the weights of these samples' tokens; those of an online scorer are decided in each step instead."""
        tokens, kept, step = self._tokens.pool.tokens(samples), None, trainer.global_step
        self._tokens.scores[tokens], self._tokens.weights[tokens] = np.nan, 1 if warm_up else np.nan
        self._tokens.decided[samples] = len(self._tokens.stages)
        if not (warm_up or online) and self._masks is not None:
            if not ((self._masks[tokens] >= 0) & np.isfinite(self._masks[tokens])).all():
                raise InputError(
                    f"cleaning.masks {self.cleaning.masks} has no weight for some tokens of this stage: give the masks "
                    "of a run that reached all of them"
                )
            self._tokens.weights[tokens] = self._masks[tokens]
        elif not (warm_up or online) and len(tokens):
            offsets = self._tokens.pool.offsets_of(samples)
            scores = self._scores(tokens, np.repeat(samples, np.diff(offsets)))
            always = None if self._always_keep is None else self._always_keep[tokens]
            weights, kept = weigh(self.cleaning.selection, scores, offsets, batch=steps, always_keep=always)
            self._tokens.scores[tokens], self._tokens.weights[tokens] = scores, weights
        self._open_stage = {"stage": trainer.datamodule.stage_of(step), "step": step, "warm_up": warm_up, "kept": kept}
        if not online:
            self._finish_stage(trainer)

    def _scores(self, tokens: np.ndarray, sample: np.ndarray) -> np.ndarray:
        losses = {name: torch.from_numpy(values[tokens]) for name, values in self._losses.items()}
        statistics = TokenStatistics(losses, torch.from_numpy(sample), torch.from_numpy(tokens))
        return self.cleaning.scorer(statistics).numpy()

    def _finish_stage(self, trainer: L.Trainer) -> None:
        """Sum up the stage whose weights are complete, and write all that is known so far."""
        samples, pool = self._tokens.in_progress(), self._tokens.pool
        if self._open_stage is None or not len(samples):
            return
        entry, self._open_stage = self._open_stage, None
        samples = samples[~np.isnan(self._tokens.weights[pool.offsets[samples]])]  # max_steps may end a stage early
        tokens, planted, sources = pool.tokens(samples), pool.planted(), pool.samples["source"][:]
        facts = summarise(
            self._tokens.weights[tokens],
            self._tokens.scores[tokens],
            pool.offsets_of(samples),
            [sources[i] for i in samples],
            entry["kept"],
            None if planted is None else planted[tokens],
        )
        said = {"scorer": None, "selection": None} if entry["warm_up"] else self.cleaning.describe()
        self._tokens.stages.append({"stage": entry["stage"], "step": entry["step"], **said, **facts})
        if trainer.is_global_zero:
            self._tokens.write(Path(trainer.default_root_dir) / "cleaning")
        rank_zero_info(describe(self._tokens.stages[-1]))

    def state_dict(self) -> dict[str, Any]:
        return {**self._tokens.state(), "scored": self._scored, "open": self._open_stage} if self._tokens else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
