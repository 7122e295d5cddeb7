"""`run.py` as a user meets it: what a run leaves behind, and how a mistake ends."""

import csv
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_pairs, write_pairs
from safetensors import SafetensorError

import run
from datamodules.preference import PreferenceDataModule
from mixdpo.__main__ import main

ROOT = Path(__file__).parents[1]
METRICS = [
    *("train/loss", "train/preference_loss", "train/sft_loss", "train/hard_fraction"),
    *("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
    *("log_probs/chosen", "log_probs/rejected", "displacement/chosen", "lr_mass/preference", "lr_mass/sft"),
    *("tokens_per_second", "memory/peak_gb"),
]
pytestmark = pytest.mark.filterwarnings(
    # Lightning 2.6 calls what jsonargparse 4.53 has renamed
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)


def options(model: str, source: str, runs: Path) -> list[str]:
    """14 training and 2 validation pairs in 7 steps, the last two of hard pairs only."""
    return [
        *("--model.base", model, "--model.quantization", "none", "--model.optimizer.lr", "3e-4"),
        *("--data.source", source, "--data.routing.hard_fraction", "0.3"),
        *("--data.validation", "0.25", "--data.batch_size", "2", "--data.max_length", "64"),
        *("--data.max_prompt_length", "32", "--trainer.accumulate_grad_batches", "1", "--trainer.callbacks", "null"),
        *(
            "--trainer.log_every_n_steps",
            "1",
            "--trainer.enable_progress_bar",
            "false",
            "--runs",
            str(runs),
            "--name",
            "tiny",
        ),
    ]


def in_process(*arguments: str) -> int:
    """`python run.py ARGUMENTS` without its half minute of imports; the exit status, messages on this stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["run.py", *arguments])
        try:
            run.run()
        except SystemExit as exit:
            if isinstance(exit.code, str):  # what the interpreter does with a message
                print(exit.code, file=sys.stderr)
                return 1
            return exit.code or 0
    return 0


def in_shell(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "error: " not in done.stdout
    return done.returncode, done.stderr


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(16))


@pytest.fixture(scope="module")
def finished(tiny_model: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended well."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    assert in_process("--config", "configs/demo.yaml", *options(tiny_model, source, runs)) == 0
    assert [folder.name for folder in runs.iterdir()] == ["tiny"]
    return runs / "tiny"


@pytest.fixture
def refused(
    tiny_model: str, source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run with a mistake among the options; the one message, after a look at all that a mistake must not do."""

    def check(*mistake: str, through: str = "process") -> str:
        arguments = ["--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path / "runs"), *mistake]
        if through == "shell":
            status, errors = in_shell(*arguments)
        else:
            status = in_process(*arguments)
            captured = capfd.readouterr()
            errors = captured.err
            assert "error: " not in captured.out
        assert status not in (0, None)
        assert "Traceback" not in errors
        messages = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(messages) == errors.count("error: ") == 1, errors
        message = errors[errors.index("error: ") :].strip()
        assert errors.count(message[7:67]) == 1, f"said twice: {errors}"
        assert len(message) < 1000, message
        assert not list((tmp_path / "runs").rglob("*")), "something half-written is left"
        return message

    yield check


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_logger_of_ones_own_moves_no_file(tiny_model: str, source: str, tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs"), "name": "", "version": "v"}}
    command = ["--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path / "runs")]
    for name in ("tiny", "tiny-2"):
        assert in_process(*command, "--trainer.logger", json.dumps(logger), "--trainer.max_steps", "1") == 0
        assert (tmp_path / "runs" / name / "config.yaml").is_file()
    assert not (tmp_path / "logs" / "v" / "config.yaml").exists()


def test_the_folder_of_runs_has_one_option(refused: Callable[..., str]) -> None:
    assert "give --runs and --name instead" in refused("--trainer.default_root_dir", "elsewhere")


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "")]
)
def test_a_disk_that_fills_up_is_no_traceback(
    error: Exception, tiny_model: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While adapter/ is written, which can be done again from the checkpoint."""

    def full(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_modules.callbacks.run_files.save_adapter", full)
        assert in_process("--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path / "runs")) == 1
    said = capsys.readouterr().err
    assert "error: cannot write the run's files: No space left on device. Free some space" in said
    assert "continue with:" in said and (tmp_path / "runs/tiny/checkpoints/last.ckpt").is_file()


def test_a_source_that_is_not_there(refused: Callable[..., str]) -> None:
    assert "/nonexistent" in refused("--data.source", "/nonexistent", through="shell")


def test_a_misspelt_option(refused: Callable[..., str]) -> None:
    assert "betta" in refused("--model.preference_loss.betta", "1")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The options of a command line over configs/demo.yaml as they are parsed, or the message that refuses them. A
    dict among the arguments stands for a config file."""
    found: list[Any] = []

    def stop(self: run.RunCLI) -> None:
        found.append(self.config[self.config.subcommand])
        raise SystemExit(0)

    monkeypatch.setattr(run.RunCLI, "instantiate_classes", stop)

    def parse(*arguments: Any, base: tuple[str, ...] = ("--config", "configs/demo.yaml")) -> Any:
        words = list(base)
        for number, argument in enumerate(arguments):
            if isinstance(argument, dict):
                path = tmp_path / f"{number}.yaml"
                path.write_text(yaml.safe_dump(argument))
                words += ["--config", str(path)]
            else:
                words.append(argument)
        status = in_process(*words)
        errors = capfd.readouterr().err
        if not status:
            return found[-1]
        assert "Traceback" not in errors and errors.count("error: ") == 1
        return errors[errors.index("error: ") :].strip()

    return parse


LOSS = "mixdpo.losses.DPO"
MISSPELT: list[tuple[Any, ...]] = [
    ("trainer.max_steps", "--trainer.max_stepz", "3"),
    ("trainer.max_steps", "--trainer.max_step", "3"),  # an abbreviation is none
    ("seed_everything", "--seed_every", "3"),
    ("config", "--confi", "configs/demo.yaml"),
    ("model", "--modle.base", "x"),
    ("lora.rank", "--model.lora.rnak", "3"),
    ("beta", "--model.preference_loss.betta", "1"),
    ("batch_size", "--data.bach_size=2"),
    ("batch_size", "--data.batch", "2"),
    ("routing.threshold", "--data.routing.treshold", "1"),
    ("routing.threshold", "--data.routing", "{treshold: 1}"),
    ("checkpoint.every_n_steps", "--checkpoint.every_n_stps", "3"),
    ("monitor", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitr=train/loss"),
    ("model", {"modle": {"base": "x"}}),
    ("trainer.max_steps", {"trainer": {"max_stepz": 3}}),
    ("lora.rank", {"model": {"init_args": {"lora": {"rnak": 3}}}}),
    ("init_args", {"model": {"int_args": {"base": "x"}}}),
    ("beta", {"model": {"init_args": {"preference_loss": {"class_path": LOSS, "init_args": {"btea": 1}}}}}),
    ("DPO", "--model.preference_loss", "mixdpo.losses.DPOO"),
    ("mixdpo.losses.DPO", "--model.preference_loss", "DPOO"),
    ("lightning_modules.preference.PreferenceModule", "--model", "PreferenceModul"),
    ("mixdpo", "--model.schedule", "mixdp.schedules.Cosine"),
    ("losses", "--model.preference_loss", "mixdpo.loses.DPO"),
    ("mixdpo", "--model.preference_loss", "mixdppo.losses.DPO"),
    ("PreferenceModule", "--model", "lightning_modules.preference.PreferenceModul"),
    ("StagedLinear", "--model.schedule", "mixdpo.routing.schedules.StagdLinear"),
    ("Random", "--model.cleaning", "{scorer: mixdpo.token_cleaning.scorers.Randm}"),
    ("RefreshReference", "--trainer.callbacks+=lightning_modules.callbacks.clean_tokens.RefreshRefrence"),
    ("EarlyStopping", "--trainer.callbacks+=EarlyStoping"),
    ("easy_to_hard", "--data.routing.order", "easy_to_hrad"),
    ("nf4", "--model.quantization", "nf5"),
    ("truncate", "--data.overlong", "truncat"),
    ("sdpa", "--model.attention", "sdp"),
    ("bf16-mixed", "--trainer.precision", "bf16-mixd"),
]


@pytest.mark.parametrize(("meant", "given"), [(meant, given) for meant, *given in MISSPELT], ids=lambda v: str(v))
def test_the_nearest_name(meant: str, given: list[Any], parsed: Callable[..., Any]) -> None:
    said = parsed(*given)
    assert isinstance(said, str) and f"; did you mean '{meant}'?" in said and said.count("did you mean") == 1
    assert "\n" not in said


def test_the_nearest_verb(parsed: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    for word, meant in (("fitt", "fit"), ("validat", "validate"), ("predcit", "predict")):
        assert f"not '{word}'; did you mean '{meant}'?" in parsed(base=(word, "--config", "configs/demo.yaml"))
    for verb, meant in (("exprt", "export"), ("export_labels", "export-labels"), ("studdy", "study")):
        assert main([verb]) == 2 and f"did you mean '{meant}'?" in capfd.readouterr().err
    for wrong, meant in (("losses.BetaDPOO", "BetaDPO"), ("loses.BetaDPO", "losses")):
        assert main(["options", f"mixdpo.{wrong}"]) == 2 and f"did you mean '{meant}'?" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["make-pairs", "--max_new_token", "3"])  # an abbreviation
    assert "did you mean 'max_new_tokens'?" in capfd.readouterr().err


NULL = "needs a value, not null"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--model.lora", "null"), f"lora: should be a mapping|lora {NULL}"),
        (("--model.preference_loss", "null"), f"preference_loss {NULL}"),
        (("--model.optimizer", "null"), f"optimizer {NULL}"),
        (("--data.batch_size", "null"), f"batch_size {NULL}"),
        (("--data.routing", "{order: null}"), f"routing.order {NULL}"),
        (({"model": {"init_args": {"lora": None}}},), f"lora {NULL}"),
        (({"name": None},), f"name {NULL}"),
        (({"name": True},), "name needs a value, .*text in quotes"),
        (({"checkpoint": 3},), "checkpoint: should be a mapping of options, not 3"),
        (({"runs": 3},), "runs: Expected a <class 'str'>, not 3"),
    ],
)
def test_values_of_the_wrong_kind(given: tuple[Any, ...], says: str, parsed: Callable[..., Any]) -> None:
    said = parsed(*given)
    assert isinstance(said, str) and re.search(says, said), said


class Own:
    """A preference loss whose option has no type that takes null."""

    def __init__(self, scale: float = None, mode: "str" = None) -> None:  # type: ignore[assignment]  # noqa: RUF013
        self.scale, self.mode = scale, mode

    def __call__(self, *log_probs: Any) -> Any: ...


def test_what_may_be_null_or_a_number(parsed: Callable[..., Any]) -> None:
    """A number as name is text; null goes where a type or a default has it, in one's own class as well."""
    for number, name in ((12, "12"), (1.5, "1.5"), ("007", "007")):
        assert str(parsed({"name": number}).name) == name
    assert parsed("--name", "12").name == "12" and parsed("--name", "null").name == "null"
    for option in ("trainer.callbacks", "model.cleaning", "data.limit", "data.validation_threshold"):
        parsed_options = parsed(f"--{option}", "null")
        section, name = option.split(".")
        given = parsed_options[section] if section == "trainer" else parsed_options[section].init_args
        assert given[name] is None
    own = parsed("--model.preference_loss", f"{{class_path: {Own.__module__}.Own, init_args: {{scale: null}}}}")
    assert own.model.init_args.preference_loss.init_args.scale is None


def test_a_package_that_is_missing(refused: Callable[..., str]) -> None:
    """Lightning knows these loggers; nothing of MixDPO needs their packages."""
    said = refused("--trainer.logger=CometLogger", "--trainer.logger.project=x")
    assert "comet-ml" in said and "pip install" in said and "\n" not in said
    assert "torch_xla" in refused("--trainer.accelerator", "tpu")


SCORER = "mixdpo.token_cleaning.scorers.Random"
HARD = {"data": {"init_args": {"routing": {"hard_fraction": 0.2}}}}
OVER = {"data": {"init_args": {"routing": {"threshold": 1.5}}}}
BOTH = {"data": {"init_args": {"routing": {"threshold": 1.5, "hard_fraction": 0.2}}}}


@pytest.mark.parametrize(
    ("given", "threshold", "fraction"),
    [
        ((), None, 0.37),  # configs/demo.yaml's
        (("--data.routing.threshold", "0.5"), 0.5, None),
        (("--data.routing.threshold=0.5",), 0.5, None),
        (("--data.init_args.routing.threshold", "0.5"), 0.5, None),
        (("--data.routing", "{threshold: 0.5, order: shuffled}"), 0.5, None),
        (("--data", "{init_args: {routing: {threshold: 0.5}}}"), 0.5, None),
        (("--data.routing.hard_fraction", "0.3"), None, 0.3),
        (("--data.routing.order", "shuffled"), None, 0.37),
        ((OVER,), 1.5, None),
        (({"data": {"routing": {"threshold": 1.5}}},), 1.5, None),
        ((OVER, HARD), None, 0.2),
        ((OVER, "--data.routing.hard_fraction", "0.1"), None, 0.1),
        ((OVER, "--data.routing.threshold", "0.5"), 0.5, None),
        ((BOTH, "--data.routing.hard_fraction", "0.1"), None, 0.1),
        (("--data.routing.hard_fraction", "0.1", OVER), 1.5, None),
        ((BOTH,), 1.5, 0.2),  # Routing refuses them
        (("--data.routing.threshold", "0.5", "--data.routing.hard_fraction", "0.1"), 0.5, 0.1),
        ((OVER, "--config", json.dumps(HARD)), None, 0.2),
    ],
)
def test_the_later_place_decides_who_is_hard(
    given: tuple[Any, ...], threshold: float | None, fraction: float | None, parsed: Callable[..., Any]
) -> None:
    routing = parsed(*given).data.init_args.routing
    assert (routing.threshold, routing.hard_fraction) == (threshold, fraction)


@pytest.mark.parametrize("option", ["--data.routing", "--data.routing=", "--data"])
def test_a_group_of_options_in_a_file_is_a_place_too(option: str, parsed: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "group.yaml"
    group = {"hard_fraction": 0.3}
    path.write_text(yaml.safe_dump({"init_args": {"routing": group}} if option == "--data" else group))
    given = [option, str(path)] if option[-1] != "=" else [option + str(path)]
    routing = parsed(OVER, *given).data.init_args.routing
    assert (routing.threshold, routing.hard_fraction) == (None, 0.3)


def test_a_value_that_looks_like_a_date(parsed: Callable[..., Any]) -> None:
    assert parsed("--name", "2026-30-11").name == "2026-30-11"


def test_what_is_required_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["judge"])
    assert "arguments are required: responses, baseline, model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (("EarlyStopping", "monitor=val/loss"), "cannot monitor 'val/loss' in this run; did you mean 'val/"),
        (("ModelCheckpoint", "monitor=eval_loss"), "cannot monitor 'eval_loss' in this run"),
        (("EarlyStopping", "monitor=step"), "cannot monitor 'step' in this run"),
    ],
)
def test_a_metric_that_will_not_exist(callback: tuple[str, str], expected: str, refused: Callable[..., str]) -> None:
    """As a user gives it: what run.py adds to a run is no class of the user's own."""
    name, monitor = callback
    assert expected in refused(f"--trainer.callbacks+={name}", f"--trainer.callbacks.{monitor}")


class OwnPairs(PreferenceDataModule):
    """Whose routing is a word."""

    def __init__(self, source: str, tokenizer: str, routing: str = "by length") -> None: ...


def test_ones_own_routing_may_be_something_else(parsed: Callable[..., Any]) -> None:
    own = {"class_path": f"{OwnPairs.__module__}.OwnPairs", "init_args": {"source": "x", "routing": "by date"}}
    arguments = ["--model", "lightning_modules.preference.PreferenceModule", "--model.base", "x", {"data": own}]
    assert parsed(*arguments, base=()).data.init_args.routing == "by date"


def test_the_later_place_decides_which_tokens_are_kept(parsed: Callable[..., Any], tmp_path: Path) -> None:
    def kept(*given: Any) -> tuple[Any, Any]:
        selection = parsed(*given).model.init_args.cleaning.selection
        return selection.keep_ratio, selection.threshold

    ratio, cut = (
        {"model": {"init_args": {"cleaning": {"scorer": SCORER, "selection": selection}}}}
        for selection in ({"keep_ratio": 0.4}, {"threshold": 0.0})
    )
    assert kept(cut) == kept(ratio, cut) == kept(ratio, "--model.cleaning.selection.threshold", "0") == (None, 0.0)
    assert kept(ratio) == kept(cut, ratio) == kept(cut, "--model.cleaning.selection.keep_ratio=0.4") == (0.4, None)
    assert parsed(ratio, cut, "--model.cleaning", "null").model.init_args.cleaning is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"rejected": None}, ["row 2", "'rejected'"]), ({"margin": "high"}, ["row 2", "margin", "'high'"])],
    ids=["no rejected", "a margin in words"],
)
def test_a_bad_row(
    change: dict[str, str | None], expected: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = make_pairs(16)
    rows[1] = {name: value for name, value in (rows[1] | change).items() if value is not None}
    path = write_pairs(tmp_path / "bad.jsonl", rows)
    message = refused("--data.source", path)
    assert path in message and all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model.base", "/nonexistent/model"),
        ("--model.preference_loss.beta", "-1"),
        ("--data.routing.hard_fraction", "2"),
        ("--trainer.max_stepz", "2"),
        ("--trainer.max_steps", "2.5"),
        ("--data.routing.order", "easiest"),
        ("--model.preference_loss", "mixdpo.losses.Nothing"),
        ("--config", "/nonexistent.yaml"),
    ],
)
def test_a_bad_value(option: str, value: str, refused: Callable[..., str]) -> None:
    message = refused(option, value)
    named = option.rsplit(".")[-1] if value in ("-1", "2") else value
    assert named in message and "Parser key" not in message


@pytest.mark.parametrize("where", ["below a file", "a file", "/proc/x"])
def test_runs_that_cannot_be_written(where: str, refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a file\n")
    runs = {"below a file": f"{file}/runs", "a file": str(file)}.get(where, where)
    message = refused("--runs", runs)
    assert runs in message and "--runs" in message
    assert file.read_text() == "a file\n" and not Path("/proc/x").exists()


def test_held_out_prompts_that_are_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    """A mistake that shows only after the model is loaded."""
    callback = {"class_path": "lightning_modules.callbacks.GoldEvaluation", "init_args": {"prompts": "/no.jsonl"}}
    assert "/no.jsonl" in refused("--trainer.callbacks", json.dumps([callback]))


def test_what_is_refused_once_the_plan_is_made(refused: Callable[..., str]) -> None:
    cleaning = "{scorer: mixdpo.token_cleaning.scorers.Random, selection: {always_keep: [nothing]}}"
    assert "no token 'nothing'" in refused("--model.cleaning", cleaning)


def test_options_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "mixdpo.losses.BetaDPO"]) == 0
    printed = capsys.readouterr().out
    assert "sensitivity: float | None = None" in printed and "how much β follows" in printed
    for wrong in ("mixdpo.losses.Nothing", "nothing", "mixdpo.losses.check_options"):
        assert main(["options", wrong]) == 2 and wrong in capsys.readouterr().err


def test_a_run_leaves_its_files(finished: Path) -> None:
    files = contents(finished)
    assert {
        *("config.yaml", "metrics.csv", "route.json", "checkpoints/last.ckpt"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    } <= set(files)
    assert not [name for name in files if Path(name).name.startswith(".")]
    assert sum(name.startswith("events.out.tfevents.") for name in files) == 1
    route = json.loads((finished / "route.json").read_text())
    assert route["pairs"] + route["counts"]["validation"]["pairs"] == 16
    assert route["hard"] == round(0.3 * route["pairs"])
    assert sum(route["planned_lr_mass"].values()) == pytest.approx(1)


def test_the_metrics_have_the_names_of_the_design(finished: Path) -> None:
    with (finished / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(METRICS) <= set(rows[0])
    assert all(any(row[name] for row in rows) for name in METRICS)
    hard = [row for row in rows if row["train/hard_fraction"] and float(row["train/hard_fraction"]) == 1]
    easy = [row for row in rows if row["train/hard_fraction"] and float(row["train/hard_fraction"]) == 0]
    assert len(easy) >= 4 and len(hard) >= 2
    pairwise = [name for name in METRICS if name.startswith(("rewards/", "log_probs/", "displacement/"))]
    for row in hard:
        assert not any(row[name] for name in [*pairwise, "train/preference_loss"])
        assert row["train/sft_loss"] == row["train/loss"]
    for row in easy:
        assert all(row[name] for name in pairwise) and not row["train/sft_loss"]
        assert row["train/preference_loss"] == row["train/loss"]
    assert float(easy[0]["train/loss"]) == pytest.approx(0.6931472, abs=1e-6)
    assert float(hard[-1]["lr_mass/sft"]) + float(hard[-1]["lr_mass/preference"]) == pytest.approx(1)
    assert any(row["val/all/rewards/accuracy"] for row in rows)


def test_its_config_repeats_it_under_another_name(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """config.yaml holds every option; a second run of one name leaves the first alone and trains the same adapter."""
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-4
    said = {"threshold": None, "hard_fraction": 0.3, "order": "easy_to_hard"}
    assert said.items() <= config["data"]["init_args"]["routing"].items()
    before = contents(finished)
    assert in_process("--config", str(finished / "config.yaml")) == 0
    second = finished.with_name("tiny-2")
    assert str(second) in capfd.readouterr().out
    assert contents(finished) == before
    assert {name for name in contents(second) if "tfevents" not in name} == {n for n in before if "tfevents" not in n}
    for name in ("config.yaml", "route.json", "adapter/adapter_model.safetensors"):
        assert contents(second)[name] == before[name], name


def test_validate(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The checkpoint gives what the run itself found at its end, and validating makes no run folder."""
    folders = sorted(finished.parent.iterdir())
    config, checkpoint = str(finished / "config.yaml"), str(finished / "checkpoints" / "last.ckpt")
    before = contents(finished)
    assert in_process("validate", "--config", config, "--ckpt_path", checkpoint) == 0
    printed = capfd.readouterr().out
    assert "val/all/rewards/accuracy" in printed
    with (finished / "metrics.csv").open(newline="") as file:
        (found,) = [row for row in csv.DictReader(file) if row["val/all/sft_loss"]]
    assert found["val/all/sft_loss"][:8] in printed
    assert sorted(finished.parent.iterdir()) == folders and contents(finished) == before


def test_resume(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stopped after 3 of 7 steps and continued with --ckpt_path, in a folder of its own."""
    config, runs = str(finished / "config.yaml"), ["--runs", str(tmp_path), "--model.schedule_steps", "7"]
    assert in_process("--config", config, *runs, "--trainer.max_steps", "3") == 0
    checkpoint = tmp_path / "tiny" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    assert in_process("--config", config, *runs, "--ckpt_path", str(checkpoint)) == 0
    assert torch.load(tmp_path / "tiny-2" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7


def test_a_continuation_that_is_refused_is_not_advised(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, config = finished / "checkpoints" / "last.ckpt", finished / "config.yaml"
    command = ["--config", str(config), "--runs", str(tmp_path), "--ckpt_path", str(checkpoint)]
    assert in_process(*command, "--model.lora.rank", "3") == 1
    said = capfd.readouterr().err
    assert "another run" in said and "continue with" not in said


def test_a_run_of_its_own_each_time(
    tiny_model: str, source: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls of `main` in a process that has inherited the folder of an earlier run."""
    monkeypatch.setenv("MIXDPO_RUN_FOLDER", str(finished))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.chdir(ROOT)
    before = contents(finished)
    short = ["--trainer.max_steps", "1", "--data.validation", "0"]
    arguments = ["--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path), *short]
    for folder in ("tiny", "tiny-2"):
        assert run.main(arguments).trainer.default_root_dir == str(tmp_path / folder)
        assert (tmp_path / folder / "adapter" / "adapter_model.safetensors").is_file()
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("environment", "takes"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, False),  # the process that has started the others, in its next run
        ({"LOCAL_RANK": "1"}, True),
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, False),
    ],
    ids=str,
)
def test_the_folder_of_another_process_is_for_those_that_it_has_started(
    environment: dict[str, str], takes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (environment | {"MIXDPO_RUN_FOLDER": "earlier"}).items():
        monkeypatch.setenv(name, value)
    first = run.new_run_folder(tmp_path, "tiny")
    assert first == (Path("earlier") if takes else tmp_path / "tiny")
    if "TORCHELASTIC_RUN_ID" not in environment:  # where a name must be free
        assert run.new_run_folder(tmp_path, "other") == (tmp_path / "other")


def test_a_mistake_removes_no_folder_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_made", tmp_path)  # by an earlier call; what it holds is nothing of a run's
    (tmp_path / "kept").touch()
    assert in_process("--config", "no.yaml") == 1
    assert (tmp_path / "kept").exists()


@pytest.mark.slow
def test_sigterm_prints_the_command_that_continues(
    tiny_model: str, source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real process, stopped after its first checkpoint; the printed command ends the run."""
    every_step = ["--trainer.max_epochs", "20", "--checkpoint.every_n_steps", "1"]
    arguments = ["--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path), *every_step]
    command = [sys.executable, "run.py", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        checkpoint = tmp_path / "tiny" / "checkpoints" / "last.ckpt"
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said and "error:" not in said
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < 140
    _, script, *words = shlex.split(said.strip().splitlines()[-1])
    assert script == "run.py" and in_process(*words) == 0
    assert torch.load(tmp_path / "tiny-2" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 140


@pytest.mark.parametrize("ends", ["max_steps 3", "max_epochs 1"])
def test_the_end_of_a_run_can_be_done_again(
    ends: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that had made all its steps, and died before it was validated and wrote the adapter."""
    option, value = ends.split()
    config, runs = str(finished / "config.yaml"), ["--runs", str(tmp_path), f"--trainer.{option}", value]
    cleaning = ["--model.cleaning", "{scorer: {class_path: mixdpo.token_cleaning.scorers.Random}}"]
    runs += [*cleaning, "--data.routing", "{hard_fraction: 0.3, order: interleaved}"]
    assert in_process("--config", config, *runs) == 0
    adapter = tmp_path / "tiny" / "adapter" / "adapter_model.safetensors"
    again = ["--ckpt_path", str(tmp_path / "tiny" / "checkpoints" / "last.ckpt")]
    assert in_process("--config", config, *runs, *again) == 0
    assert ("nothing is trained" in capfd.readouterr().out) == (option == "max_steps")
    assert (tmp_path / "tiny-2" / "adapter" / adapter.name).read_bytes() == adapter.read_bytes()
    validated = []
    for name in ("tiny", "tiny-2"):
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            validated += [row["val/all/sft_loss"] for row in csv.DictReader(file) if row["val/all/sft_loss"]]
    assert len(validated) == 2 and len(set(validated)) == 1
    cleaned = [(tmp_path / name / "cleaning" / "weights.npy").read_bytes() for name in ("tiny", "tiny-2")]
    assert cleaned[0] == cleaned[1] and (tmp_path / "tiny-2" / "cleaning" / "stages.json").stat().st_size > 500


def test_the_numbers_that_were_not_finite_are_kept(
    tiny_model: str, source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is left of the run: no row was logged yet, and there is no checkpoint."""
    monkeypatch.setattr("test_faults.BadOnce.calls", 0)
    loss = ["--model.preference_loss", "test_faults.BadOnce", "--trainer.log_every_n_steps", "7"]
    arguments = ["--config", "configs/demo.yaml", *options(tiny_model, source, tmp_path), *loss]
    assert in_process(*arguments, "--trainer.max_steps", "4") == 1
    assert str(tmp_path / "tiny" / "non_finite.json") in capfd.readouterr().err
    assert {"non_finite.json", "config.yaml"} <= {path.name for path in (tmp_path / "tiny").iterdir()}


def test_pairs_without_margins(tiny_model: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    """DPO in random order needs none; a route by margin says what can be done."""
    rows = [{name: value for name, value in row.items() if name != "margin"} for row in make_pairs(16)]
    unrated = write_pairs(tmp_path / "unrated.jsonl", rows)
    dpo = ["--config", "configs/demo.yaml", *options(tiny_model, unrated, tmp_path / "dpo")]
    dpo += ["--data.routing", "{hard_fraction: 0, order: shuffled}", "--trainer.max_steps", "2"]
    dpo += ["--data.validation_threshold", "null"]
    assert in_process(*dpo) == 0
    route = json.loads((tmp_path / "dpo" / "tiny" / "route.json").read_text())
    assert route["hard"] == 0 and route["threshold"] is None and route["margin_quantiles"] == {}
    sft = [*dpo, "--name", "sft", "--data.routing", "{hard_fraction: 1, order: shuffled}"]
    assert in_process(*sft) == 0  # where all are on one route, those held out are reported as on it
    for name, kind, other in (("tiny", "easy", "hard"), ("sft", "hard", "easy")):
        with (tmp_path / "dpo" / name / "metrics.csv").open(newline="") as file:
            logged = list(csv.DictReader(file))
        assert any(row.get(f"val/{kind}/sft_loss") for row in logged), name
        assert not any(row.get(f"val/{other}/sft_loss") for row in logged), name
    assert "configs/controls/dpo.yaml" in refused("--data.source", unrated)
    threshold = ["--data.routing", "{hard_fraction: 0, order: shuffled}", "--data.validation_threshold", "0.5"]
    assert "no column to take the margin from" in refused("--data.source", unrated, *threshold)


def test_a_held_out_prompt_that_is_trained_on_but_for_white_space(tmp_path: Path, refused: Callable[..., str]) -> None:
    row = make_pairs(16)[3]
    held_out = write_pairs(tmp_path / "held_out.jsonl", [row | {"prompt": f"{row['prompt']}\n"}])
    assert "have a prompt that is trained on" in refused("--data.validation", held_out)


def test_every_error_of_ours_is_explained() -> None:
    from mixdpo import errors

    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 4
    for name in classes:
        assert f"`{name}`" in page, name
    modules = [
        path for folder in ("mixdpo", "lightning_modules", "datamodules") for path in (ROOT / folder).rglob("*.py")
    ]
    others = {path for path in modules if re.search(r"^class \w+\(.*(Error|Exception)\):", path.read_text(), re.M)}
    inside_the_judge = {ROOT / "mixdpo" / "evaluation" / name for name in ("endpoint.py", "judge_prompt.py")}
    assert others - inside_the_judge == {ROOT / "mixdpo" / "errors.py"}  # nowhere else are there any that a user sees
