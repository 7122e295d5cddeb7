"""Files that a run writes around its steps: its options, the plan of the data, the adapter."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from lightning_modules.callbacks.best_checkpoint import load_best
from lightning_modules.callbacks.gold_evaluation import GoldEvaluation
from lightning_modules.callbacks.logging import Throughput, peak_memory_gb
from mixdpo.evaluation.fit_results import ORDER, write_results
from mixdpo.evaluation.report import page_of_fit
from mixdpo.storage.files import write_csv, write_json


class RunConfig(SaveConfigCallback):
    """Writes config.yaml to the run's folder, whatever loggers there are."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class RunFiles(Callback):
    """Writes the plan of the data (route.json or plan.json; of pairs order.csv too) before training, and after training
    the policy as a PEFT folder `adapter/`: the last policy, or the best one where a ModelCheckpoint monitors a metric.
    Prints the table that the run ends with, and writes it to results.json, results.md and the page report.html."""

    _best: Any = None  # the ModelCheckpoint whose best policy is in adapter/

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, plan = trainer.datamodule, pl_module.plan_summary()  # every process takes part in the plan
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / data.summary_file, data.summary() | plan)
            trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            if order := getattr(data, "order_of_training", None):
                write_csv(Path(trainer.default_root_dir) / ORDER, *order())
            print(f"policy: {trainable / 1e6:.2f}M trainable parameters of {pl_module.base}")
            folder = trainer.default_root_dir
            print(f"run folder: {folder}; to follow it: tensorboard --logdir {folder}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if best := load_best(trainer, pl_module):
            print(f"adapter/ holds the best {best.monitor}, {float(best.best_model_score):.4f}: {best.best_model_path}")
        self._best = best
        from mixdpo.model.export import save_adapter  # imports PEFT, which a parser need not wait for

        if trainer.is_global_zero:
            save_adapter(pl_module.model, Path(trainer.default_root_dir) / "adapter")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what other callbacks have found at the end of training."""
        folder, best = Path(trainer.default_root_dir), self._best
        if not (trainer.is_global_zero and (folder / "adapter").exists()):
            return
        facts = {f"of the best {best.monitor}": f"{best.best_model_score:.4f}"} if best is not None else {}
        facts |= {"optimizer steps": str(trainer.global_step)}
        for each in trainer.callbacks:
            if isinstance(each, Throughput):
                facts["pairs or samples per second"] = f"{each.mean_rows_per_second:.2f}"
        facts["peak memory, GB"] = f"{peak_memory_gb(trainer.strategy.root_device):.1f}"
        gold = next((each.rows for each in trainer.callbacks if isinstance(each, GoldEvaluation)), {})
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # of the best policy there was no validation
        print(write_results(folder, gold, {} if best is not None else metrics, facts, trainer.loggers))
        page_of_fit(folder)
