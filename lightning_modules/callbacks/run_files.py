"""Files that a run writes around its steps: its options, the plan of the data, the adapter."""

from pathlib import Path

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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, plan = trainer.datamodule, pl_module.plan_summary()  # every process takes part in the plan
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / data.summary_file, data.summary() | plan)
            trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            if order := getattr(data, "order_of_training", None):
                write_csv(Path(trainer.default_root_dir) / ORDER, *order())
            print(f"policy: {trainable / 1e6:.2f}M trainable parameters; run folder: {trainer.default_root_dir}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = load_best(trainer, pl_module)
        from mixdpo.model.export import save_adapter  # imports PEFT, which a parser need not wait for

        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            save_adapter(pl_module.model, folder / "adapter")
            rate = next(c for c in trainer.callbacks if isinstance(c, Throughput)).mean_rows_per_second
            facts = {"optimizer steps": str(trainer.global_step), "pairs or samples per second": f"{rate:.2f}"}
            facts["peak memory, GB"] = f"{peak_memory_gb(trainer.strategy.root_device):.1f}"
            if best is not None:  # the last validation was of another policy
                score = f"{best.monitor} {float(best.best_model_score):.4f}, {best.best_model_path}"
                facts["adapter/ holds the best checkpoint"] = f"{score}; the held-out rows above are of the last policy"
            gold = next((c.rows for c in trainer.callbacks if isinstance(c, GoldEvaluation)), {})
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            print(write_results(folder, gold, metrics, facts))
            page_of_fit(folder)
