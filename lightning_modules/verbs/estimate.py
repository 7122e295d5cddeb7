"""`mixdpo estimate CONFIG`: memory and hours of a run on one GPU, predicted. Needs neither the GPU nor weights.

`mixdpo inspect DATA` shows these numbers beside those of the data.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.memory import memory_model
from lightning_modules.verbs.run_cli import RunCLI, start
from mixdpo.batches.steps import heaviest
from mixdpo.errors import InputError
from mixdpo.evaluation.inspection import parse
from mixdpo.model.estimate import allowance
from mixdpo.storage.files import write_json

# GB, and TFLOP/s of dense bf16 products (T4: fp16), from NVIDIA's whitepapers of the architectures GA102 (sums in
# fp32), Ada (the same), A100, H100 (SXM), Turing, and from the data sheet of the L4 (half of the rate with sparsity)
CARDS = {"RTX3090": (24, 71.0), "RTX4090": (24, 165.2), "A100": (80, 312.0), "H100": (80, 989.4)}
CARDS |= {"L4": (24, 121.0), "T4": (16, 65.0)}
SIZES = {str(size): (size, CARDS["RTX4090"][1]) for size in (8, 12, 16, 24, 48, 80)}


def estimate(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("mixdpo estimate", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config of run.py, without --config; options of run.py fit may follow")
    parser.add_argument("--card", choices=[*SIZES, *CARDS], help="its GB or its name; all sizes if not given")
    parser.add_argument("--lengths", help="tokens PROMPT,CHOSEN,REJECTED or PROMPT,RESPONSE where there is no data yet")
    parser.add_argument("--rows", type=int, default=10_000, help="pairs or samples, with --lengths (%(default)s)")
    parser.add_argument("--share", type=float, default=0.4, help="reached of the card's rate: a guess (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options, rest = parser.parse_known_args(arguments, argparse.Namespace(show=show))
    start(["fit", "--config", options.config, *rest], partial(EstimateCLI, options))


def inspect(arguments: list[str]) -> None:
    options, words = parse(arguments)
    start(["fit", *words], partial(EstimateCLI, options))


def show(_: Any, estimate: Any, options: argparse.Namespace) -> None:
    print(described(found := estimate(), options.share))
    if options.out:
        write_json(options.out, found)


class EstimateCLI(RunCLI):
    """Parses as `fit` does, and estimates."""

    def __init__(self, options: argparse.Namespace, *arguments: Any, **more: Any) -> None:
        self.options = options
        super().__init__(*arguments, **more)

    def instantiate_trainer(self, **_: Any) -> L.Trainer:
        """A trainer on the CPU, which plans the steps of one device."""
        kept = ("max_steps", "max_epochs", "accumulate_grad_batches", "precision")
        given = {name: self.config.fit.trainer[name] for name in kept}
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        own = self.config_init.fit.trainer.callbacks
        moves = [each for each in (own if isinstance(own, list) else [own]) if isinstance(each, RefreshReference)]
        return L.Trainer(accelerator="cpu", devices=1, callbacks=moves, **given, **quiet)  # type: ignore[arg-type]

    def fit(self, model: Any, datamodule: Any, **_: Any) -> None:
        """What Lightning calls in the place of the trainer's `fit`."""
        self.trainer.strategy.connect(model)
        model.trainer = datamodule.trainer = self.trainer
        self.trainer.datamodule = datamodule  # type: ignore[attr-defined]
        self.options.show(datamodule, partial(self._estimate, model, datamodule), self.options)

    def _estimate(self, model: Any, data: Any) -> dict[str, Any]:
        memory, found = memory_model(model, "cuda"), dict[str, Any](self._plan(data))
        body, head = memory.linear_sizes()
        products = body * found["tokens"] + head * found["targets"]
        cost = 4 * products + 2 * memory.with_reference * found["compared"] * products
        found["tflop"] = {"kept": cost / 1e12, "recomputed": (cost + 2 * body * found["tokens"]) / 1e12}
        found |= {name: memory.at(0, False)[name] for name in ("weights", "adapters", "moments")}
        for name, again in (("kept", False), ("recomputed", True)):
            found[f"{name}_per_token"] = memory.at(10_001, again)["kept"] - memory.at(10_000, again)["kept"]
        cards = {self.options.card: (SIZES | CARDS)[self.options.card]} if self.options.card else SIZES
        cut, rule = data.micro_batch_tokens, model.activation_checkpointing
        found["cards"] = {name: self._on_card(found, memory, cut, rule, *card) for name, card in cards.items()}
        return found | {"title": f"{model.base}, rank {memory.lora.rank}"}

    def _on_card(self, found: Any, memory: Any, cut: Any, rule: Any, size: int, rate: float) -> dict[str, Any]:
        room = size * 1e9 - allowance(size * 1e9)
        most = [memory.most_tokens(room, again) for again in (False, True)]
        limit = memory.micro_batch_limit(room, rule, found["longest"]) if cut == "auto" else cut or found["micro_batch"]
        tokens = max(found["longest"], min(limit, found["step"]))
        again = tokens > {True: 0, False: 2**40, "auto": most[0]}.get(rule, rule)
        peak, phase = memory.peak(tokens, again)
        hours = found["tflop"]["recomputed" if again else "kept"] / rate / self.options.share / 3600
        row = {"fits": tokens <= most[again], "tokens": tokens, "recomputed": again, "peak": peak, "phase": phase}
        return row | {"most_kept": most[0], "most_recomputed": most[1], "hours": hours}

    def _plan(self, data: Any) -> dict[str, float]:
        """Steps; tokens and targets of all steps; tokens of the longest row, of the heaviest step and, as the trainer
        or a limit cuts steps, of the heaviest micro-batch; the share of the tokens that the reference computes."""
        pairs, trainer = data.noun == "pair", self.trainer
        if self.options.lengths:
            prompt, *responses = map(int, self.options.lengths.split(","))
            if len(responses) != 1 + pairs:
                raise InputError("--lengths must be PROMPT,CHOSEN,REJECTED for pairs, PROMPT,RESPONSE for samples")
            tokens, targets, compared = np.full((self.options.rows, 3), (prompt + sum(responses), sum(responses), 1)).T
            epoch, planned = -(-len(tokens) // data.batch_size), [range(min(data.batch_size, len(tokens)))]
            steps = min(n for n in (trainer.max_steps, epoch * trainer.max_epochs) if n >= 0)
        else:
            data.setup("fit")
            tokens, planned, steps = np.array(data.row_sizes[0]), data.all_steps(), len(data.step_plan())
            prompts = [len(ids) for ids in data.train_pairs["prompt_ids"]] if pairs else 0
            targets, compared = (tokens - prompts, ~data.route.is_sft) if pairs else (data.row_sizes[1], tokens > 0)
        step, micro_batch = (heaviest(planned, tokens.tolist(), n)[0] for n in (1, trainer.accumulate_grad_batches))
        passes = steps * data.batch_size / len(tokens)
        found = {"steps": steps, "tokens": passes * tokens.sum(), "targets": passes * np.sum(targets)}
        found |= {"longest": max(tokens), "step": step, "micro_batch": micro_batch}
        found["compared"] = (tokens * compared).sum() / tokens.sum()
        return {name: float(value) for name, value in found.items()}

    def after_fit(self) -> None:
        """Nothing was trained."""


def described(found: dict[str, Any], share: float) -> str:
    """The numbers as text, in GB of 1e9 bytes."""
    sizes = ", ".join(f"{name} {found[name] / 1e9:.2f} GB" for name in ("weights", "adapters", "moments"))
    lines = [f"{found['title']}: {found['steps']:,.0f} steps, {found['tokens']:,.0f} tokens; {sizes}"]
    for name, tflop in found["tflop"].items():
        megabytes = found[f"{name}_per_token"] / 1e6
        lines.append(f"activations {name}: {megabytes:.2f} MB a token; {tflop:,.0f} TFLOP in all")
    lines += ["1 GB for CUDA's context and 5 % of the card are set aside. Micro-batches, and the largest, in tokens\n"]
    rows = [("card", "fits", "micro-batch", "activations", "peak, GB", "peak in", "most kept", "most recomp.", "hours")]
    for card, row in found["cards"].items():
        words = card, "yes" if row["fits"] else "no", f"{row['tokens']:,.0f}", ("kept", "recomputed")[row["recomputed"]]
        numbers = f"{row['peak'] / 1e9:.2f}", row["phase"], f"{row['most_kept']:,}", f"{row['most_recomputed']:,}"
        rows.append((*words, *numbers, f"{row['hours']:.2f}"))
    lines += ["  ".join(f"{cell:>12}" for cell in row) for row in rows]
    rate = f"{share:.0%} of the card's published bf16 rate (of a size in GB: an RTX 4090's; slower cards take longer)"
    return "\n".join([*lines, f"hours: of training alone, at a guessed {rate}; nothing was measured"])
