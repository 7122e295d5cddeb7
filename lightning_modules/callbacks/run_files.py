"""Files that a run writes around its steps: its options, the plan of the data, the adapter."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from lightning_modules.callbacks.best_checkpoint import load_best
from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory
from lightning_modules.callbacks.logging import Throughput, peak_memory_gb
from mixdpo.evaluation.fit_results import ORDER, ORDER_COLUMNS, show_on, write_results
from mixdpo.evaluation.report import report
from mixdpo.storage.files import write_csv, write_json


def run_callbacks(**checkpoint: int) -> list[Callback]:
    """The callbacks of `run.py`, for a trainer of one's own: the files of a run in the trainer's `default_root_dir`,
    exact resume from its checkpoints/last.ckpt, rows of speed and memory, and messages about faults.

    Args:
        checkpoint: options of `LastCheckpoint`: every_n_steps.
    """
    return [RunFiles(), ExactResume(), Throughput(), OutOfMemory(), LastCheckpoint(**checkpoint), NonFinite()]


class RunConfig(SaveConfigCallback):
    """Writes config.yaml to the run's folder, whatever loggers there are."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class RunFiles(Callback):
    """Writes the plan of the data (route.json or plan.json; of pairs order.csv too) before training. After training it
    writes the policy as a PEFT folder `adapter/`: the last policy, or the best one where a ModelCheckpoint monitors a
    metric. It prints the table that the run ends with, which results.json and results.md hold. Model card, tokenizer
    and report.html come last. GoldEvaluation stands before it in the list of callbacks, as the command line has it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, plan = trainer.datamodule, pl_module.plan_summary()  # every process takes part in the plan
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            write_json(folder / data.summary_file, data.summary() | plan)
            if order := getattr(data, "order_of_training", None):
                write_csv(folder / ORDER, ORDER_COLUMNS, order())
            count = sum(p.numel() for p in pl_module.parameters() if p.requires_grad) / 1e6
            print(f"policy: {count:.2f}M trainable parameters of {pl_module.base}, on {pl_module.device}")
            follow = f"; to follow it: tensorboard --logdir {folder}"
            print(f"run folder: {folder}{follow * ('TensorBoardLogger' in str(trainer.loggers))}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = load_best(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        # these import PEFT, which a parser need not wait for
        from lightning_modules.callbacks.gold_evaluation import GoldEvaluation
        from mixdpo.model.export import Trained, save_adapter
        from mixdpo.pages.model_card import describe

        folder, facts, metrics = Path(trainer.default_root_dir), {}, trainer.callback_metrics
        if best is not None:  # the last validation was of another policy
            facts, metrics = {f"of the best {best.monitor}": f"{best.best_model_score:.4f}"}, {}
        facts |= {"optimizer steps": str(trainer.global_step)}
        for each in trainer.callbacks:
            if isinstance(each, Throughput) and each.mean_rows_per_second > 0:  # not NaN, where no step was made
                facts["pairs or samples per second"] = f"{each.mean_rows_per_second:.2f}"
        facts["peak memory, GB"] = f"{peak_memory_gb(trainer.strategy.root_device):.1f}"
        gold = next((each.rows for each in trainer.callbacks if isinstance(each, GoldEvaluation)), {})
        save_adapter(pl_module.model, folder / "adapter")
        print(write_results(folder, gold, {name: float(value) for name, value in metrics.items()}, facts))
        encoding = trainer.datamodule.encoding
        trained = Trained(pl_module.base, None, {}, encoding["chat_template"], encoding["chat_template_kwargs"])
        attempt("model card", lambda: describe(folder / "adapter", trained.tokenizer()[0], folder))
        attempt("histograms", lambda: show_on(trainer.loggers, folder, trainer.global_step))
        attempt("report.html", lambda: report([str(folder)]))


def attempt(what: str, action: Callable[[], None]) -> None:
    """Do what is no part of the run. Of whatever kind a failure is, it is one line: the run is trained and written."""
    try:
        action()
    except Exception as error:
        print(f"warning: no {what} ({type(error).__name__}: {error})")
