"""Command lines and config files of run.py: what is given besides (or instead of) a config that works."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_cli import options

from bad_input.case import Place

Arguments = tuple[str, ...] | Callable[[Place], tuple[str, ...]]
HELP = "see run.py fit --help"


@dataclass(frozen=True)
class Run:
    """A run of `run.py`; `says` are parts of the one message."""

    entrance: str
    fault: str
    given: Arguments
    says: tuple[str, ...]
    whole: bool = False

    @property
    def name(self) -> str:
        return f"run.py, {self.entrance}: {self.fault}"

    def arguments(self, place: Place) -> list[str]:
        """After those of a run that works, unless they are `whole`."""
        given = list(self.given(place) if callable(self.given) else self.given)
        base = ["--config", "configs/demo.yaml", *options(place.model, place.shared.pairs, place.folder / "runs")]
        return given if self.whole else [*base, *given]


def config(content: Any) -> Arguments:
    return lambda place: ("--config", place.write("bad.yaml", content))


def callback(name: str, **arguments: Any) -> tuple[str, ...]:
    return ("--trainer.callbacks", json.dumps([{"class_path": name, "init_args": arguments}]))


def predicted(*more: str) -> Callable[[Place], tuple[str, ...]]:
    def given(place: Place) -> tuple[str, ...]:
        where = ("--runs", str(place.folder / "runs"), "--model.base", place.model, "--data.source", place.shared.pairs)
        return ("predict", "--config", "configs/signals/rating.yaml", *where, *more)

    return given


def pairs(change: Callable[[str], Any]) -> Callable[[Place], tuple[str, ...]]:
    def given(place: Place) -> tuple[str, ...]:
        return ("--data.source", place.write("bad.jsonl", change(Path(place.shared.pairs).read_text())))

    return given


def prompts(place: Place) -> tuple[str, ...]:
    rows = [{"prompt": "red tea", "constraints": [{"kind": "rhymes", "params": {}}]}]
    path = place.write("prompts.jsonl", rows)
    return callback("lightning_modules.callbacks.GoldEvaluation", prompts=path, max_new_tokens=2)


def long_rows(text: str) -> str:
    return text.replace('"chosen": "', '"chosen": "' + "tea " * 80, 1)


SFT = ("--model", "lightning_modules.sft.SFTModule", "--model.base", "x")
RUNS = [
    Run("config file", "not there", ("--config", "/no/config.yaml"), ("/no/config.yaml",)),
    Run("config file", "a folder", ("--config", "configs"), ("configs",)),
    Run("config file", "no YAML", config("model: [1\nb: ]"), ("no valid YAML", "line 2", "correct it")),
    Run(
        "config file",
        "a section twice",
        config("data: {init_args: {max_length: 32}}\ntrainer: {max_steps: 1}\ndata: {init_args: {batch_size: 2}}\n"),
        ("the key 'data' stands twice, in line 1 and again, line 3", "correct it"),
    ),
    Run("config file", "nested deeply", config("[" * 100_000), ("nested too deeply", "line 1", "correct it")),
    Run("config file", "a misspelt option", config("data: {init_args: {batchsize: 2}}"), ("batchsize", HELP)),
    Run("command line", "nothing", (), ("subcommand", "fit,validate,test,predict"), whole=True),
    Run("command line", "a misspelt command", ("trian", "--config", "configs/demo.yaml"), ("trian",), whole=True),
    Run("command line", "a misspelt option", ("--data.batchsize", "2"), ("batchsize", HELP)),
    Run("command line", "a word for a number", ("--data.batch_size", "many"), ("batch_size", "many", HELP)),
    Run(
        "model.preference_loss",
        "no such class",
        ("--model.preference_loss", "mixdpo.losses.None"),
        ("mixdpo.losses.None", HELP),
    ),
    Run("model", "for predict only", ("--config", "configs/signals/rating.yaml"), ("does not fit", "configs/signals")),
    Run(
        "model",
        "for fit only",
        lambda place: ("predict", "--config", "configs/demo.yaml", "--data.source", place.shared.pairs),
        ("does not predict", "configs/signals"),
        whole=True,
    ),
    Run(
        "predict",
        "data.margins_file",
        predicted("--data.margins_file", "x"),
        ("data.margins_file is for fit", "model.output"),
        whole=True,
    ),
    Run("data.source", "not there", ("--data.source", "/no/pairs.jsonl"), ("/no/pairs.jsonl", "Check the path")),
    Run(
        "data.validation",
        "the training pairs",
        lambda place: ("--data.validation", place.shared.pairs),
        ("have a prompt that is trained on", "give another"),
    ),
    Run(
        "trainer.callbacks", "no such class", callback("lightning_modules.Nothing"), ("lightning_modules.Nothing", HELP)
    ),
    Run("GoldEvaluation", "an unknown constraint", prompts, ("red tea", "'rhymes'", "kind must be one of")),
    Run(
        "GoldEvaluation",
        "plain text instead of a template",
        ("--data.chat_template", "plain", *callback("lightning_modules.callbacks.GoldEvaluation")),
        ("data.chat_template is plain", "give a template"),
    ),
    Run("model.optimizer", "a negative rate", ("--model.optimizer.lr=-1",), ("Invalid learning rate: -1",)),
    Run("trainer.accelerator", "unknown", ("--trainer.accelerator", "abacus"), ("abacus",)),
    Run("runs", "a file", lambda place: ("--runs", place.write("file", "")), ("file/tiny: Not a", "another --runs")),
]

# What a run bears, and says how often.
BORNE = [
    Run("data.source", "a response longer than max_length", pairs(long_rows), ("truncated 1",)),
    Run(
        "data.source",
        "an end token in a text",
        pairs(lambda text: text.replace('"chosen": "', '"chosen": "<|im_end|> ', 2)),
        ("special_tokens_in_text 2",),
    ),
    Run(
        "data.source",
        "an empty response",
        pairs(lambda text: text + '{"prompt": "red", "chosen": "", "rejected": "tea", "pair_id": "e"}\n'),
        ("empty_completion 1",),
    ),
]
