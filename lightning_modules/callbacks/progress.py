"""The progress bar: optimizer steps of those that will be made, and the losses of the last logged row."""

import io
import sys
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

SHOWN = ("train/loss", "train/preference_loss", "train/sft_loss", "cleaning/kept_fraction")


class StepBar(TQDMProgressBar):
    """Counts optimizer steps. Shows only numbers that the host has already, those of the last logged row: Lightning's
    bars fetch their numbers from the device, and so wait for the device. Without a terminal a run prints about a line
    for 5 % of its steps and nothing in validation, and other bars print their beginning and end."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else sys.maxsize)
        self.train_progress_bar = tqdm(disable=True)  # until training starts

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        return {name.split("/")[1]: pl_module.logged[name] for name in SHOWN if name in pl_module.logged}

    def print(self, *values: Any, sep: str = " ", **options: Any) -> None:
        tqdm.write(sep.join(map(str, values)), **options)  # Lightning's own is silent where there is no bar yet

    def init_validation_tqdm(self) -> Any:
        return super().init_validation_tqdm() if sys.stdout.isatty() else tqdm(disable=True)

    init_sanity_tqdm = init_validation_tqdm

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        plan, made, hidden = trainer.datamodule.step_plan(), trainer.global_step, not sys.stdout.isatty()
        how: dict[str, Any] = {"file": io.StringIO(), "mininterval": float("inf")} if hidden else {"file": sys.stdout}
        bar = tqdm(total=len(plan), initial=made, unit="step", disable=self.is_disabled, dynamic_ncols=True, **how)
        self.train_progress_bar, self._stage_starts = bar, plan.stage_starts

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Show the steps made. The row of the last one is logged after this callback's `on_train_batch_end`."""
        bar, step, stages = self.train_progress_bar, trainer.global_step, len(self._stage_starts)
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        if stages > 1:
            stage = sum(start < max(step, 1) for start in self._stage_starts)
            bar.set_description(f"stage {stage}/{stages}", refresh=False)
        before, _ = bar.n, bar.update(step - bar.n)
        if 20 * bar.n // bar.total > 20 * before // bar.total and not sys.stdout.isatty():
            print(bar, flush=True)

    on_train_epoch_end = on_train_batch_start

    def on_train_epoch_start(self, *_: Any) -> None:
        """The bar is the run's, not the epoch's."""

    on_train_batch_end = on_train_epoch_start
    on_exception = TQDMProgressBar.on_train_end
