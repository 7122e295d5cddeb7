"""The commands of README and docs, run with the real model, cut to 8 pairs and 16 new tokens by their own options.

Left out, with the reason: what needs a hub, a GPU, a judge or hours. A command of several pages runs once.
"""

import gc
import io
import json
import os
import re
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import yaml

from lightning_modules import cli
from mixdpo.data.prompts import read_prompts
from mixdpo.data.sources import open_source
from mixdpo.model.packaged import PACKAGED

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?ms)^```(bash|python|yaml)\n(?:# (\w+\.(?:py|yaml))\n)?(.*?)^```")
OURS = re.compile(r"(?:echo .* \| )?(python run\.py|python -m mixdpo|mixdpo) ")
LEFT_OUT = {
    r"make |source |pip |uv |git |bash |python3 -m venv|python benchmarks/": "not this program, or hours",
    r"curl |hf |vllm |AE=|cd |B=|DATA=|cp |mkdir |alpaca_eval |python (gen_|show_|utils/)": "network, other programs",
    r".*(llama3|gsm8k|HuggingFaceH4|WandbLogger)": "the hub, or a package that no test has",
    r".*mixdpo (judge|score|lm-eval)|.*--model\.server": "a judge, a server or a package that no test has",
    r".*mixdpo study": "36 or 40 runs",
    r".*--trainer\.devices 2": "two processes; tests/test_processes.py",
    r".*--(model X|name mine_alpaca)": "no command to type as it is, or 805 responses",
}
MADE_BY = {
    "runs/demo": "python run.py --config configs/demo.yaml",
    "runs/dpo": "python run.py --config configs/demo.yaml --config configs/controls/dpo.yaml",
    "runs/mine": "python run.py --config configs/own_pairs.yaml --name mine --data.source my_pairs.jsonl",
    "runs/warm_up": "python run.py --config configs/token_cleaning/full.yaml --name warm_up --data.source my_sft.jsonl",
}
CUT = {
    "fit": {"data.limit": "8", "data.validation": "0.25", "trainer.max_steps": "2"},
    "predict": {"data.limit": "8"},
    "ask": {"data.limit": "2", "model.max_new_tokens": "16"},
    "compare": {"at_once": "2", "seeds": "1", "with": "dpo", "trainer.max_steps": "2"},
    "make-pairs": {"limit": "2", "max_new_tokens": "16", "samples": "2"},
    "cross-fit": {"data.limit": "8", "trainer.max_steps": "1"},
    "chat": {"max_new_tokens": "16"},
    "inspect": {"data.limit": "8", "data.validation": "0.25"},
    "estimate": {"data.validation": "0.25"},
}
CUT["compare"] |= {"data.limit": "16", "data.validation": "0.25"}
DONE: list[list[str]] = []


def commands_of(block: str) -> list[str]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def left_out(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in LEFT_OUT)


def cut(words: list[str]) -> list[str]:
    """A command's words, shortened by options that the command does not give."""
    verb = words[0] if not words[0].startswith("-") else "fit"
    config = Path(words[words.index("--config") + 1]) if "--config" in words else None
    if config and "evaluation" in config.parts:
        verb = "ask"
    options = {} if "--ckpt_path" in words else dict(CUT.get(verb, {}))
    config = Path("configs/demo.yaml") if config == Path("demo") else config  # the shipped one, by its short name
    text = config.read_text("utf-8") if config and config.exists() and verb == "fit" else ""
    if "lightning_modules.sft" in text:
        options |= {"data.limit": "24", "trainer.max_steps": "-1", "trainer.max_epochs": "1"}
    if "own_pairs" in str(config) or (verb == "compare" and "own_pairs" in words[1]):
        cpu = yaml.safe_load(Path("configs/cpu.yaml").read_text("utf-8"))
        options |= {"model.dtype": cpu["model"]["init_args"]["dtype"], "data.batch_size": "4", "model.base": PACKAGED}
        options |= {f"data.{name}": str(value) for name, value in cpu["data"]["init_args"].items()}
        options |= {f"trainer.{name}": value for name, value in cpu["trainer"].items()}
    if verb == "compare":  # 12 runs
        for name in ("--with", "--seeds"):
            del words[slice(words.index(name), words.index(name) + 2) if name in words else slice(0)]
    more = [word for name, value in options.items() if f"--{name}" not in words for word in (f"--{name}", value)]
    demo = verb == "compare" and "demo" in words[1]
    if demo or ("GoldEvaluation" in text and options):
        at = 2 if demo else words.index("--config") + 2
        few = ["--trainer.callbacks.prompts", "few.jsonl", "--trainer.callbacks.max_new_tokens", "16"]
        words = [*words[:at], *few, *words[at:]]
    on_cpu = {"Qwen/Qwen2.5-7B-Instruct": PACKAGED, "bfloat16": "float32", "bf16-mixed": "32-true"}
    return [on_cpu.get(word, word) for word in words] + more


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    for folder, made_by in MADE_BY.items():
        if re.search(rf"{folder}(/| |$)", command) and not Path(folder).exists():
            run(made_by, patch)
    said, _, typed = command.rpartition(" | ")
    if (words := cut(shlex.split(OURS.sub("", typed)))) in DONE:
        return  # of an earlier page
    DONE.append(words)
    patch.setattr(sys, "stdin", io.StringIO(f"{said.removeprefix('echo ')}\n" if said else "/quit\n"))
    patch.setattr(sys, "argv", ["run.py", *words])
    print(f"$ {shlex.join(words)}", file=sys.__stderr__)
    if typed.startswith("python run.py"):
        cli.run(words)
    else:
        assert cli.main(words) == 0, command
    gc.collect()  # the models of a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: the clone, and files of their own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "run.py", "lightning_modules", "mixdpo", "datamodules"):
        (folder / name).symlink_to(ROOT / name)
    rows = [row for _, _, row in islice(open_source("constraints", "train").rows, 40)]
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    rated = [pair | {"score_chosen": 9, "score_rejected": n % 9} for n, pair in enumerate(pairs)]
    ours = {"prompt": "instruction", "chosen": "better", "rejected": "worse"}
    files = {
        "train": rated[:6],
        "held_out": rated[6:8],
        "their_pairs": [{ours.get(name, name): value for name, value in row.items()} for row in rated],
        "my_pairs": rated,
        "my_sft": [{"instruction": row["prompt"], "output": row["chosen"], "source": "mine"} for row in rows],
        "my_prompts": [{"instruction": row["prompt"], "prompt": row["prompt"], "part": "mine"} for row in rows[:4]],
        "few": read_prompts("heldout")[:4],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(os.environ, "COLUMNS", "80")
    sys.modules.pop("my_scorer", None)  # two pages have one
    for out in (*Path().glob("out*"), *Path().glob("runs/compare")):  # of an earlier page
        shutil.rmtree(out)
    for kind, name, text in BLOCK.findall(page.read_text("utf-8")):
        if name:
            Path(name).write_text(text, "utf-8")
        elif kind == "python" and page.stem == "token_scores":  # others are run by test_library.py, or are TRL's
            exec(text, {})
        for command in commands_of(text) if kind == "bash" else ():
            if not left_out(command):
                assert OURS.match(command), command
                run(command, monkeypatch)
