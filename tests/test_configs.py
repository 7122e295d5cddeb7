"""Every shipped YAML through the real command line, up to where training would start; and what imports what."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import adapter_weights, make_pairs, make_trainer, write_pairs

from datamodules.preference import PreferenceDataModule
from datamodules.prompts import PromptDataModule
from datamodules.sft import SFTDataModule
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.margins import MarginModule
from lightning_modules.preference import PreferenceModule
from lightning_modules.qlora import AdapterModule
from lightning_modules.responses import ResponseModule
from lightning_modules.sft import SFTModule
from lightning_modules.verbs import run_cli
from mixdpo.batches.steps import Slices
from mixdpo.losses import DPO
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Cosine, StagedCosine
from mixdpo.token_cleaning.scorers import ExcessLoss

ROOT = Path(__file__).parents[1]
SIGNALS = sorted((ROOT / "configs/signals").glob("*.yaml"))
EVALUATION = sorted((ROOT / "configs/evaluation").glob("*.yaml"))
TASKS = {"constraints", "gsm8k"}
OVERLAYS = {"controls", "signals", "studies", "evaluation", "losses"}  # laid over another config, or of another command
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in ALL if path.parent.name not in OVERLAYS and path.stem != "cpu"]
NAMES = [str(path.relative_to(ROOT)) for path in CONFIGS]
SFT = [path for path in CONFIGS if "token_cleaning" in path.parts]


def stopped(patch, folder):
    """`run.py` ends before training and before the run's folder. Weights come in `configure_model`, data in `setup`."""
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", ["run.py"])
    patch.setattr(run_cli, "new_run_folder", lambda runs, name: folder / name)
    patch.setattr(run_cli.RunCLI, "_run_subcommand", lambda self, subcommand: None)


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    """The command line for a CPU: its parser is most of the time, and is built once."""
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, tmp_path_factory.mktemp("runs"))
        return run_cli.start(["--config", "configs/demo.yaml", "--trainer.accelerator", "cpu"])


@pytest.fixture
def build(cli, monkeypatch, tmp_path):
    """`run.py --config FILE OPTIONS`, parsed and built for a CPU."""
    stopped(monkeypatch, tmp_path)
    parsers = {name: getattr(cli, name) for name in ("parser", "_subcommand_parsers")}
    monkeypatch.setattr(run_cli.RunCLI, "setup_parser", lambda self, *_, **__: vars(self).update(parsers))
    cpu = ["--trainer.accelerator", "cpu"]
    return lambda config, *options: run_cli.start([verb_of(config), "--config", str(config), *cpu, *options])


def verb_of(config: Path) -> str:
    if config in EVALUATION and config.stem in TASKS:
        return "test"
    return "predict" if config in [*SIGNALS, *EVALUATION] else "fit"


def header_overrides(config: Path) -> dict[str, list[str]]:
    """The lines `#   name: --options …` of a config's header, as arguments."""
    found = re.findall(r"^# +([\w' -]+(?: \([\w ]+\))?): +(--.+)$", config.read_text("utf-8"), flags=re.MULTILINE)
    return {name: shlex.split(options) for name, options in found}


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_config_builds(build, config):
    cli = build(config)
    assert type(cli.model) is (SFTModule if config in SFT else PreferenceModule) and cli.model.model is None
    assert type(cli.datamodule) is (SFTDataModule if config in SFT else PreferenceDataModule)
    assert not cli.datamodule.counts  # nothing was read
    assert cli.datamodule.tokenizer == cli.model.base
    assert cli.config.fit.name == config.stem
    # no filler rows: a step divides into its micro-batches
    assert cli.datamodule.batch_size % cli.trainer.accumulate_grad_batches == 0
    of_a_gpu = config.parent.name in ("mixdpo", "paper") or config.stem == "own_pairs"
    assert (cli.datamodule.micro_batch_tokens == "auto") == of_a_gpu
    assert not of_a_gpu or (cli.trainer.accumulate_grad_batches == 1 and cli.model.activation_checkpointing == "auto")
    assert cli.datamodule.encoding.get("max_prompt_length", 0) < cli.datamodule.encoding["max_length"]
    assert f"python run.py --config {config.relative_to(ROOT)}" in config.read_text("utf-8")


def test_own_pairs_on_a_cpu(build):
    """The overlay changes what its header says."""
    path = ROOT / "configs/cpu.yaml"
    changed, text = build(ROOT / "configs/own_pairs.yaml", "--config", str(path)), path.read_text("utf-8")
    assert (changed.model.loading["dtype"], changed.trainer.precision) == ("float32", "32-true")
    assert changed.datamodule.micro_batch_tokens == 4096 and changed.model.loading["quantization"] == "nf4"
    keys = [f"{a}.init_args.{b}" for a in ("model", "data") for b in yaml.safe_load(text)[a]["init_args"]]
    for key in [*keys, *(f"trainer.{name}" for name in yaml.safe_load(text)["trainer"])]:
        assert key in text


@pytest.mark.parametrize("config", [*SIGNALS, *EVALUATION], ids=lambda path: path.stem)
def test_config_of_another_verb_builds(build, config):
    cli, command = build(config), f"python run.py {verb_of(config)} --config {config.relative_to(ROOT)}"
    assert cli.model.model is None
    if config in SIGNALS:
        assert type(cli.model) is MarginModule and cli.datamodule.tokenizer == cli.model.base
        assert (cli.model.adapter is not None) == (config.stem == "implicit_reward")
        assert cli.model.output == f"runs/{config.stem}.margins" and command in config.read_text("utf-8")
    else:
        assert type(cli.model) is ResponseModule and cli.model.output == f"runs/{config.stem}"
        assert type(cli.datamodule) is PromptDataModule and not cli.datamodule.prompts
        assert hasattr(cli.datamodule.form, "score") == (config.stem in TASKS)
        assert f"{command} --model.run runs/demo" in config.read_text("utf-8")


@pytest.mark.slow
def test_header_overrides_parse(cli):
    """All that a header offers as a line of options is accepted."""
    for config in [*CONFIGS, *SIGNALS, *EVALUATION]:
        verb = verb_of(config)
        for options in header_overrides(config).values():
            assert cli.parser.parse_args([verb, "--config", str(config), *options])[verb].name


def test_baseline_overrides(build):
    """What a header offers as baselines means what its name says; headers that offer the same are built once."""
    built = set()
    for config in (path for path in CONFIGS if "DPO" in header_overrides(path) and path.name != "demo.yaml"):
        for baseline, hard_fraction in {"DPO": 0, "SFT": 1}.items():
            options = header_overrides(config)[baseline]
            assert options[options.index("--name") + 1] == f"{config.stem}-{baseline.lower()}"
            general = tuple(option.replace(config.stem, "NAME") for option in options)
            if general not in built:
                routing = build(config, *options).datamodule.routing
                assert routing == Routing(hard_fraction=hard_fraction, order="shuffled")
            built.add(general)


def test_token_cleaning_configs_mean_what_they_say(build):
    folder = ROOT / "configs/token_cleaning"
    cli = build(folder / "self_evolving.yaml")
    assert cli.model.cleaning.scorer == ExcessLoss() and cli.model.cleaning.warm_up_stages == 1
    assert cli.datamodule.slices == Slices(3) and cli.model.stage_start == "restart"
    assert [type(callback) for callback in cli.trainer.callbacks].count(RefreshReference) == 1

    def parse(name, *options):
        config = folder / f"{name}.yaml"
        parsed = cli.parser.parse_args(["fit", "--config", str(config), *options]).fit
        return parsed.model.init_args, parsed.data.init_args

    assert parse("full")[0].cleaning is None and parse("staged_full")[1].slices.count == 3
    rho = parse("rho", "--model.cleaning.reference", "somewhere/adapter")[0].cleaning
    assert vars(rho.scorer.init_args) == {"worse": "policy", "better": "cleaning_reference", "normalise": False}
    assert rho.reference == "somewhere/adapter"
    overrides = header_overrides(folder / "rho.yaml")
    history = parse("rho", *overrides["ssToken's loss term"])[0].cleaning.scorer
    assert vars(history.init_args) == {"worse": "cleaning_reference", "better": "policy", "normalise": True}
    assert parse("rho", *overrides["DFT"])[0].cleaning.selection is None
    paper, data = parse("paper/llama3.2_3b")
    assert (paper.lora.rank, paper.lora.alpha, paper.lora.dropout, data.batch_size) == (64, 16, 0.1, 48)
    for config in (folder / "paper").glob("*.yaml"):
        assert header_overrides(config).keys() == header_overrides(folder / "paper/llama3.2_3b.yaml").keys()


def test_control_overrides(build):
    paper = ROOT / "configs/mixdpo/llama3_8b.yaml"
    overrides = header_overrides(paper)
    assert build(paper, *overrides["sort only"]).datamodule.routing == Routing(hard_fraction=0)
    shuffled = Routing(threshold=0.5, hard_fraction=None, order="shuffled")
    assert build(paper, *overrides["route only"]).datamodule.routing == shuffled
    # the default that the study decided on
    assert all(build(ROOT / f"configs/{name}.yaml").model.schedule == Cosine() for name in ("demo", "own_pairs"))
    assert isinstance(of_class := AdapterModule("base").schedule, Cosine) and not isinstance(of_class, StagedCosine)
    assert build(paper).model.schedule == Cosine(warmup=0.1)
    assert build(paper, *overrides["a cosine for each stage"]).model.schedule == StagedCosine(warmup=0.1)
    for config in (ROOT / "configs/mixdpo").glob("*.yaml"):
        assert header_overrides(config) == {
            name: [option.replace(paper.stem, config.stem) for option in options] for name, options in overrides.items()
        }


def test_paper_choices_arrive(build):
    cli = build(ROOT / "configs/mixdpo/llama3_8b.yaml")
    assert cli.model.preference_loss == DPO(beta=0.01, label_smoothing=0.1)
    assert cli.datamodule.routing == Routing(threshold=0.5, hard_fraction=None)
    assert (cli.datamodule.batch_size, cli.trainer.accumulate_grad_batches, cli.trainer.max_epochs) == (160, 1, 1)
    assert cli.trainer.precision == "bf16-mixed"


def test_imports_and_help():
    """`mixdpo.losses` costs torch only; then the whole help of `run.py` and of `fit`, which need no PEFT: one process,
    because most of its time is imports."""
    code = """if True:
        import runpy, sys
        import mixdpo.losses
        print(sorted({"transformers", "peft", "datasets", "bitsandbytes"} & set(sys.modules)))
        for arguments in (["--help", "--all"], ["fit", "--help", "--all"]):
            sys.argv = ["run.py", *arguments]
            try:
                runpy.run_path("run.py", run_name="__main__")
            except SystemExit as exit:
                print("status", exit.code, "peft" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[]\n")
    assert done.stdout.count("status 0 False\n") == 2 and "--trainer.max_steps" in done.stdout


# The presets: each changes exactly what its header lists, whatever it is laid over, and trains.
CONTRARY = """
name: contrary
model: {init_args: {schedule: mixdpo.routing.Constant, easy_sft_weight: 0.25}}
data: {init_args: {margin: score, routing: {threshold: 0.4, hard_fraction: null, order: hard_to_easy, buckets: 9,
  assignment: ASSIGNMENT, hard_action: preference, blend_width: 9}}}
"""
"""Another value of every key that a preset sets."""

EXPECTED = {
    "dpo": (24, 0, 1), "dpo_sorted": (24, 0, 1), "dpo_easy_only": (21, 0, 1), "mixdpo": (24, 3, 2),
    "mixdpo_staged": (24, 3, 2),
    "mixdpo_paper_cosine": (24, 3, 2), "mixdpo_shuffled": (24, 3, 1), "mixdpo_interleaved": (24, 3, 1),
    "sft_all": (24, 24, 1), "sft_hard_only": (3, 3, 1), "sft_rejected": (24, 3, 2), "sft_both": (24, 3, 2),
    "dpo_plus_nll": (24, 0, 1), "random_to_sft": (24, 3, 2), "inverted": (24, 3, 2), "sft_then_dpo": (24, 3, 2),
    "selective_dpo": (21, 0, 1), "refresh_at_buckets": (24, 0, 3), "blend": (24, 4, 2),
    "staged_competence": (24, 0, 3), "tr_dpo": (24, 0, 1),
}  # fmt: skip
"""Of 24 pairs, 12 % of them hard: those trained, those of them by SFT, and the stages in steps of four."""


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory, cli: Any) -> Any:
    """Names of configs, one over the other -> what they say; each parsed once."""
    folder = tmp_path_factory.mktemp("contrary")
    for assignment in ("margin", "random"):
        (folder / f"contrary_{assignment}.yaml").write_text(CONTRARY.replace("ASSIGNMENT", assignment))

    @cache
    def parsed(*names: str) -> Any:
        places = [(folder if name.startswith("contrary") else ROOT / "configs") / f"{name}.yaml" for name in names]
        return cli.parser.parse_args(["fit", *(part for place in places for part in ("--config", str(place)))])

    return parsed


def control_file(name: str) -> Path:
    return ROOT / f"configs/controls/{name}.yaml"


def listed(control: Path) -> list[str]:
    """The keys of the header's `# Changes: …`."""
    found = re.search(r"^# Changes: (.+(?:\n#   .+)*)$", control.read_text("utf-8"), flags=re.MULTILINE)
    assert found, control
    return re.split(r",\s+(?:#\s+)?", found[1])


def resolved(config: Any) -> dict[str, Any]:
    """All values by key, without the `init_args` in between."""
    values = vars(config.fit.as_flat())
    return {key.replace(".init_args", ""): value for key, value in values.items() if key != "config"}


def belongs(key: str, to: str) -> bool:
    return key == to or key.startswith(f"{to}.")


def test_every_control_is_known() -> None:
    assert {path.stem for path in (ROOT / "configs/controls").glob("*")} == set(EXPECTED)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_control_changes_what_its_header_lists_and_nothing_else(name: str, parse: Any) -> None:
    """Over a base with a threshold where every listed key has another value, and over one with a hard fraction."""
    control, keys = control_file(name), listed(control_file(name))
    text = control.read_text("utf-8")
    assert f"#   python run.py --config configs/demo.yaml --config configs/controls/{name}.yaml\n" in text
    overlay = yaml.safe_load(text)["data"]["init_args"]["routing"]
    contrary = "contrary_random" if overlay.get("assignment") != "random" else "contrary_margin"
    results = []
    for bases in (("demo", contrary), ("alpaca_eval",)):
        before, after = resolved(parse(*bases)), resolved(parse(*bases, f"controls/{name}"))
        found = {key for key in before.keys() | after.keys() if before.get(key, "absent") != after.get(key, "absent")}
        assert all(any(belongs(key, to) for to in keys) for key in found), found
        if contrary in bases:
            assert all(any(belongs(key, to) for key in found) for to in keys), found
        callbacks = after.pop("trainer.callbacks") or []  # added to those of the base
        assert callbacks[: len(before["trainer.callbacks"] or [])] == (before["trainer.callbacks"] or [])
        after["added"] = callbacks[len(before["trainer.callbacks"] or []) :]
        results.append({key: after[key] for key in after if any(belongs(key, to) for to in [*keys, "added"])})
    assert results[0] == results[1], "a control means the same over any base"


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_control_trains(name: str, parse: Any, cli: Any, tiny_model: str, tmp_path: Path) -> None:
    config = parse("alpaca_eval", f"controls/{name}").clone()
    model, data = config.fit.model.init_args, config.fit.data.init_args
    model.base, model.quantization, model.lora.rank = tiny_model, "none", 4
    data.source, data.tokenizer = write_pairs(tmp_path / "pairs.jsonl", make_pairs(24)), tiny_model
    data.validation, data.batch_size, data.max_length, data.max_prompt_length = 0.0, 4, 64, 32
    if name == "selective_dpo":
        data.margins_file = None  # a margins file belongs to its model and data: the column of the rows stands in
    torch.manual_seed(0)
    built = cli.parser.instantiate_classes(config).fit
    seen: list[tuple[int, int]] = []
    route_losses = built.model.route_losses

    def watched(batch: Any, *log_probs: Any) -> Any:
        found = route_losses(batch, *log_probs)
        assert torch.isfinite(found[0]).all()
        assert (found[0] > 0).all() or not batch.count  # each pair that is trained has a loss
        seen.append((batch.count, len(batch.sft) * (batch.count > 0)))  # 21 pairs leave a step of one, and filler
        return found

    built.model.route_losses = watched
    text = control_file(name).read_text("utf-8")
    refresh = tuple(built.trainer.callbacks or ())
    assert [type(callback) for callback in refresh] == [RefreshReference] * ("callbacks+" in text)
    trainer = make_trainer(tmp_path / "run", first=refresh, accumulate_grad_batches=2)
    trainer.fit(built.model, built.data)
    trained, by_sft = (sum(counts) for counts in zip(*seen, strict=True))
    assert (trained, by_sft, len(built.data.epoch.stage_starts)) == EXPECTED[name]
    assert max(v.abs().max() for key, v in adapter_weights(built.model).items() if "lora_B" in key) > 0
