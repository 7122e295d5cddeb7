"""The first look at a command line: what it refuses and prints without torch, and all that it lets through."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import option_names
import pytest
import yaml

from mixdpo import first_look
from mixdpo.errors import InputError
from mixdpo.first_look import FirstLook
from mixdpo.storage.shipped import SHIPPED, find_configs, shipped_names

ROOT = Path(__file__).parents[1]
DEMO = "--config configs/demo.yaml "
CALLBACK = "lightning_modules.callbacks.RefreshReference"
REFUSED = {
    f"{DEMO}--model.preference_los x": "preference_loss",
    f"{DEMO}--data.routing.hard_fractoin 0.3": "routing.hard_fraction",
    f"{DEMO}--trainer.max_epoch 3": "trainer.max_epochs",
    f"{DEMO}--model.init_args.bas 3": "base",
    f"{DEMO}--modle.base x": "model",
    f"{DEMO}--model.preference_loss DPOO": "mixdpo.losses.DPO",
    f"{DEMO}--model.preference_loss mixdpo.loses.DPO --model.base x": "mixdpo.losses.DPO",
    f"{DEMO}--model PreferenceModul": "lightning_modules.preference.PreferenceModule",
    f"{DEMO}--model.preference_loss.betta 1": "beta",
    f"{DEMO}--model.optimizer.lrr 1": "lr",
    f"{DEMO}--data.overlong drp": "drop",
    f"{DEMO}--data.routing.order=easy_to_hrad": "easy_to_hard",
    f"{DEMO}--trainer.precision bf16-mixd": "bf16-mixed",
    f"{DEMO}--trainer.callbacks+=ModelCheckpoin": "ModelCheckpoint",
    f"{DEMO}--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr x": "monitor",
    "--config '{data: {class_path: datamodules.sft.SFTDataModule, init_args: {slices: {cuont: 3}}}}'": "slices.count",
    f"{DEMO}--trainer.callbacks+=lightning_modules.clean.RefreshRefrence": CALLBACK,
    f"{DEMO}--model.optimizer torch.optim.AdmW": "torch.optim.AdamW",
    f"{DEMO}--model.quantization nf5": "nf4",
    "--config '{trainer: {max_stepz: 3}}'": "trainer.max_steps",
    "fitt --config configs/demo.yaml": "fit",
    "estimate configs/demo.yaml --crad 12": "card",
    "predict --config configs/signals/ches.yaml --model.signal CHEES": "mixdpo.signals.CHES",
    "--config dpo": "controls/dpo",
    "predict -c=configs/signals/chess.yaml": "signals/ches",
    "estimate own_pair --card 12": "own_pairs",
    "mixdpo compare dmo --with dpo": "demo",
    "mixdpo exprt": "export",
    "mixdpo judge a --baselin b": "baseline",
    "mixdpo options mixdpo.losses.DPOO": "mixdpo.losses.DPO",
}
"""Command -> what was meant; by run.py, or by mixdpo."""
PASSED = [
    f"{DEMO}--model mine.Module --model.x 1 --model.preference_loss DPOO",  # options of a user's class
    f"{DEMO}--model.preference_loss mine.Loss --model.preference_loss.x 1 --trainer.strategy mine",
    f"{DEMO}--trainer.callbacks+=mine.Callback --trainer.callbacks.x 1 --trainer.callbacks+=EarlyStopping",
    f"{DEMO}--model.preference_loss mixdpo.losses.dpo.DPO --model.preference_loss.beta 1 --model.help --print_config",
    f"{DEMO}--model.activation_checkpointing 3e2 --trainer.precision 16 --model.dict_kwargs.x 1 --data.half null",
    f"{DEMO}--data.chat_template_kwargs.enable_thinking false --trainer.max_time.hours 1 --trainer.logger true",
    f"{DEMO}--model.preference_loss mixdpo.losses.preference_loss.PreferenceLoss",  # newer than the table, or not of it
    "estimate configs/demo.yaml --card 12 --lengths 1,2,3 --model.lora.rank 8",
]


def test_refused_without_torch() -> None:
    """All in one process, by the entry points that users call."""
    code = f"""if True:
        import contextlib, io, shlex, sys
        from lightning_modules import cli
        for command in {list(REFUSED)!r}:
            words, out = shlex.split(command), io.StringIO()
            try:
                with contextlib.redirect_stderr(out):
                    status = cli.main(words[1:]) if words[0] == "mixdpo" else cli.run(words)
            except SystemExit as exit:
                status = exit.code
            heavy = sorted({{"torch", "lightning", "transformers"}} & {{*sys.modules}})
            print([command, status, out.getvalue(), heavy])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for line, (command, meant) in zip(done.stdout.splitlines(), REFUSED.items(), strict=True):
        given, status, errors, loaded = ast.literal_eval(line)
        message = errors if command.startswith("mixdpo") else status
        assert (given, loaded) == (command, []) and f"; did you mean '{meant}'?" in message, line
        assert status == 2 if command.startswith("mixdpo") else message.startswith("error: "), line


def readme_commands() -> list[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = (block for page in pages for block in re.findall(r"(?ms)^```bash\n(.*?)^```", page.read_text("utf-8")))
    text = re.sub(r"\\\n *", " ", "\n".join(blocks))
    found = re.findall(r"^ *(?:python run\.py|mixdpo|python -m mixdpo) (.+?)(?:  +#.*)?$", text, re.MULTILINE)
    return [command.strip() for command in found if not re.search(r"VERB|STEPS|--help|(config|mine)\.yaml", command)]


def test_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config, the README's commands and users' own classes; without a look at the sources, but for one."""
    monkeypatch.chdir(ROOT)
    verbs = {"signals": "predict", "evaluation": "predict"}
    configs = [path for path in sorted(ROOT.glob("configs/**/*.yaml")) if path.parent.name != "studies"]
    commands = [f"{verbs.get(path.parent.name, 'fit')} --config {path}" for path in configs]
    commands += [f"{DEMO}--config {path}" for path in configs if path.parent.name not in verbs]
    assert len(readme_commands()) > 25 and len(commands) > 100
    for command in [*commands, *PASSED, *readme_commands()]:
        verb, *rest = shlex.split(command)
        FirstLook(verb, *rest) if verb[0] != "-" else FirstLook("fit", verb, *rest)


def test_the_table_is_that_of_the_real_parsers() -> None:
    assert option_names.FILE.read_text("utf-8") == option_names.text(), "run python benchmarks/option_names.py"


@pytest.mark.parametrize("given", ["--help", "fit -h", f"{DEMO}--help"])
def test_help(given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        first_look.first_look(given.split())
    printed, names = capsys.readouterr().out, FirstLook("fit", *DEMO.split())
    assert not ended.value.code and ("--data.routing.hard_fraction 0.37\n" in printed) == (DEMO in given)
    names.chosen["model.optimizer"] = names.chosen["trainer.callbacks"] = ""
    shown: list[Any] = re.findall(r"^  --(\S+) (\S+) +\w", (ROOT / "mixdpo/help.txt").read_text("utf-8"), re.MULTILINE)
    assert 18 <= len(shown) <= 25
    for name, default in shown:
        known = names._find(name, name, names.options)[1]
        expected = None if default == "required" else yaml.safe_load(default)
        assert known.get("default") == expected or name.endswith("lr")


def test_all_help_is_the_parsers() -> None:
    assert first_look.bare_config(["compare", "--config", "a", "--config", "b"]) == ["compare", "a", "--config", "b"]
    assert first_look.first_look(["estimate", "--config", "demo", "--card", "8"]) == ["estimate", "demo", "--card", "8"]
    for words in ("--help --all", f"{DEMO}--help --all", "validate --help", "estimate --help"):
        assert first_look.first_look(words.split()) == words.replace(" --all", "").split()
    with pytest.raises(InputError, match="stands twice"):
        FirstLook("fit", "--config", "{a: 1, a: 2}")


def test_shipped_configs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["fit", "-c", "demo", "--config=configs/controls/dpo.yaml", "--config", "{a: b}", "--name", "demo"]
    paths = ["--config", f"{SHIPPED}/demo.yaml", f"--config={SHIPPED}/controls/dpo.yaml", "--config", "{a: b}"]
    assert find_configs(given) == ["fit", *paths, "--name", "demo"]
    (tmp_path / "demo").mkdir()
    assert find_configs(given[:3])[2] == f"{SHIPPED}/demo.yaml"
    (tmp_path / "demo.yaml").write_text("a: b")
    for name in ("demo.yaml", "demo"):
        assert find_configs(["--config", name]) == ["--config", "demo.yaml"]  # a file here comes first
    assert "token_cleaning/paper/llama3.1_8b" in shipped_names()
