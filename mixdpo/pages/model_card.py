"""What a published policy comes with: its tokenizer, and a model card from the run's own files."""

import json
from importlib.metadata import version
from pathlib import Path

import yaml
from jinja2 import ChainableUndefined, Template
from transformers import PreTrainedTokenizerBase

from mixdpo.pages import public
from mixdpo.storage.files import write_text


def describe(folder: Path, tokenizer: PreTrainedTokenizerBase, run: Path, merged: bool = False) -> None:
    """Write the tokenizer and README.md to a folder that holds a run's policy.

    The card says only what the run has recorded, names files without their folders, and holds no time.

    Args:
        tokenizer: with the chat template of the training.
        merged: the policy is a plain model, no adapter.
    """
    tokenizer.save_pretrained(folder)
    paths = [p for p in run.glob("*.*") if p.name in ("config.yaml", "route.json", "plan.json", "results.json")]
    files = {
        p.stem: (json.loads if p.suffix == ".json" else yaml.safe_load)(public(p.read_text("utf-8"))) for p in paths
    }
    md = Template(Path(__file__).with_suffix(".md").read_text("utf-8"), undefined=ChainableUndefined, trim_blocks=True)
    write_text(folder / "README.md", md.render(files, merged=merged, version=version, Path=Path))
