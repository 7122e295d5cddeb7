"""Callbacks for two faults of a run: numbers that are not finite, and memory that runs out."""

import math
import sys
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_modules.callbacks.checkpoint import resume_command
from lightning_modules.callbacks.logging import logs_step, peak_memory_gb
from mixdpo.batches.steps import heaviest
from mixdpo.errors import NonFiniteError
from mixdpo.model.memory import is_out_of_memory
from mixdpo.storage.files import write_json


class NonFinite(Callback):
    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        """Ends a run whose loss or gradient is not finite, and writes RUN/non_finite.json: the step, its rows with
        their texts and losses, and the command that repeats the step.

        Args:
            action: stop: check where steps are logged and before every checkpoint, without waiting for the device in
                between. skip: check every step, which waits for the device, and leave out each step that is not finite.
        """
        self.action = action
        self._losses: list[tuple[Any, Tensor]] = []  # ids and losses of the micro-batches since the last step
        self._steps: list[tuple[int, Tensor, list[tuple[Any, Tensor]]]] = []  # not checked yet: number, norm, losses

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._losses.append(pl_module.row_losses)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        if trainer.precision == "16-mixed":  # its scaler tries too large factors and steps over an overflow
            norm = torch.zeros_like(norm)
        self._steps.append((trainer.global_step, norm, self._losses))
        self._losses = []
        if self.action == "skip" and (message := self._check(trainer)):
            optimizer.zero_grad(set_to_none=True)  # zeros would move Adam, which remembers earlier gradients
            print(f"warning: the step is left out: {message}", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if logs_step(trainer):
            self._stop_if_not_finite(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._stop_if_not_finite(trainer)  # no checkpoint ever holds a number that is not finite

    def _stop_if_not_finite(self, trainer: L.Trainer) -> None:
        if message := self._check(trainer):
            raise NonFiniteError(f"{message}\nLower the learning rate, or skip the step (--non_finite.action skip)")

    def _check(self, trainer: L.Trainer) -> str | None:
        """Report the first step since the last check with a number that is not finite: its message, or None."""
        steps, self._steps = self._steps, []
        numbers = [[norm.float(), *(values.sum().float() for _, values in losses)] for _, norm, losses in steps]
        sums = torch.stack([torch.stack(each).sum() for each in numbers]).tolist() if steps else []
        # one rank's losses may be finite, and all must stop or skip
        bad = [trainer.strategy.reduce_boolean_decision(not math.isfinite(total), all=False) for total in sums]
        return next((_report(trainer, *step) for step, is_bad in zip(steps, bad, strict=True) if is_bad), None)


def _report(trainer: L.Trainer, step: int, norm: Tensor, losses: list[tuple[Any, Tensor]]) -> str:
    """Write non_finite.json; returns the message for the user."""
    data, path = trainer.datamodule, Path(trainer.default_root_dir) / "non_finite.json"
    values = [value for _, each in losses for value in each.tolist()]
    rows = data.rows_of([number for ids, _ in losses for number in ids.tolist()])
    # JSON has no NaN
    rows = [row | {"loss": v if math.isfinite(v) else str(v)} for row, v in zip(rows, values, strict=True)]
    again = f"{resume_command(trainer)} --trainer.log_every_n_steps 1"
    content = {"step": step, "gradient_norm": str(float(norm)), "again": again, "source": str(data.source)}
    if trainer.is_global_zero:
        write_json(path, content | {"rows": rows})
    bad = [row["place"] for row in rows if isinstance(row["loss"], str)]
    what = f"loss of {', '.join(bad[:5])} of {data.source}" if bad else "gradient"
    numbers = f"gradient norm {float(norm):.3g}; {len(bad)} of its {len(rows)} rows"
    where = f"rows, texts and losses are in {path}. To see the step again: {again}"
    return f"step {step} has a {what} that is not finite ({numbers}): {where}"


class OutOfMemory(Callback):
    """Adds to an out-of-memory error the options to change, with numbers. On CUDA the heaviest micro-batch of the plan
    runs once before the first step: memory that does not suffice for it ends the run now, not after hours."""

    _batch: tuple[int, str, int] | None = None  # rows, unit and tokens of the micro-batch in progress

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.on_gpu and not trainer.fit_loop.done:
            data, together = trainer.datamodule, trainer.accumulate_grad_batches * trainer.world_size
            batch = data.loader([]).collator(heaviest(data.all_steps(), data.row_sizes[0], together)[1])
            self.on_train_batch_start(trainer, pl_module, batch)
            twin = copy(pl_module)  # of the same model; what it counts, remembers or caches does not reach the run
            twin._modules, twin.trainer, twin.reference_cache = dict(pl_module._modules), trainer, False
            optimizer = trainer.optimizers[0]
            new = not optimizer.state and type(optimizer).__module__.startswith("torch.optim.")
            # the memory of what later steps have: gradients and, where there are none yet, fp32 moments
            held = [torch.zeros_like(p) for p in pl_module.learning() for _ in range(3 if new else 1)]
            of_run = pl_module.train_means, getattr(pl_module, "preference_loss", None)
            (twin.train_means, twin.preference_loss), twin._kept_log_probs = deepcopy(of_run), None
            with isolate_rng(), trainer.precision_plugin.train_step_context():
                loss = twin.training_step(trainer.strategy.batch_to_device(batch), 0)
            loss.backward()
            pl_module.zero_grad()
            del held
            self._batch = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self._batch = batch.count, batch.unit, batch.rows.tokens

    on_validation_batch_start = on_train_batch_start

    def on_train_epoch_end(self, *_: Any) -> None:
        self._batch = None  # no micro-batch follows

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._batch is None or not is_out_of_memory(exception):
            return
        (rows, unit, tokens), data, now = self._batch, trainer.datamodule, trainer.accumulate_grad_batches
        length, most = data.encoding["max_length"], data.batch_size // trainer.world_size
        first = f"trainer.accumulate_grad_batches {min(2 * now, most)} (now {now}, at most {most})"
        if data.cut:
            first = f"data.micro_batch_tokens {max(tokens // 2, *data.row_sizes[0])} (now {data.cut['limit']})"
        if trainer.validating or trainer.sanity_checking:
            first = f"data.eval_batch_size 1 (now {data.eval_batch_size})"
        took = f"took more than the {peak_memory_gb(pl_module.device):.1f} GB reached"
        fault = f"out of memory: a micro-batch of {rows} {unit} with {tokens} tokens {took}"
        rule = "Change the first of these options, then also the next ones, until the memory is enough"
        ways = f"{first}; model.activation_checkpointing true; data.max_length {length // 2} (now {length})"
        exception.add_note(f"{fault}. {rule}: {ways}; model.optimizer bitsandbytes.optim.PagedAdamW8bit")
