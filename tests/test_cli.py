"""The command line as a user meets it: what a run leaves behind, and how a mistake ends."""

import csv
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import make_pairs, write_pairs

from lightning_modules import cli
from lightning_modules.callbacks.checkpoint import resume_command
from lightning_modules.verbs import run_cli
from mixdpo.__main__ import RUN_VERBS, VERBS, main
from mixdpo.errors import InputError

SOURCE_ROWS = make_pairs(16)
ROOT = Path(__file__).parents[1]
METRICS = [
    *("train/loss", "train/preference_loss", "train/sft_loss", "train/hard_fraction"),
    *("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
    *("log_probs/chosen", "log_probs/rejected", "displacement/chosen", "lr_mass/preference", "lr_mass/sft"),
    *("tokens_per_second", "memory/peak_gb"),
]


def options(model: str, source: str, runs: Path) -> list[str]:
    """14 training and 2 validation pairs in 7 steps, the last two of hard pairs only."""
    words = f"""--model.base {model} --model.quantization none --model.optimizer.lr 3e-4 --data.source {source}
        --data.routing.hard_fraction 0.3 --data.validation 0.25 --data.batch_size 2 --data.max_length 64
        --data.max_prompt_length 32 --trainer.accumulate_grad_batches 1 --trainer.callbacks null
        --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false --runs {runs} --name tiny"""
    return words.split()


def in_process(*arguments: str) -> int:
    """`python run.py ARGUMENTS` without its half minute of imports; the exit status, messages on this stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["run.py", *arguments])
        try:
            cli.run()
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


def message_of(status: int, errors: str) -> str:
    """The one message of what was refused, from exit status and stderr."""
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert status and "Traceback" not in errors and len(messages) == 1, errors
    return errors[errors.index("error: ") :].strip()


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last_step(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def demo(tiny_model: str, source: str) -> Callable[[Path], list[str]]:
    """Arguments of a run that works, by the folder of runs."""
    return lambda runs: ["--config", "configs/demo.yaml", *options(tiny_model, source, runs)]


@pytest.fixture(scope="module")
def finished(demo: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended well."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    assert in_process(*demo(runs)) == 0
    assert [folder.name for folder in runs.iterdir()] == ["tiny"]
    return runs / "tiny"


@pytest.fixture
def refused(demo: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run with a mistake among the options; the one message, after a look at all that a mistake must not do."""

    def check(*mistake: str) -> str:
        status = in_process(*demo(tmp_path / "runs"), *mistake)
        captured = capfd.readouterr()
        message = message_of(status, captured.err)
        assert "error: " not in captured.out and len(message) < 1000, message
        assert captured.err.count(message[7:67]) == 1, f"said twice: {captured.err}"
        assert not list((tmp_path / "runs").rglob("*")), "something half-written is left"
        return message

    return check


@pytest.fixture(scope="module")
def shared_parser() -> dict[str, Any]:
    return {}


@pytest.fixture
def parsed(shared_parser, monkeypatch, capfd) -> Callable[..., Any]:
    """The options of a command line over configs/demo.yaml as they are parsed, or the message that refuses them."""
    configs: list[Any] = []
    set_up = run_cli.RunCLI.setup_parser

    def set_up_once(self: run_cli.RunCLI, *arguments: Any, **options: Any) -> None:
        if not shared_parser:
            before = {*vars(self)}
            set_up(self, *arguments, **options)
            shared_parser.update({name: value for name, value in vars(self).items() if name not in before})
        vars(self).update(shared_parser)

    def stop(self: run_cli.RunCLI) -> None:
        configs.append(self.config[self.config.subcommand])
        raise SystemExit(0)

    monkeypatch.setattr(run_cli.RunCLI, "setup_parser", set_up_once)
    monkeypatch.setattr(run_cli.RunCLI, "instantiate_classes", stop)

    def parse(*arguments: Any, base: tuple[str, ...] = ("--config", "configs/demo.yaml")) -> Any:
        status = in_process(*base, *words_of(arguments))
        errors = capfd.readouterr().err
        return message_of(status, errors) if status else configs[-1]

    return parse


def words_of(arguments: tuple[Any, ...]) -> list[str]:
    """The command line of arguments, of which a dict stands for a config."""
    configs = (["--config", json.dumps(each)] if isinstance(each, dict) else [each] for each in arguments)
    return [word for words in configs for word in words]


LOSS = "mixdpo.losses.DPO"


OF_LOSS = {"class_path": LOSS, "init_args": {"btea": 1}}
MISSPELT: list[tuple[Any, ...]] = [
    ("routing.threshold", "--data.routing", "{treshold: 1}"),
    ("beta", {"model": {"init_args": {"preference_loss": OF_LOSS}}}),
    ("mixdpo.routing.Cosine", {"model": {"init_args": {"schedule": {"class_path": "mixdpo.schedules.Cosine"}}}}),
]


@pytest.mark.parametrize(("meant", "given"), [(meant, given) for meant, *given in MISSPELT], ids=lambda v: str(v))
def test_the_nearest_name_by_the_parser(meant: str, given: list[Any], parsed: Callable[..., Any]) -> None:
    """What a first look, which test_first_look.py is of, lets through."""
    message = parsed(*given)
    assert f"; did you mean '{meant}'?" in message and message.count("did you mean") == 1 and "\n" not in message


def test_verbs(parsed: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "not 'fitt'; did you mean 'fit'?" in parsed(base=("fitt", "--config", "configs/demo.yaml"))
    for verb, meant in (("exprt", "export"), ("export_labels", "export-labels"), ("predcit", "predict")):
        assert cli.main([verb]) == 2 and f"did you mean '{meant}'?" in capfd.readouterr().err
    assert main(["options", "mixdpo.loses.DPO"]) == 2 and f"did you mean '{LOSS}'?" in capfd.readouterr().err
    assert main(["make-pairs", "--max_new_token", "3"]) == 2  # an abbreviation
    assert "did you mean 'max_new_tokens'?" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["judge"])
    assert "arguments are required: " in capfd.readouterr().err
    assert main(["fit"]) == 2 and "type python run.py fit, or mixdpo fit" in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["mixdpo"])
    run: Any = SimpleNamespace(default_root_dir=str(tmp_path), ckpt_path=None)
    assert resume_command(run) == "the same script in another folder"
    (tmp_path / "config.yaml").touch()
    assert resume_command(run) == f"mixdpo fit --config {tmp_path}/config.yaml"
    with pytest.raises(SystemExit, match=r"error: .*did you mean 'config'"):
        cli.main(["fit", "--confi", "x"])


def test_mixdpo_lists_all_verbs_without_loading_anything() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    entry = setup["options.entry_points"]["console_scripts"].split("=")[1].strip()
    assert resolve_name(entry) is cli.main
    code = "import sys, lightning_modules.cli as c; c.main(['-h']); print({*sys.modules} & {'torch', 'lightning'})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.endswith("set()\n")
    assert all(re.search(rf"^  {verb} +\w", printed, re.MULTILINE) for verb in (*RUN_VERBS, *VERBS))


def test_values_of_the_wrong_kind(parsed: Callable[..., Any]) -> None:
    for key, given in (
        ("preference_loss", ["--model.preference_loss", "null"]),
        ("routing.order", ["--data.routing", "{order: null}"]),
        ("lora", [{"model": {"init_args": {"lora": None}}}]),
        ("runs", [{"runs": 3}]),
    ):
        message = parsed(*given)
        assert isinstance(message, str) and re.search(rf"{key}(: .*, not 3 | needs a value)", message), message


def test_what_may_be_null_or_a_number(parsed: Callable[..., Any]) -> None:
    """A number or a date as name is text; null goes where a type has it."""
    for name in (12, "007", "2026-30-11"):
        assert str(parsed({"name": name}).name) == str(name)
    assert parsed("--name", "12").name == "12" and parsed("--name", "null").name == "null"
    nulls = ("trainer.callbacks", "model.cleaning", "data.limit", "data.validation_threshold")
    given = parsed(*(word for option in nulls for word in (f"--{option}", "null")))
    for option in nulls:
        section, name = option.split(".")
        assert (given[section] if section == "trainer" else given[section].init_args)[name] is None


def test_an_option_replaces_the_one_of_a_config_that_excludes_it(parsed: Callable[..., Any], tmp_path: Path) -> None:
    """configs/demo.yaml has a hard_fraction."""
    over, cut, named = (tmp_path / name for name in ("over.yaml", "cut.yaml", "routing/threshold.yaml"))
    over.write_text("data: {init_args: {routing: {hard_fraction: null, threshold: 1.5}}}")
    named.parent.mkdir()
    named.write_text("data: {init_args: {routing: {threshold: 1.5}}}")
    cut.write_text("model: {init_args: {cleaning: {selection: {keep_ratio: 0.4}}}}")
    random = ("--model.cleaning.scorer", "mixdpo.token_cleaning.scorers.Random", "--config", str(cut))
    for given, kept in (
        (("--data.routing.threshold", "0.5"), (0.5, None)),
        (("--data.init_args.routing.threshold=0.5",), (0.5, None)),
        (("--data.routing", "{order: shuffled, threshold: -0.5}"), (-0.5, None)),
        (("--data.routing.order", "shuffled", "--data.validation_threshold", "0.5"), (None, 0.37)),
        (("--config", str(over), "--data.routing.hard_fraction=0.1"), (None, 0.1)),
        (("--config", str(over), "--data.routing={hard_fraction: null}"), (1.5, None)),
        # Routing refuses both; the folder's name is no option
        (("--data.routing.threshold", "0.5", "--data.routing.hard_fraction", "0.1"), (0.5, 0.1)),
        (("--config", str(named)), (1.5, 0.37)),
    ):
        routing = parsed(*given).data.init_args.routing
        assert (routing.threshold, routing.hard_fraction) == kept, given
    selection = parsed(*random, "--model.cleaning.selection.threshold", "0").model.init_args.cleaning.selection
    assert (selection.threshold, selection.keep_ratio) == (0, None)
    cut.write_text("model: {init_args: {cleaning: {selection: {threshold: 0.0}}}}")
    selection = parsed(*random, "--model.cleaning.selection.keep_ratio=0.4").model.init_args.cleaning.selection
    assert (selection.threshold, selection.keep_ratio) == (None, 0.4)


def test_who_is_hard_is_given_once(refused: Callable[..., str]) -> None:
    message = refused("--data.routing.threshold", "0.5")  # on one command line with a hard_fraction
    assert "not both (0.3 and 0.5): type --data.routing '{hard_fraction: null}' or '{threshold: null}'" in message


# Mistakes; the table in bad_input/ has more.


def test_a_disk_that_fills_up(demo, tmp_path, capsys, monkeypatch) -> None:
    """While the adapter is written, which can be done again from the checkpoint."""

    def full(*_: object) -> None:
        raise OSError(28, "")

    monkeypatch.setattr("mixdpo.model.export.save_adapter", full)
    assert in_process(*demo(tmp_path), "--trainer.max_steps", "1", "--data.validation", "0") == 1
    errors = capsys.readouterr().err
    assert "error: cannot write" in errors and "continue with:" in errors and last_step(tmp_path / "tiny") == 1


@pytest.mark.parametrize("where", ["below a file", "a link to nothing", "/proc/x"])
def test_runs_that_cannot_be_written(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file\n")
    (tmp_path / "link").symlink_to("nothing")
    runs = {"below a file": tmp_path / "file/runs", "a link to nothing": tmp_path / "link"}.get(where, Path(where))
    with pytest.raises(InputError, match=rf"{runs}/tiny: .*--runs"):
        run_cli.new_run_folder(runs, "tiny")


def test_a_run_leaves_its_files(finished: Path) -> None:
    files = contents(finished)
    of_adapter = {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")}
    assert of_adapter | {"config.yaml", "metrics.csv", "route.json", "checkpoints/last.ckpt"} <= set(files)
    assert not [name for name in files if Path(name).name.startswith(".")]
    assert sum(name.startswith("events.out.tfevents.") for name in files) == 1
    route = json.loads((finished / "route.json").read_text())
    assert route["pairs"] + route["counts"]["validation"]["pairs"] == 16
    assert route["hard"] == round(0.3 * route["pairs"])
    assert sum(route["planned_lr_mass"].values()) == pytest.approx(1)


def test_the_metrics_have_the_names_of_the_design(finished: Path) -> None:
    rows = metrics(finished)
    assert set(METRICS) <= set(rows[0])
    assert all(any(row[name] for row in rows) for name in METRICS)
    hard, easy = ([row for row in rows if row["train/hard_fraction"] == share] for share in ("1.0", "0.0"))
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
    given = {"threshold": None, "hard_fraction": 0.3, "order": "easy_to_hard"}
    assert given.items() <= config["data"]["init_args"]["routing"].items()
    before = contents(finished)
    assert in_process("--config", str(finished / "config.yaml")) == 0
    second = finished.with_name("tiny-2")
    assert str(second) in capfd.readouterr().out
    assert contents(finished) == before
    assert {name for name in contents(second) if "tfevents" not in name} == {n for n in before if "tfevents" not in n}
    for name in ("config.yaml", "route.json", "adapter/README.md", "adapter/adapter_model.safetensors"):
        assert contents(second)[name] == before[name], name


def test_validate_and_a_continuation_that_is_refused(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The checkpoint gives what the run itself found at its end; no run folder is made, no continuation advised."""
    folders, before = sorted(finished.parent.iterdir()), contents(finished)
    config, checkpoint = str(finished / "config.yaml"), str(finished / "checkpoints" / "last.ckpt")
    assert in_process("validate", "--config", config, "--ckpt_path", checkpoint) == 0
    printed = capfd.readouterr().out
    (row,) = [row for row in metrics(finished) if row["val/all/sft_loss"]]
    assert "val/all/rewards/accuracy" in printed and row["val/all/sft_loss"][:8] in printed
    assert in_process("--config", config, "--ckpt_path", checkpoint, "--model.lora.rank", "3") == 1
    errors = capfd.readouterr().err
    assert "another run" in errors and "continue with" not in errors
    assert sorted(finished.parent.iterdir()) == folders and contents(finished) == before


def test_a_run_of_its_own_each_time(demo, finished, tmp_path, monkeypatch) -> None:
    """In a process that has inherited the folder of an earlier run: a run of 3 steps, which a second one continues."""
    monkeypatch.setenv("MIXDPO_RUN_FOLDER", str(finished))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.chdir(ROOT)
    before = contents(finished)
    arguments = [*demo(tmp_path), "--data.validation", "0", "--model.schedule_steps", "8"]
    first = run_cli.start([*arguments, "--trainer.max_steps", "3"])
    second = run_cli.start([*arguments, "--ckpt_path", str(tmp_path / "tiny/checkpoints/last.ckpt")])
    assert [each.trainer.default_root_dir for each in (first, second)] == [f"{tmp_path}/tiny", f"{tmp_path}/tiny-2"]
    assert [last_step(tmp_path / name) for name in ("tiny", "tiny-2")] == [3, 8]
    assert (tmp_path / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
    assert contents(finished) == before


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_logger_of_ones_own_moves_no_file(demo: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs"), "name": "", "version": "v"}}
    for name in ("tiny", "tiny-2"):
        command = [*demo(tmp_path / "runs"), "--trainer.logger", json.dumps(logger), "--trainer.max_steps", "1"]
        assert in_process(*command, "--data.validation", "0") == 0
        assert (tmp_path / "runs" / name / "config.yaml").is_file() and "tensorboard" not in capsys.readouterr().out
    assert not (tmp_path / "logs" / "v" / "config.yaml").exists()


@pytest.mark.slow
def test_the_bar_is_ours_or_the_users_or_none(demo, tmp_path, monkeypatch) -> None:
    found: list[Any] = []
    called = "lightning.pytorch.trainer.call._call_and_handle_interrupt"  # by Trainer.fit, whose options are parsed
    monkeypatch.setattr(called, lambda trainer, *_, **__: found.append(trainer.progress_bar_callback))
    monkeypatch.setattr(run_cli.RunCLI, "after_fit", lambda _: None)
    for given in (["true"], ["true", "--trainer.callbacks+=TQDMProgressBar"], ["false"]):
        assert in_process(*demo(tmp_path / "runs"), "--trainer.enable_progress_bar", *given) == 0
    assert [type(bar).__name__ for bar in found] == ["StepBar", "TQDMProgressBar", "NoneType"]


@pytest.mark.parametrize("given", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "UNREAD"])
def test_cuda_memory_grows_in_expandable_segments(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {given: "a user's"}
    monkeypatch.setattr(cli.os, "environ", environment)
    monkeypatch.setattr(run_cli, "start", lambda _: None)
    cli.run([])
    assert environment["PYTORCH_ALLOC_CONF"] == ("expandable_segments:True" if given == "UNREAD" else "a user's")


def test_sigterm_prints_the_command_that_continues(demo: Callable[..., list[str]], tmp_path: Path) -> None:
    """A real process, stopped after its first checkpoint; the printed command ends the run."""
    arguments = [*demo(tmp_path), "--trainer.max_epochs", "20", "--checkpoint.every_n_steps", "1"]
    command = [sys.executable, "run.py", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "tiny" / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors and "error:" not in errors
    assert 0 < last_step(tmp_path / "tiny") < 140
    _, script, *words = shlex.split(errors.strip().splitlines()[-1])
    assert script == "run.py" and in_process(*words) == 0
    assert last_step(tmp_path / "tiny-2") == 140


@pytest.mark.parametrize("ends", ["max_steps 3", "max_epochs 1"])
def test_the_end_of_a_run_can_be_done_again(ends, finished, tmp_path, capfd) -> None:
    """A run that had made all its steps, and died before it was validated and wrote the adapter."""
    option, value = ends.split()
    command = ["--config", str(finished / "config.yaml"), "--runs", str(tmp_path), f"--trainer.{option}", value]
    command += ["--model.cleaning", "{scorer: {class_path: mixdpo.token_cleaning.scorers.Random}}"]
    command += ["--data.routing", "{hard_fraction: 0.3, order: interleaved}"]
    first, second = tmp_path / "tiny", tmp_path / "tiny-2"
    assert in_process(*command) == 0
    assert in_process(*command, "--ckpt_path", str(first / "checkpoints" / "last.ckpt")) == 0
    assert ("nothing is trained" in capfd.readouterr().out) == (option == "max_steps")
    for name in ("adapter/adapter_model.safetensors", "cleaning/weights.npy"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    losses = [row["val/all/sft_loss"] for run in (first, second) for row in metrics(run) if row["val/all/sft_loss"]]
    assert len(losses) == 2 and len(set(losses)) == 1
    assert (second / "cleaning" / "stages.json").stat().st_size > 500


def test_the_numbers_that_were_not_finite_are_kept(demo, tmp_path, capfd, monkeypatch) -> None:
    """Nothing else is left of the run: no row was logged yet, and there is no checkpoint."""
    monkeypatch.setattr("test_faults.BadOnce.calls", 0)
    loss = ["--model.preference_loss", "test_faults.BadOnce", "--trainer.log_every_n_steps", "7"]
    assert in_process(*demo(tmp_path), *loss, "--trainer.max_steps", "4") == 1
    assert str(tmp_path / "tiny" / "non_finite.json") in capfd.readouterr().err
    assert {"non_finite.json", "config.yaml"} <= {path.name for path in (tmp_path / "tiny").iterdir()}


def test_pairs_without_margins(demo: Callable[..., list[str]], tmp_path: Path, refused: Callable[..., str]) -> None:
    """DPO in random order needs none; a route by margin says what can be done."""
    rows = [{name: value for name, value in row.items() if name != "margin"} for row in make_pairs(16)]
    unrated = ["--data.source", write_pairs(tmp_path / "unrated.jsonl", rows)]
    dpo = [*unrated, "--data.validation_threshold", "null", "--trainer.max_steps", "2"]
    for name, share, kind, other in (("dpo", 0, "easy", "hard"), ("sft", 1, "hard", "easy")):
        # where all are on one route, those held out are reported as on it
        routing = ["--data.routing", f"{{hard_fraction: {share}, order: shuffled}}"]
        assert in_process(*demo(tmp_path / "ours"), *dpo, *routing, "--name", name) == 0
        logged = metrics(tmp_path / "ours" / name)
        assert any(row.get(f"val/{kind}/sft_loss") for row in logged), name
        assert not any(row.get(f"val/{other}/sft_loss") for row in logged), name
    route = json.loads((tmp_path / "ours" / "dpo" / "route.json").read_text())
    assert route["hard"] == 0 and route["threshold"] is None and route["margin_quantiles"] == {}
    assert "configs/controls/dpo.yaml" in refused(*unrated)
    threshold = ["--data.routing", "{hard_fraction: 0, order: shuffled}", "--data.validation_threshold", "0.5"]
    assert "no column to take the margin from" in refused(*unrated, *threshold)


def test_every_error_of_ours_is_explained() -> None:
    """On docs/troubleshooting.md; nowhere but in errors.py are there errors that a user sees."""
    from mixdpo import errors

    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 3 and all(f"`{name}`" in page for name in classes)
    modules = [path for room in ("mixdpo", "lightning_modules", "datamodules") for path in (ROOT / room).rglob("*.py")]
    others = {path for path in modules if re.search(r"^class \w+\(.*(Error|Exception)\):", path.read_text(), re.M)}
    inside = {ROOT / "mixdpo" / name for name in ("evaluation/endpoint.py", "evaluation/verdicts.py")}
    assert {path for path in others - inside if path.parent.name != "storage"} == {ROOT / "mixdpo" / "errors.py"}
