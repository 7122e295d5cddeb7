"""`kill -9` at any moment: continued from what it left, a run ends with the adapter of one that was never killed.

What it left may have been moved first, and another run may lie where it was.
"""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import build, build_sft, make_pairs, make_samples, write_pairs
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_modules.callbacks.clean_tokens
import mixdpo.storage.files
from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.run_files import RunFiles
from mixdpo.batches.steps import Slices
from mixdpo.model import export
from mixdpo.model.adapters import Lora
from mixdpo.routing.schedules import StagedCosine
from mixdpo.token_cleaning.cleaning import Cleaning

Make = Callable[[Path], tuple[L.Trainer, Any, Any]]
OPTIONS: dict[str, Any] = {
    "lora": Lora(rank=4, alpha=8, dropout=0.3), "optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule": StagedCosine(),
}  # fmt: skip
POINTS: dict[str, tuple[Any, str, str]] = {
    "before the checkpoint is written": (L.Trainer, "save_checkpoint", "before"),
    "in the checkpoint's temporary file": (mixdpo.storage.files, "replace", "torn"),
    "before the checkpoint's rename": (mixdpo.storage.files, "replace", "before"),
    "after the checkpoint's rename": (mixdpo.storage.files, "replace", "after"),
    "while tokens are scored again": (lightning_modules.callbacks.clean_tokens, "add_losses", "after"),
    "in the final adapter's file": (export, "save_file", "half"),
}


@pytest.fixture(scope="module")
def kinds(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Make]]:
    """Two kinds of run by name: pairs, eight steps in two epochs with a validation after each, and the best policy in
    adapter/; self-evolving cleaning, six in three slices."""
    root = tmp_path_factory.mktemp("kinds")
    pairs = write_pairs(root / "pairs.jsonl", make_pairs(15))
    samples = write_pairs(root / "samples.jsonl", make_samples(24))
    ours = [RunFiles(), ExactResume(), LastCheckpoint(every_n_steps=1)]

    def preference(folder: Path) -> tuple[L.Trainer, Any, Any]:
        best = ModelCheckpoint(monitor="val/all/preference_loss")  # the first validation's
        trainer = {"max_epochs": 2, "callbacks": [best, *ours]}
        return build(tiny_model, pairs, folder, trainer=trainer, data={"validation": 0.2}, **OPTIONS)

    def cleaning(folder: Path) -> tuple[L.Trainer, Any, Any]:
        trainer, how = {"callbacks": [RefreshReference(), *ours]}, Cleaning(warm_up_stages=1)
        data = {"slices": Slices(3)}
        return build_sft(tiny_model, samples, folder, trainer=trainer, data=data, cleaning=how, **OPTIONS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXDPO_CACHE", str(root / "cache"))
        yield {"pairs": preference, "cleaning": cleaning}


@pytest.fixture(scope="module")
def never_killed(kinds: dict[str, Make], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, float]]:
    """By kind: the adapter's bytes, and the seconds that the run took."""
    found = {}
    for kind, make in kinds.items():
        root, started = tmp_path_factory.mktemp(kind), time.perf_counter()
        assert attempt(make, root) == 0
        found[kind] = (adapter(root), time.perf_counter() - started)
    return found


def attempt(make: Make, root: Path, arm: Callable[[], None] = lambda: None, kill_after: float | None = None) -> int:
    """A run in a process of its own, from the last checkpoint that earlier attempts left; how it ended."""
    number = len(list(root.iterdir()))
    left = sorted(root.glob("*/checkpoints/last.ckpt"))
    child = os.fork()
    if child == 0:
        try:
            arm()
            trainer, module, data = make(root / f"{number:03}")
            trainer.fit(module, data, ckpt_path=str(left[-1]) if left else None, weights_only=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status


def die(module: Any, name: str, when: str, call: int) -> None:
    """Make the process kill itself in the `call`-th call of a function: before or after it, or in the file that it
    writes (`half`) or is given (`torn`). Of what takes the place of a file, only checkpoints count."""
    original, calls = getattr(module, name), [0]

    def deadly(*arguments: Any, **options: Any) -> Any:
        paths = [Path(value) for value in arguments if isinstance(value, str | Path)]
        calls[0] += name != "replace" or paths[0].suffix == ".ckpt"
        if calls[0] < call:
            return original(*arguments, **options)
        if when in ("half", "after"):
            original(*arguments, **options)
        if when in ("half", "torn"):
            os.truncate(paths[0], paths[0].stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, deadly)


def move(folder: Path, decoy: bool) -> None:
    """Give what a killed attempt left another name; the decoy is a best file of another policy where its own was."""
    if not folder.exists():
        return  # it was killed before its first file
    moved = folder.rename(folder.with_name(f"{folder.name}-moved"))
    for path in moved.glob("checkpoints/epoch=*.ckpt") if decoy else ():
        held = torch.load(path, weights_only=True)
        held["state_dict"] = {key: torch.zeros_like(value) for key, value in held["state_dict"].items()}
        (folder / "checkpoints").mkdir(parents=True)
        torch.save(held, folder / "checkpoints" / path.name)


def adapter(root: Path) -> bytes:
    """Of the last attempt."""
    return (max(root.iterdir()) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "point", "call", "moved"), [
    ("pairs", "in the checkpoint's temporary file", 3, False),
    ("pairs", "before the checkpoint's rename", 7, True),  # after the best one, which is the fifth
    ("cleaning", "while tokens are scored again", 3, False),
    ("pairs", "in the final adapter's file", 1, True),
])  # fmt: skip
def test_killed_at_a_dangerous_moment(kind, point, call, moved, kinds, never_killed, tmp_path) -> None:
    assert attempt(kinds[kind], tmp_path, arm=lambda: die(*POINTS[point], call)) == signal.SIGKILL
    if moved:
        move(tmp_path / "000", decoy=True)
        assert (tmp_path / "000" / "checkpoints").exists()
    assert attempt(kinds[kind], tmp_path) == 0
    assert adapter(tmp_path) == never_killed[kind][0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills(kinds, never_killed, tmp_path, capsys) -> None:
    """40 at the dangerous moments (each function in several of its calls), 60 at random ones; half of what they left is
    moved before it is continued, and in half of that another run's best checkpoint lies where it was."""
    calls = {"save_checkpoint": range(1, 7), "replace": range(1, 7), "add_losses": range(1, 5), "save_file": [1]}
    planned = []
    for kind, (point, (_, name, _)) in product(kinds, POINTS.items()):
        for call in calls[name] if kind == "cleaning" or name != "add_losses" else ():
            planned.append((kind, lambda point=point, call=call: die(*POINTS[point], call), None))
    draw = random.Random(0)
    planned = draw.sample(planned, 40)
    for number in range(60):
        kind = list(kinds)[number % 2]
        planned.append((kind, lambda: None, draw.uniform(0, never_killed[kind][1])))
    identical, too_late = 0, 0
    for number, (kind, arm, after) in enumerate(planned):
        root = tmp_path / str(number)
        root.mkdir()
        while (status := attempt(kinds[kind], root, arm, after)) == 0:  # a random moment may come after the end
            assert after is not None
            shutil.rmtree(root)
            root.mkdir()
            too_late, after = too_late + 1, after / 2
        assert status == signal.SIGKILL
        if number // 2 % 2:  # of either kind
            move(root / "000", decoy=number // 4 % 2 == 1)
        assert attempt(kinds[kind], root) == 0
        identical += adapter(root) == never_killed[kind][0]
    with capsys.disabled():
        print(f"\nkills: {len(planned)} ({too_late} more came too late), identical adapters: {identical}")
    assert identical == len(planned) == 100
