"""`python run.py --config configs/demo.yaml [--model.… --data.… --trainer.…]`: Lightning CLI, with `fit` understood."""

import errno
import logging
import os
import re
import shutil
import sys
import warnings
from argparse import ArgumentError
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory, is_out_of_memory
from lightning_modules.callbacks.logging import Throughput, ValidateAtMaxSteps
from lightning_modules.callbacks.run_files import RunConfig, RunFiles
from mixdpo.errors import InputError, NonFiniteError, OutOfSpaceError, Stopped, check_one_of, nearest
from mixdpo.options import UNKNOWN_OPTION, Parser, nearest_path
from mixdpo.storage.files import read_text

SUBCOMMANDS = ("fit", "validate", "predict", "test")
_made: Path | None = None  # the run folder, where this call of `main` made it
NAME_HELP = (
    "The run's folder is RUNS/NAME, or NAME-2, … if that exists; predict and test write RUNS/NAME.margins, or the "
    "answers' RUNS/NAME.json, .jsonl, .md."
)
# group of options -> the option in the group that cannot be given together with `threshold`
SHARES = {"data.init_args.routing": "hard_fraction", "model.init_args.cleaning.selection": "keep_ratio"}
HELP = "see run.py fit --help, --model.help CLASS, --data.help CLASS, python -m mixdpo options CLASS"
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
THIRD_PARTY_NOISE = ("`is_gradient_checkpointing`", ".*isinstance.treespec", ".*does not have many workers")


class RunCLI(LightningCLI):
    """Lightning's CLI with one folder a run: config.yaml, metrics.csv, the data's plan, checkpoints/, adapter/."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | int | float, default="run", help=NAME_HELP)
        parser.add_argument("--runs", type=str, default="runs", help="Where the folders of runs are.")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(NonFinite, "non_finite")
        parser.link_arguments("model.init_args.base", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuses what Lightning would take now and fail on later."""
        places = read_places(sys.argv[1:] if args is None else args)
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        for path, share in SHARES.items():  # two options that exclude each other: the one from the later place counts
            names, key = ("threshold", share), path.replace("init_args.", "")
            given = [[name for name in names if place.get(f"{key}.{name}") is not None] for place in places]
            latest = next((found for found in reversed(given) if found), [])
            if len(latest) == 1 and None not in [config.get(f"{path}.{name}") for name in names]:
                config[f"{path}.{'threshold' if latest == [share] else share}"] = None
        if config.trainer.default_root_dir is not None:
            raise InputError("trainer.default_root_dir: give --runs and --name instead, the run's folder is RUNS/NAME")
        if type(config.seed_everything) is int and not 0 <= config.seed_everything < 2**32:
            raise InputError(f"seed_everything must lie in [0, 2^32), not {config.seed_everything}")
        if config.ckpt_path:
            check_checkpoint(config.ckpt_path)

    def before_instantiate_classes(self) -> None:
        config, writes = self.config[self.subcommand], self.subcommand in ("predict", "test")
        options = config.model.init_args
        if writes != ("output" in options) or (self.subcommand == "test" and "signal" in options):
            raise InputError(
                f"{config.model.class_path} does not {self.subcommand}: configs/signals are for predict only, "
                "configs/evaluation for predict and test, the others for fit and validate"
            )
        if writes:
            suffix = ".margins" if "signal" in options else ""
            options.output = options.output or str(Path(config.runs) / f"{config.name}{suffix}")
        if self.subcommand == "predict":
            config.return_predictions = False  # they are in the file
        self.config[self.subcommand].weights_only = True  # never unpickle what a checkpoint may hold besides tensors

    def after_fit(self) -> None:
        """A run that had made all its max_steps may lack what follows the last one: Lightning calls no hook then."""
        if not has_begun(Path(self.trainer.default_root_dir)):
            print("the run of ckpt_path is complete: nothing is trained, only what follows the last step is done again")
            self.model.to(self.trainer.strategy.root_device)
            for name in ("on_train_start", "on_train_end"):
                for callback in self.trainer.callbacks:
                    getattr(callback, name)(self.trainer, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.subcommand == "fit":
            config = self.config[self.subcommand]
            folder = new_run_folder(Path(config.runs), str(config.name))
            kwargs["default_root_dir"] = str(folder)
            if config.trainer.logger in (None, True):
                kwargs["logger"] = [
                    logger(str(folder), name="", version="") for logger in (CSVLogger, TensorBoardLogger)
                ]
        else:
            kwargs["logger"] = False
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise InputError(f"trainer: {error}; {HELP}") from error


def read_places(arguments: list[str]) -> list[dict[str, Any]]:
    """Options by place, in order: each config is a place, and so are the options before, between and after them.

    A place is a dict such as {"data.routing.order": "shuffled"}.

    Raises:
        InputError: a config is no YAML, or no mapping. jsonargparse names an option that is wrong, but no file that is.
    """
    places: list[dict[str, Any]] = [{}]
    for word, after in pairwise([*arguments, ""]):
        option, _, value = word.partition("=") if "=" in word else (word, "", after)
        is_config, named = option in ("-c", "--config"), os.path.isfile(value)  # a value may be longer than any path
        if not option.startswith("-"):
            continue
        text = read_text(value) if named and (is_config or value.endswith((".yaml", ".yml", ".json"))) else value
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # the latter of what looks like a date
            if is_config and named:  # else jsonargparse says so
                raise InputError(f"config {value} is no YAML ({' '.join(str(error).split())}): correct it") from error
            continue
        if not is_config:
            places[-1] |= _flat({option.lstrip("-"): content})
        elif isinstance(content, dict):
            places += [_flat(content), {}]
        elif named:
            raise InputError(f"config {value} should be a mapping of options, not a {type(content).__name__}")
    return places


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name.replace(".init_args", "")[1:]: value}
    return {path: leaf for key, inner in value.items() for path, leaf in _flat(inner, f"{name}.{key}").items()}


def check_checkpoint(path: str) -> None:
    where = "give a run's RUNS/NAME/checkpoints/last.ckpt"
    if not Path(path).is_file():
        raise InputError(f"ckpt_path {path} is no file; {where}")
    try:
        held = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # of pickle, zipfile and torch: an open list
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"ckpt_path {path} is not a checkpoint of a run, or is damaged ({type(error).__name__}: {said}); {where}"
        ) from error
    if not isinstance(held, dict) or not {"adapters", "state_dict"} <= held.keys():
        raise InputError(f"ckpt_path {path} is not a checkpoint of a run (it holds no adapters); {where}")


def has_begun(folder: Path) -> bool:
    """Whether training has started there: its plan is written then."""
    return any((folder / plan).exists() for plan in ("route.json", "plan.json"))


def new_run_folder(runs: Path, name: str) -> Path:
    """Make RUNS/NAME, or the first free NAME-2, NAME-3, …: no run is ever overwritten.

    A process that Lightning has started for a further device takes the first process's folder from the environment.
    Every other process ignores an inherited MIXDPO_RUN_FOLDER. Under torchrun all processes use RUNS/NAME, so NAME must
    be free.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    first = runs / name if by_torchrun else os.environ.pop("MIXDPO_RUN_FOLDER", "")  # of one call of `main` only
    if first and os.environ.get("RANK" if by_torchrun else "LOCAL_RANK", "0") != "0":
        return Path(first)
    global _made
    if not name.strip("./"):
        raise InputError(f"--name {name!r} names no folder: give a name, such as run")
    number = 1
    while True:
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not runs.is_dir():
                raise InputError(f"runs folder {runs} is a file: give another with --runs") from None
            if by_torchrun:
                raise InputError(f"{folder} exists: under torchrun give a --name that is free") from None
            number += 1
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {folder}: {error.strerror}. Give another with --runs"
            ) from None
        else:
            os.environ["MIXDPO_RUN_FOLDER"] = str(folder)
            _made = folder
            return folder


def main(arguments: list[str] | None = None) -> RunCLI:
    """Parse, build and run; `run.py --config X` means `run.py fit --config X`."""
    global _made
    _made = None  # that of an earlier call is none of this run's
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["fit", *arguments]
    check_one_of(
        "the first word (a config file needs --config before it)",
        (arguments or ["-h"])[0],
        (*SUBCOMMANDS, "-h", "--help"),
    )
    sys.argv[1:] = arguments  # Lightning starts further processes with it
    return RunCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        trainer_defaults={"callbacks": [RunFiles(), ExactResume(), Throughput(), ValidateAtMaxSteps(), OutOfMemory()]},
        parser_class=type("RunParser", (Parser, LightningArgumentParser), {}),
        parser_kwargs={"exit_on_error": False},
        save_config_kwargs={"save_to_log_dir": False},
        save_config_callback=RunConfig if arguments[:1] == ["fit"] else None,
    )


def run() -> None:
    """`main`, with the user's mistakes as one message on stderr and exit status 1, and no empty run folder left."""
    for message in THIRD_PARTY_NOISE:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())
    # on CPUs with AVX-512 BF16 it misses a kernel that only inference would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        main()
    except Stopped as stop:
        sys.exit(128 + stop.signal)  # LastCheckpoint has said how to go on
    except Exception as error:
        if (message := _for_the_user(error)) is None:
            raise
        sys.exit(f"error: {message}")
    finally:
        kept = ("metrics.csv", "checkpoints", "adapter", "non_finite.json")
        if _made is not None and not (has_begun(_made) and any((_made / name).exists() for name in kept)):
            shutil.rmtree(_made, ignore_errors=True)  # nothing was trained


def _for_the_user(error: BaseException | None) -> str | None:
    """The message of a user's mistake; jsonargparse wraps an `InputError` of a constructor in another error."""
    while error is not None:
        if is_out_of_memory(error):
            return "\n".join(getattr(error, "__notes__", [f"out of memory: {error}"]))
        if isinstance(error, NonFiniteError | OutOfSpaceError):
            return str(error)
        rust = re.search(r"os error (\d+)", str(error))  # of safetensors, which has no number of its own
        number = getattr(error, "errno", None) or (rust and int(rust[1]))
        if number in CANNOT_WRITE:
            where = getattr(error, "filename", None) or "the run's files"
            return f"cannot write {where}: {os.strerror(number)}. Free some space, or give another folder with --runs"
        if isinstance(error, ModuleNotFoundError) and "HINT: " in str(error):  # of Lightning, about an optional package
            return f"{' '.join(str(error).split())}, or leave out the option that needs it"
        if isinstance(error, InputError | ArgumentError | MisconfigurationException):
            return _innermost(str(error))
        error = error.__cause__ or error.__context__
    return None


def _innermost(message: str) -> str:
    """The one line that matters of the many that jsonargparse prints around it."""
    if unknown := UNKNOWN_OPTION.search(message):
        return f"{unknown[0]} ({HELP})"
    _, nested, leaf = message.rpartition('Parser key "')
    if not nested:
        return message
    key, _, said = leaf.partition('":')
    said, *given = re.split(r"(?:Got|Given) value: ", said)
    value = given[0].splitlines()[0] if given else ""
    if value in ("None", "True", "False"):
        said = f"{key} needs a value, not null, true or false: give one (text in quotes), or leave the option out"
        return f"{said} ({HELP})"
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value type:")
    lines = [line for line in (each.strip(" -.") for each in said.splitlines()) if line and not line.startswith(noise)]
    meant = nearest_path(said) or nearest(value, re.findall(r"'([\w.-]+)'(?=[^][]*\])", " ".join(lines)))
    return f"{key}: {' or '.join(lines)}{value and f', not {value}'}{meant} ({HELP})"


if __name__ == "__main__":
    run()
