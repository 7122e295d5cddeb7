"""`fit`, `validate`, `predict` and `test`: Lightning's CLI with a folder for each run."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_modules.callbacks.checkpoint import LastCheckpoint
from lightning_modules.callbacks.faults import NonFinite
from lightning_modules.callbacks.progress import StepBar
from lightning_modules.callbacks.run_files import RunConfig, run_callbacks
from mixdpo.errors import InputError
from mixdpo.options import HELP, Parser
from mixdpo.storage.shipped import find_configs


class RunCLI(LightningCLI):
    """Lightning's CLI with one folder a run: config.yaml, metrics.csv, the data's plan, checkpoints/, adapter/."""

    made: Path | None = None  # the run folder, if this process made one

    def __init__(self, *arguments: Any, **options: Any) -> None:
        try:
            super().__init__(*arguments, **options)
        finally:
            kept = ("metrics.csv", "checkpoints", "adapter", "non_finite.json")
            if self.made is not None and not any((self.made / name).exists() for name in kept):
                shutil.rmtree(self.made, ignore_errors=True)  # nothing was trained

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        named = "The run's folder is RUNS/NAME, or NAME-2, … if that exists; predict and test write files RUNS/NAME.…"
        parser.add_argument("--name", type=str | int | float, default="run", help=named)
        parser.add_argument("--runs", type=str, default="runs", help="Where the folders of runs are.")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(NonFinite, "non_finite")
        parser.link_arguments("model.init_args.base", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        keep_typed(config, " ".join(sys.argv).split(" --"))
        if config.trainer.default_root_dir is not None:
            raise InputError("trainer.default_root_dir: give --runs and --name instead, the run's folder is RUNS/NAME")
        if config.ckpt_path:
            check_checkpoint(config.ckpt_path)

    def before_instantiate_classes(self) -> None:
        config, writes = self.config[self.subcommand], self.subcommand in ("predict", "test")
        options = config.model.init_args
        if writes != ("output" in options) or (self.subcommand == "test" and "signal" in options):
            kinds = "configs/signals predict, configs/evaluation predict and test, other configs fit and validate"
            raise InputError(f"{config.model.class_path} does not {self.subcommand}: {kinds}")
        if writes:
            suffix = ".margins" if "signal" in options else ""
            options.output = options.output or str(Path(config.runs) / f"{config.name}{suffix}")
        if self.subcommand == "predict":
            config.return_predictions = False  # they are in the file
        config.weights_only = True  # never unpickle what a checkpoint may hold besides tensors

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        if self.subcommand == "fit":
            config = self.config[self.subcommand]
            if (folder := folder_of_first_process()) is None:
                folder = self.made = new_run_folder(Path(config.runs), str(config.name))
            options["default_root_dir"] = str(folder)
            if (own := self.config_init.fit.trainer.logger) is not False:
                ours = [kind(str(folder), name="", version="") for kind in (CSVLogger, TensorBoardLogger)]
                beside = [ours[0], *(own if isinstance(own, list) else [own])]  # the user's own, and metrics.csv only
                options["logger"] = ours if own in (None, True) else beside
        else:
            options["logger"] = False
        given = self.config_init[self.subcommand].trainer
        own = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks] * bool(given.callbacks)
        if given.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in own):
            options["callbacks"] = [StepBar(), *own]
        try:
            return super().instantiate_trainer(**options)
        except ValueError as error:
            raise InputError(f"trainer: {error}; {HELP}") from error

    def after_fit(self) -> None:
        """A run killed after its last step may lack the files that follow: without a step, Lightning calls no hook."""
        # the plan is written as training starts
        if not Path(self.trainer.default_root_dir, self.datamodule.summary_file).exists():
            print("the run of ckpt_path is complete: nothing is trained, the files after the last step are made anew")
            self.model.to(self.trainer.strategy.root_device)
            for name in ("on_train_start", "on_train_end"):
                for callback in self.trainer.callbacks:
                    getattr(callback, name)(self.trainer, self.model)


def keep_typed(config: Any, typed: list[str]) -> None:
    """Of two options that exclude each other, one on the command line replaces the other one of a config."""
    shares = {"data.init_args.routing": "hard_fraction", "model.init_args.cleaning.selection": "keep_ratio"}
    for group, share in shares.items():
        names, title = ("threshold", share), group.rpartition(".")[2]
        # no slash: a path may have these names
        is_typed = [any(re.match(rf"(model|data)[^/]*\b{title}\b[^/]*\b{n}\b", word) for word in typed) for n in names]
        if None not in [config.get(f"{group}.{name}") for name in names] and is_typed[0] != is_typed[1]:
            config[f"{group}.{names[is_typed[0]]}"] = None


def check_checkpoint(path: str) -> None:
    """
    Raises:
        InputError: the file is no checkpoint of a run.
    """
    try:
        torch.load(path, weights_only=True, mmap=True, map_location="cpu")["adapters"]
    except Exception as error:  # of pickle, zipfile and torch: an open list
        reason = f"is no checkpoint of a run, or is damaged ({type(error).__name__})"
        raise InputError(f"ckpt_path {path} {reason}: give a run's RUNS/NAME/checkpoints/last.ckpt") from error


def folder_of_first_process() -> Path | None:
    """The run folder, in a process that Lightning has started for a further device of a run. Every other process
    ignores an inherited MIXDPO_RUN_FOLDER.

    Raises:
        InputError: torchrun started the process, and would give each process a folder of its own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("torchrun is not supported: leave it out, and give --trainer.devices")
    folder = os.environ.pop("MIXDPO_RUN_FOLDER", "")  # of one call of `start` only
    return Path(folder) if folder and os.environ.get("LOCAL_RANK", "0") != "0" else None


def new_run_folder(runs: Path, name: str) -> Path:
    """Make RUNS/NAME, or the first free NAME-2, NAME-3, …: no run is ever overwritten.

    Raises:
        InputError: the folder cannot be made.
    """
    if not name.strip("./"):
        raise InputError(f"--name {name!r} names no folder: give a name, such as run")
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except OSError as error:
            if not os.path.lexists(folder):
                raise InputError(f"cannot write {folder}: {error.strerror}. Give another --runs") from None
    os.environ["MIXDPO_RUN_FOLDER"] = str(folder)
    return folder


def start(arguments: list[str], kind: Callable[..., RunCLI] = RunCLI) -> RunCLI:
    """Parse, build and run; `--config X` means `fit --config X`."""
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["fit", *arguments]
    arguments = find_configs(arguments)
    sys.argv[1:] = arguments  # Lightning starts further processes with these words
    return kind(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        trainer_defaults={
            "callbacks": [each for each in run_callbacks() if not isinstance(each, LastCheckpoint | NonFinite)],
            "enable_model_summary": False,  # it counts packed 4-bit weights as parameters
        },
        parser_class=type("RunParser", (Parser, LightningArgumentParser), {}),
        parser_kwargs={"exit_on_error": False},
        save_config_kwargs={"save_to_log_dir": False},
        save_config_callback=RunConfig if arguments[:1] == ["fit"] else None,
    )
