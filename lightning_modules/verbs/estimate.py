"""`mixdpo estimate CONFIG`: what a run will take of a GPU, before the run starts. No weights are read."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_modules.verbs.run_cli import RunCLI, start
from mixdpo.errors import InputError
from mixdpo.model.estimate import PHASES, allowance

# GB, and TFLOP/s of dense bf16 products (T4: fp16), from NVIDIA's whitepapers of the architectures GA102 (sums in
# fp32), Ada (the same), A100, H100 (SXM), Turing, and from the data sheet of the L4 (half of the rate with sparsity)
CARDS = {"RTX3090": (24, 71.0), "RTX4090": (24, 165.2), "A100": (80, 312.0), "H100": (80, 989.4)}
CARDS |= {"L4": (24, 121.0), "T4": (16, 65.0)}
SIZES = {str(size): (size, CARDS["RTX4090"][1]) for size in (8, 12, 16, 24, 48, 80)}


def estimate(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("mixdpo estimate", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="config of run.py; options of run.py fit may follow")
    parser.add_argument("--card", choices=[*SIZES, *CARDS], help="GB or a name; all sizes if not given")
    parser.add_argument("--lengths", help="tokens PROMPT,CHOSEN,REJECTED or LENGTH,RESPONSE where there is no data yet")
    parser.add_argument("--rows", type=int, default=10_000, help="of the data, with --lengths (%(default)s)")
    parser.add_argument(
        "--share", type=float, default=0.4, help="of a card's rate that is reached (%(default)s, a guess)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options, rest = parser.parse_known_args(arguments)
    start(["fit", "--config", options.config, *rest], partial(EstimateCLI, options))


class EstimateCLI(RunCLI):
    """Parses as `fit` does, and estimates."""

    def __init__(self, options: argparse.Namespace, *arguments: Any, **more: Any) -> None:
        self.options = options
        super().__init__(*arguments, **more)

    def instantiate_trainer(self, **_: Any) -> L.Trainer:
        """A trainer on the CPU, to plan the steps."""
        given = self.config.fit.trainer
        devices = given.devices if isinstance(given.devices, int) and given.devices > 0 else 1
        cut = {"accumulate_grad_batches": given.accumulate_grad_batches * devices, "devices": 1, "accelerator": "cpu"}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": []}
        return L.Trainer(max_steps=given.max_steps, max_epochs=given.max_epochs, **cut, **quiet)

    def fit(self, model: Any, datamodule: Any, **_: Any) -> None:
        """What Lightning calls in the place of the trainer's `fit`."""
        found: dict[str, Any] = self._by_lengths(datamodule) if self.options.lengths else self._by_data(datamodule)
        memory = model.memory_model("cuda", str(self.config.fit.trainer.precision or "32-true"), datamodule)
        body, head = memory.linear_sizes()
        products, checkpointing = body * found["tokens"] + head * found["targets"], model.activation_checkpointing
        reference = 2 * products * found.pop("compared") * memory.with_reference
        for again, name in ((False, "kept"), (True, "recomputed")):
            at, more = (memory.at(found["micro_batch"] + extra, again) for extra in (0, 1))
            tflop = (4 * products + reference + 2 * again * body * found["tokens"]) / 1e12
            found[name] = at | {"kept_per_token": more["kept"] - at["kept"], "tflop": tflop}
        found["cards"] = {}
        for card in [self.options.card] if self.options.card else SIZES:
            size, rate = (SIZES | CARDS)[card]
            most = [memory.most_tokens(size * 1e9 - allowance(size * 1e9), again) for again in (False, True)]
            above = {True: 0, False: 2**40, "auto": most[0]}.get(checkpointing, checkpointing)
            again = found["micro_batch"] > above
            hours = found["recomputed" if again else "kept"]["tflop"] / rate / self.options.share / 3600
            fits = ("recomputed" if again else "kept") if found["micro_batch"] <= most[again] else "no"
            found["cards"][card] = {"fits": fits, "most_kept": most[0], "most_recomputed": most[1], "hours": hours}
        print(described(found, self.options.share, f"{model.base}, rank {memory.lora.rank}"))
        if self.options.out:
            self.options.out.write_text(json.dumps(found, indent=1) + "\n")

    def after_fit(self) -> None:
        pass

    def _by_data(self, data: Any) -> dict[str, float]:
        """Tokens and targets of all steps, steps, tokens of the heaviest micro-batch, share seen by the reference."""
        self.trainer.strategy.connect(self.model)
        data.trainer = self.model.trainer = self.trainer
        data.setup("fit")
        tokens, targets = (np.asarray(each) for each in data.sizes())
        compared, steps = np.ones(len(tokens)), len(data.step_plan())
        if hasattr(data, "route"):
            targets = tokens - [len(ids) for ids in data.train_pairs["prompt_ids"]]
            compared = ~data.route.is_sft
        passes = steps * data.batch_size / len(tokens)
        return {
            "tokens": passes * tokens.sum(),
            "targets": passes * targets.sum(),
            "steps": steps,
            "micro_batch": int(max(tokens[list(rows)].sum() for rows, *_ in data.micro_batches())),
            "compared": (tokens * compared).sum() / tokens.sum(),
        }

    def _by_lengths(self, data: Any) -> dict[str, float]:
        sizes = [int(size) for size in self.options.lengths.split(",") if size.isdecimal()]
        if len(sizes) != (3 if data.noun == "pair" else 2):
            raise InputError("--lengths must be PROMPT,CHOSEN,REJECTED for pairs, LENGTH,RESPONSE for samples")
        tokens, targets = (sum(sizes), sum(sizes[1:])) if len(sizes) == 3 else sizes
        epoch, trainer = -(-self.options.rows // data.batch_size), self.trainer
        epochs = epoch * (trainer.max_epochs or 1) if trainer.max_epochs != -1 else trainer.max_steps
        steps = epochs if trainer.max_steps < 0 else min(epochs, trainer.max_steps)
        rows, together = steps * data.batch_size, -(-data.batch_size // trainer.accumulate_grad_batches)
        totals = {"tokens": rows * tokens, "targets": rows * targets, "steps": steps}
        return totals | {"micro_batch": together * tokens, "compared": 1.0}


def described(found: dict[str, Any], share: float, title: str) -> str:
    """The numbers as text, in GB of 1e9 bytes."""
    lines = [f"{title}: {found['steps']:,} steps, {found['tokens']:,.0f} tokens"]
    sizes = ", ".join(f"{name} {found['kept'][name] / 1e9:.2f} GB" for name in ("weights", "adapters", "moments"))
    lines += [sizes, f"heaviest micro-batch: {found['micro_batch']:,} tokens"]
    for name in ("kept", "recomputed"):
        at = found[name]
        peak = max(PHASES, key=lambda phase: at[phase])
        size, more = at[peak] / 1e9, at["kept_per_token"] / 1e6
        costs = f"{more:.2f} MB kept a token, {at['tflop']:,.0f} TFLOP"
        lines.append(f"  activations {name:<10}  peak {size:6.2f} GB in {peak}, {costs}")
    lines.append("beside it 1 GB for CUDA's context and 5 % of the card for fragmentation\n")
    lines.append("card       fits         most tokens of a micro-batch: kept / recomputed    hours")
    for card, row in found["cards"].items():
        most = f"{row['most_kept']:,} / {row['most_recomputed']:,}"
        lines.append(f"{card:<9}  {row['fits']:<11}  {most:>45}  {row['hours']:7.2f}")
    rate = f"{share:.0%} of the card's published dense bf16 rate, of an RTX 4090 for a card without a name"
    return "\n".join([*lines, f"hours: at {rate}; nothing is measured here"])
