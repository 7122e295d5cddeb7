"""`mixdpo cross-fit CONFIG OUT`: margins βΔ of each pair by a model that did not train on it. Pairs that such a model
gets wrong are the hard ones (the learning order of Selective DPO).

Trains CONFIG on each half of the prompts, from the base, without routes, in random order and without validation. Then
computes the margin βΔ (ImplicitReward) of the pairs in the other half. The held-out DPO loss −log σ(βΔ), by which
Selective DPO orders pairs, puts pairs in the same order. OUT is a margins file.
"""

import argparse
import gc
from pathlib import Path

from lightning_modules.verbs.run_cli import start
from mixdpo.errors import InputError
from mixdpo.signals.compare_margins import combine

ROUTES = "{hard_fraction: 0, order: shuffled, hard_action: preference, easy_action: preference, blend_width: null}"
FIT = [f"--data.routing={ROUTES}", "--data.validation=0", "--data.margins_file=null", "--model.adapter=null"]
PREDICT = ["--model=lightning_modules.margins.MarginModule", "--model.signal=mixdpo.signals.ImplicitReward"]
PREDICT += ["--trainer.callbacks=null", "--trainer.devices=1"]


def cross_fit(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("mixdpo cross-fit", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config of run.py, without --config; options of run.py fit may follow OUT")
    parser.add_argument("out", help="margins file to write; it must not exist yet")
    options, rest = parser.parse_known_args(arguments)
    if Path(options.out).exists():
        raise InputError(f"{options.out} exists: remove it, or give another OUT")
    parts = []
    for half in "01":
        fit = ["fit", "--config", options.config, *rest, f"--name=half{half}", f"--data.half={half}", *FIT]
        folder = start(fit).trainer.default_root_dir
        gc.collect()  # the trained model is in cycles of references: it would stay on the card beside the next one
        parts.append(f"{folder}/other_half.margins")
        made = [f"--model.adapter={folder}/adapter", f"--model.output={parts[-1]}"]
        start(["predict", "--config", f"{folder}/config.yaml", *PREDICT, *made])
        gc.collect()
    combine(parts[0], parts[1], options.out, how="union")
