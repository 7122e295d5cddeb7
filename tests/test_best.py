"""The best checkpoint belongs to its run: wherever folders are moved, whatever lies where they were."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit, make_pairs
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file
from test_cli import contents
from test_faults import ADAMW, At, Crash, adapter, checkpoint, crash

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.run_files import RunFiles
from mixdpo.routing.route import Routing

SOURCE_ROWS = make_pairs(20)
Train, Whole = Callable[..., ModelCheckpoint], tuple[Path, Any]
FIRST = "epoch=0-step=5.ckpt"
"""The best one where the greatest value counts of what falls: that of the first of three validations."""


@pytest.fixture(scope="module")
def train(tiny_model: str, source: str) -> Train:
    def run(folder: Path, *callbacks: Any, ckpt_path: Any = None, lr: float = 1e-3, **options: Any) -> ModelCheckpoint:
        """15 steps in three epochs, with a validation after each."""
        best = ModelCheckpoint(**{"monitor": "val/all/sft_loss", "mode": "max", **options})
        ours = [*callbacks, best, RunFiles(), ExactResume(), LastCheckpoint(every_n_steps=1)]
        data = {"validation": 0.2, "routing": Routing(hard_fraction=1.0)}
        trainer = {"callbacks": ours, "max_epochs": 3}
        path = None if ckpt_path is None else str(ckpt_path)
        fit(tiny_model, source, folder, data=data, trainer=trainer, ckpt_path=path, **(ADAMW | {"lr": lr}))
        return best

    return run


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.fixture
def moved(train: Train, tmp_path: Path) -> Path:
    """What is left of tmp_path/run, killed two steps after its first validation: its folder has another name now."""
    with pytest.raises(Crash):
        train(tmp_path / "run", At(7, crash))
    return (tmp_path / "run").rename(tmp_path / "moved")


def assert_policy(folder: Path, path: Path) -> None:
    """The run's adapter/ is the policy of this checkpoint."""
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    state = torch.load(path, weights_only=True)["state_dict"]
    state = {key.replace(".policy.", ".").removeprefix("model."): value for key, value in state.items()}
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in saved)


def test_a_moved_run_goes_on_with_its_own_best(whole: Whole, train: Train, moved: Path, tmp_path: Path) -> None:
    """Another run of its name has ended in between, with a best file of the same name and another policy."""
    other = train(tmp_path / "run", lr=2e-3)
    assert Path(other.best_model_path).name == FIRST and adapter(tmp_path / "run") != adapter(whole[0])
    before = [contents(folder) for folder in (moved, tmp_path / "run")]
    best = train(tmp_path / "rest", ckpt_path=moved / "checkpoints" / "last.ckpt")
    assert Path(best.best_model_path) == tmp_path / "rest" / "checkpoints" / FIRST
    assert best.best_model_score == whole[1].best_model_score != other.best_model_score
    assert adapter(tmp_path / "rest") == adapter(whole[0])
    assert [contents(folder) for folder in (moved, tmp_path / "run")] == before


def test_the_best_of_another_run_is_not_taken(train: Train, moved: Path, tmp_path: Path) -> None:
    """Where the run's own is gone, and another one lies where it was."""
    train(tmp_path / "run", lr=2e-3)
    (moved / "checkpoints" / FIRST).unlink()
    with pytest.warns(UserWarning, match=rf"run/checkpoints/{FIRST}, is gone, or another file"):
        best = train(tmp_path / "rest", ckpt_path=moved / "checkpoints" / "last.ckpt")
    assert Path(best.best_model_path).name == "epoch=1-step=10.ckpt"


def test_the_best_is_found_where_it_was(whole: Whole, train: Train, moved: Path, tmp_path: Path) -> None:
    """By a copy of last.ckpt that lies elsewhere."""
    moved.rename(tmp_path / "run")
    path = Path(shutil.copy(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path))
    best = train(tmp_path / "rest", ckpt_path=path)
    assert Path(best.best_model_path) == tmp_path / "rest" / "checkpoints" / FIRST
    assert adapter(tmp_path / "rest") == adapter(whole[0])


def test_what_a_better_one_replaces_is_deleted_in_the_continued_run_only(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path / "run", At(7, crash), mode="min")
    before = contents(tmp_path / "run")
    seen = []
    look = At(7, lambda: seen.extend((tmp_path / "rest" / "checkpoints").iterdir()))
    train(tmp_path / "rest", look, ckpt_path=Path(checkpoint(tmp_path / "run")), mode="min")
    assert FIRST in {path.name for path in seen}
    assert {path.name for path in (tmp_path / "rest/checkpoints").iterdir()} == {"epoch=2-step=15.ckpt", "last.ckpt"}
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ["cut off", "gone", "of another program"])
def test_a_best_file_that_cannot_be_loaded_leaves_the_last_policy(damage: str, train: Train, tmp_path: Path) -> None:
    class Damage(Callback):
        def on_train_end(self, *_: Any) -> None:
            path = tmp_path / "run" / "checkpoints" / FIRST
            content = path.read_bytes()
            path.unlink()
            if damage == "cut off":
                path.write_bytes(content[: len(content) // 2])
            elif damage == "of another program":
                torch.save({"weights": torch.zeros(3)}, path)

    with pytest.warns(UserWarning, match=rf"run/checkpoints/{FIRST} cannot be loaded .*: adapter/ holds the last"):
        train(tmp_path / "run", Damage())
    assert_policy(tmp_path / "run", Path(checkpoint(tmp_path / "run")))


def test_no_checkpoint_goes_through_the_systems_temporary_folder(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    train(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {FIRST, "last.ckpt"}


def test_another_file_in_the_best_ones_place_is_not_loaded(train: Train, whole: Whole, tmp_path: Path) -> None:
    """Two runs that share a folder of checkpoints: the other one writes a file of the same name."""
    other = train(tmp_path / "other", lr=2e-3)
    place = tmp_path / "run" / "checkpoints" / FIRST
    swap = At(12, lambda: shutil.copyfile(other.best_model_path, place))
    with pytest.warns(UserWarning, match=r"cannot be loaded \(ValueError: its score is .* it is of another run"):
        train(tmp_path / "run", swap)
    assert adapter(tmp_path / "run") not in (adapter(whole[0]), adapter(tmp_path / "other"))


OWN_FOLDER = {"filename": "{epoch}-{val/all/sft_loss:.3f}"}
ONE_NAME = {"filename": "best", "enable_version_counter": False, "mode": "min"}


@pytest.mark.parametrize("how", [OWN_FOLDER, ONE_NAME], ids=str)
def test_a_run_that_goes_on_from_its_best(how: dict[str, Any], train: Train, tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", **how)
    with pytest.raises(Crash):
        train(tmp_path / "run", At(12, crash), **how)
    (tmp_path / "run").rename(tmp_path / "moved")
    (path,) = [p for p in (tmp_path / "moved" / "checkpoints").rglob("*.ckpt") if p.name != "last.ckpt"]
    best = train(tmp_path / "rest", ckpt_path=path, **how)
    assert best.best_model_score == expected.best_model_score
    assert adapter(tmp_path / "rest") == adapter(tmp_path / "whole")


def test_the_second_best_counts_where_the_best_is_gone(train: Train, tmp_path: Path) -> None:
    """Its file was written when another one was the best."""
    with pytest.raises(Crash):
        train(tmp_path / "run", At(12, crash), save_top_k=2)
    folder, second = tmp_path / "run" / "checkpoints", "epoch=1-step=10.ckpt"
    (folder / FIRST).unlink()
    with pytest.warns(UserWarning, match="is gone, or another file"):
        best = train(tmp_path / "rest", ckpt_path=folder / "last.ckpt", save_top_k=2)
    assert Path(best.best_model_path).name == second
    assert_policy(tmp_path / "rest", folder / second)
