"""Command lines and config files of run.py: what is given besides (or instead of) a config that works."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_cli import options

from bad_input.case import Place, parts

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


def pairs(change: Callable[[str], Any]) -> Callable[[Place], tuple[str, ...]]:
    def given(place: Place) -> tuple[str, ...]:
        return ("--data.source", place.write("bad.jsonl", change(Path(place.shared.pairs).read_text())))

    return given


def held_out(place: Place) -> tuple[str, ...]:
    """The prompts of the training pairs but for white space."""
    rows = [json.loads(line) for line in Path(place.shared.pairs).read_text().splitlines()]
    return ("--data.validation", place.write("held.jsonl", [row | {"prompt": f"{row['prompt']}\n"} for row in rows]))


def prompts(place: Place) -> tuple[str, ...]:
    rows = [{"prompt": "red tea", "constraints": [{"kind": "rhymes", "params": {}}]}]
    path = place.write("prompts.jsonl", rows)
    return callback("lightning_modules.callbacks.GoldEvaluation", prompts=path, max_new_tokens=2)


def chosen(start: str, rows: int) -> Callable[[str], str]:
    """Another start of the chosen responses of the first rows."""
    return lambda text: text.replace('"chosen": "', f'"chosen": "{start}', rows)


DEMO, RATING = ("--config", "configs/demo.yaml"), ("--config", "configs/signals/rating.yaml")
TWICE = "data: {init_args: {max_length: 32}}\ntrainer: {max_steps: 1}\ndata: {init_args: {batch_size: 2}}\n"
COMET = ("--trainer.logger=CometLogger", "--trainer.logger.project=x")
ELSEWHERE = ("--trainer.default_root_dir", "elsewhere")
GOLD = callback("lightning_modules.callbacks.GoldEvaluation")
EMPTY = '{"prompt": "red", "chosen": "", "rejected": "tea", "pair_id": "e"}\n'


def run(entrance: str, fault: str, given: Arguments, says: str, whole: bool = False) -> Run:
    return Run(entrance, fault, given, parts(says), whole)


RUNS = [
    run("config file", "not there", ("--config", "/no/config.yaml"), "/no/config.yaml"),
    run("config file", "a folder", ("--config", "configs"), "configs"),
    run("config file", "no YAML", config("model: [1\nb: ]"), "bad.yaml is no … YAML … line 2 … correct it"),
    run("config file", "a section twice", config(TWICE), "the key 'data' stands twice, in line 1 and again, line 3"),
    run("config file", "a misspelt option", config("data: {init_args: {batchsize: 2}}"), f"batchsize … {HELP}"),
    run("command line", "nothing", (), "subcommand … fit,validate", whole=True),
    run("command line", "a misspelt command", ("trian", *DEMO), "trian", whole=True),
    run("command line", "a misspelt option", ("--data.batchsize", "2"), f"batchsize … {HELP}"),
    run("command line", "a word for a number", ("--data.batch_size", "many"), f"batch_size … many … {HELP}"),
    run("model.preference_loss", "no such class", ("--model.preference_loss", "no.Loss"), f"no.Loss … {HELP}"),
    run("model", "for predict only", RATING, "does not fit … signals predict"),
    run("model", "for fit only", ("predict", *DEMO), "does not predict … configs/signals", whole=True),
    run("data.source", "not there", ("--data.source", "/no/pairs.jsonl"), "/no/pairs.jsonl … Check the path"),
    run("data.validation", "the training pairs", held_out, "have a prompt that is trained on … give another"),
    run("trainer.callbacks", "no such class", callback("no.Callback"), f"no.Callback … {HELP}"),
    run("GoldEvaluation", "an unknown constraint", prompts, "red tea … 'rhymes' … kind must be one of"),
    run("GoldEvaluation", "no template", ("--data.chat_template", "plain", *GOLD), "needs a chat template"),
    run("seed_everything", "-1", ("--seed_everything", "-1"), "-1 is not in bounds"),
    run("model.optimizer", "a negative rate", ("--model.optimizer.lr=-1",), "Invalid learning rate: -1"),
    run("model.optimizer", "a decay of -1", ("--model.optimizer.weight_decay=-1",), "Invalid weight_decay value: -1"),
    run("trainer.logger", "its package is missing", COMET, "comet-ml … pip install"),
    run("trainer.accelerator", "its package is missing", ("--trainer.accelerator", "tpu"), "torch_xla"),
    run("trainer.default_root_dir", "elsewhere", ELSEWHERE, "give --runs and --name instead"),
    run("trainer.accelerator", "unknown", ("--trainer.accelerator", "abacus"), "abacus"),
    run("runs", "a file", lambda place: ("--runs", place.write("file", "")), "file/tiny: Not a … Give another --runs"),
]

BORNE = [
    run("data.source", "a response longer than max_length", pairs(chosen("tea " * 80, 1)), "1 truncated"),
    run("data.source", "an end token in a text", pairs(chosen("<|im_end|> ", 2)), "2 special tokens in text"),
    run("data.source", "an empty response", pairs(lambda text: text + EMPTY), "1 empty completion"),
]
