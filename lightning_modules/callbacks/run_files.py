"""Files that a run writes around its steps: its options, the plan of the data, the adapter."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from lightning_modules.callbacks.best_checkpoint import load_best
from mixdpo.storage.files import write_json


class RunConfig(SaveConfigCallback):
    """Writes config.yaml to the run's folder, whatever loggers there are."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class RunFiles(Callback):
    """Writes the plan of the data (route.json or plan.json) before training, and the policy as a PEFT folder
    `adapter/`, with tokenizer and model card, after training: the last policy, or the best one where a ModelCheckpoint
    monitors a metric."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, plan = trainer.datamodule, pl_module.plan_summary()  # every process takes part in the plan
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / data.summary_file, data.summary() | plan)
            trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            print(f"policy: {trainable / 1e6:.2f}M trainable parameters; run folder: {trainer.default_root_dir}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if best := load_best(trainer, pl_module):
            print(f"adapter/ holds the best {best.monitor}, {float(best.best_model_score):.4f}: {best.best_model_path}")
        from mixdpo.model.export import Trained, save_adapter  # imports PEFT, which a parser need not wait for

        if trainer.is_global_zero:
            run, encoding = Path(trainer.default_root_dir), trainer.datamodule.encoding
            trained = Trained(pl_module.base, None, {}, encoding["chat_template"], encoding["chat_template_kwargs"])
            save_adapter(pl_module.model, run / "adapter", (trained.tokenizer()[0], run))
