"""Callbacks for what goes wrong in a run: numbers that are not finite, memory that runs out."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.callbacks.checkpoint import resume_command
from lightning_modules.callbacks.logging import logs_step, peak_memory_gb
from mixdpo.errors import NonFiniteError
from mixdpo.storage.files import write_json


class NonFinite(Callback):
    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        """Ends a run whose loss or gradient is not finite, and writes RUN/non_finite.json: the step, its rows with
        their texts and losses, and the command that comes to the same step again.

        Args:
            action: stop: looked for where steps are logged and before every checkpoint, so that nothing waits for the
                device in between. skip: leave such a step out; that takes a look, and waits, in every step.
        """
        self.action = action
        self.skipped = 0
        self._ids: Any = None
        self._losses: list[tuple[Any, Tensor]] = []  # ids and losses of the micro-batches since the last step
        self._steps: list[tuple[int, Tensor, list[tuple[Any, Tensor]]]] = []  # not looked at yet

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._ids = batch.ids[: batch.count]

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._losses.append((self._ids, pl_module.row_losses[: len(self._ids)]))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if trainer.precision == "16-mixed":  # its scaler tries too large factors and steps over what overflows
            norm = torch.zeros_like(norm)
        self._steps.append((trainer.global_step, norm, self._losses))
        self._losses = []
        if self.action == "skip" and (found := self._found(trainer)) is not None:
            optimizer.zero_grad(set_to_none=True)  # zeros would move Adam, which remembers earlier gradients
            self.skipped += 1
            pl_module.callback_values["skipped_steps"] = self.skipped
            self._report(trainer, *found)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if logs_step(trainer):
            self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)  # what is not finite never gets into one

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _look(self, trainer: L.Trainer) -> None:
        if (found := self._found(trainer)) is not None:
            raise NonFiniteError(self._report(trainer, *found))

    def _found(self, trainer: L.Trainer) -> tuple[int, float, list[tuple[Any, Tensor]]] | None:
        """The first step with a number that is not finite: number, gradient norm, ids and losses of its rows."""
        steps, self._steps = self._steps, []
        if not steps:
            return None
        values = [
            torch.stack([norm.float(), *(losses.sum().float() for _, losses in each)]).sum() for _, norm, each in steps
        ]
        bad = [not math.isfinite(value) for value in torch.stack(values).tolist()]
        if trainer.world_size > 1:  # one rank's losses may be finite, and all must stop or skip
            bad = [trainer.strategy.reduce_boolean_decision(each, all=False) for each in bad]
        first = next((step for step, is_bad in zip(steps, bad, strict=True) if is_bad), None)
        return None if first is None else (first[0], float(first[1]), first[2])

    def _report(self, trainer: L.Trainer, step: int, norm: float, losses: list[tuple[Any, Tensor]]) -> str:
        data, rows = trainer.datamodule, []
        for ids, values in losses:
            found = zip(data.rows_of(ids.tolist()), values.tolist(), strict=True)
            rows += [row | {"loss": loss} for row, loss in found]
        bad = [row for row in rows if not math.isfinite(row["loss"])]
        for row in bad:
            row["loss"] = str(row["loss"])  # JSON has no NaN
        path = Path(trainer.default_root_dir) / "non_finite.json"
        again = f"{resume_command(trainer)} --trainer.log_every_n_steps 1"
        content = {"step": step, "gradient_norm": str(norm), "again": again, "source": data.source, "rows": rows}
        if trainer.is_global_zero:
            write_json(path, content)
        which = f"of row {', '.join(str(row['row']) for row in bad[:5])} of {data.source}" if bad else "gradient"
        said = (
            f"step {step} has a {'loss' if bad else ''} {which} that is not finite (gradient norm {norm:.3g}; "
            f"{len(bad)} of its {len(rows)} rows)"
        )
        if self.action == "skip":
            print(f"warning: {said}: left out; {path}", file=sys.stderr)
        return (
            f"{said}: rows, texts and losses are in {path}. Look at these rows, lower the learning rate, set "
            f"trainer.gradient_clip_val or a wider model.dtype, or leave such steps out (--non_finite.action skip). To "
            f"see it again: {again}"
        )


class OutOfMemory(Callback):
    """Says with numbers what to change where the memory was not enough."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self._batch = batch.count, batch.rows.tokens, batch.unit

    on_validation_batch_start = on_train_batch_start

    def on_train_epoch_end(self, *_: Any) -> None:
        self.__dict__.pop("_batch", None)  # what follows is no micro-batch

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not is_out_of_memory(exception) or not hasattr(self, "_batch"):
            return
        rows, tokens, unit = self._batch
        data, now = trainer.datamodule, trainer.accumulate_grad_batches
        most = data.batch_size // trainer.world_size
        advice = []
        if trainer.validating or trainer.sanity_checking:
            advice.append(f"data.eval_batch_size 1 (now {data.eval_batch_size})")
        elif now < most:
            advice.append(f"trainer.accumulate_grad_batches {min(2 * now, most)} (now {now}, at most {most})")
        if pl_module.activation_checkpointing is not True:
            advice.append(f"model.activation_checkpointing true (now {pl_module.activation_checkpointing})")
        longest = data.encoding["max_length"]
        advice.append(f"data.max_length {longest // 2} (now {longest})")
        advice.append("model.optimizer bitsandbytes.optim.PagedAdamW8bit")
        exception.add_note(
            f"out of memory: a micro-batch of {rows} {unit} with {tokens} tokens took more than the "
            f"{peak_memory_gb(pl_module.device):.1f} GB reached. What to change, the first alone may do: "
            f"{'; '.join(advice)}"
        )


OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of running out of memory: of the CPU, the driver (`torch.AcceleratorError`), cuBLAS (`RuntimeError`)."""


def is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in OUT_OF_MEMORY)
