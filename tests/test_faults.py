"""What a run does when it is stopped, when a number is not finite, and when disk or memory run out."""

import csv
import json
import os
import resource
import signal
from collections import namedtuple
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import TEMPLATE, adapter_weights, build, fit, make_pairs, write_pairs
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory
from lightning_modules.callbacks.logging import ValidateAtMaxSteps
from lightning_modules.callbacks.run_files import RunFiles
from mixdpo.errors import InputError, NonFiniteError, OutOfSpaceError, Stopped
from mixdpo.losses import DPO, IPO
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant, StagedCosine
from run import _for_the_user

ADAMW: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule": Constant(warmup=0.0)}


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", make_pairs(20))


def checkpoint(folder: Path) -> str:
    return str(folder / "checkpoints" / "last.ckpt")


def same(one: Any, other: Any) -> bool:
    mine, theirs = adapter_weights(one), adapter_weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


class At(Callback):
    """Do something in the hook `when` of optimizer step `step`."""

    def __init__(self, step: int, action: Callable[[], Any], when: str = "on_train_batch_start") -> None:
        self.step, self.action, self.done = step, action, False
        setattr(self, when, self._act)

    def _act(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done and not trainer.sanity_checking:
            self.done = True
            self.action()


def with_callbacks(*callbacks: Any, **options: Any) -> dict[str, Any]:
    return {"callbacks": [*callbacks, RunFiles(), ExactResume(), LastCheckpoint(), OutOfMemory()], **options}


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_it_is_continued_exactly(
    number: int, tiny_model: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first of two micro-batches of the third step."""
    whole = fit(tiny_model, source, tmp_path / "whole", trainer={"accumulate_grad_batches": 2}, **ADAMW)
    stop = At(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped:
        trainer = with_callbacks(stop, accumulate_grad_batches=2)
        fit(tiny_model, source, tmp_path / "cut", trainer=trainer, **ADAMW)
    assert stopped.value.signal == number
    assert torch.load(checkpoint(tmp_path / "cut"), weights_only=True)["global_step"] == 3
    said = capsys.readouterr().err
    assert f"--config {tmp_path}/cut/config.yaml --ckpt_path {checkpoint(tmp_path / 'cut')}" in said
    assert not (tmp_path / "cut" / "adapter").exists()
    rest = {"ckpt_path": checkpoint(tmp_path / "cut"), "trainer": {"accumulate_grad_batches": 2}}
    assert same(fit(tiny_model, source, tmp_path / "rest", **rest, **ADAMW), whole)


def test_a_second_signal_ends_it_at_once(tiny_model: str, source: str, tmp_path: Path) -> None:
    twice = At(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):  # Lightning's end of a KeyboardInterrupt
        trainer = {"callbacks": [twice, RunFiles(), LastCheckpoint(every_n_steps=1)]}
        fit(tiny_model, source, tmp_path / "cut", trainer=trainer, **ADAMW)
    signal.signal(signal.SIGINT, before)
    assert torch.load(checkpoint(tmp_path / "cut"), weights_only=True)["global_step"] == 2


def test_a_signal_in_a_validation_loses_no_step(tiny_model: str, source: str, tmp_path: Path) -> None:
    data, trainer = {"validation": 0.2}, {"max_epochs": 2}
    whole = fit(tiny_model, source, tmp_path / "whole", data=data, trainer=trainer, **ADAMW)
    stop = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_validation_batch_start")
    with pytest.raises(Stopped):
        fit(tiny_model, source, tmp_path / "cut", data=data, trainer=with_callbacks(stop, **trainer), **ADAMW)
    assert torch.load(checkpoint(tmp_path / "cut"), weights_only=True)["global_step"] == 5
    rest = {"ckpt_path": checkpoint(tmp_path / "cut"), "trainer": trainer, "data": data}
    assert same(fit(tiny_model, source, tmp_path / "rest", **rest, **ADAMW), whole)


def test_the_step_that_a_signal_stops_at_is_logged(tiny_model: str, source: str, tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path / "cut"), name="", version="")
    stop = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        fit(tiny_model, source, tmp_path / "cut", trainer=with_callbacks(stop, logger=logger), **ADAMW)
    with (tmp_path / "cut" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_checkpoint_comes_before_a_validation_by_the_clock(
    tiny_model: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = with_callbacks(val_check_interval="00:00:00:01", check_val_every_n_epoch=None)
    now = iter(range(10**6))
    monkeypatch.setattr("lightning.pytorch.loops.training_epoch_loop.time.monotonic", lambda: float(next(now)))
    stop = At(1, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_validation_batch_start")
    trainer["callbacks"].append(stop)
    with pytest.raises(Stopped):
        fit(tiny_model, source, tmp_path / "cut", data={"validation": 0.2}, trainer=trainer, **ADAMW)
    assert torch.load(checkpoint(tmp_path / "cut"), weights_only=True)["global_step"] == 1


def test_the_best_of_a_continued_run_may_be_older_than_it(tiny_model: str, source: str, tmp_path: Path) -> None:
    """What falls is greatest after the first epoch; the run is stopped before it ends a second one."""
    data, epochs = {"validation": 0.2, "routing": Routing(hard_fraction=1.0)}, {"max_epochs": 3}
    slow = ADAMW | {"lr": 1e-3}
    monitor = {"monitor": "val/all/sft_loss", "mode": "max"}
    stop = At(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        trainer = with_callbacks(stop, ModelCheckpoint(**monitor), **epochs)
        fit(tiny_model, source, tmp_path / "cut", data=data, trainer=trainer, **slow)
    best = ModelCheckpoint(**monitor)
    rest = {"ckpt_path": checkpoint(tmp_path / "cut"), "trainer": with_callbacks(best, **epochs)}
    fit(tiny_model, source, tmp_path / "rest", data=data, **rest, **slow)
    assert Path(best.best_model_path).is_relative_to(tmp_path / "rest") and "epoch=0" in best.best_model_path
    saved = load_file(tmp_path / "rest" / "adapter" / "adapter_model.safetensors")
    kept = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    kept = {key.replace(".policy", "").removeprefix("model."): value for key, value in kept.items()}
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)


def test_a_validation_that_was_cut_off_is_made_up_for(tiny_model: str, source: str, tmp_path: Path) -> None:
    """As if a kill had come between the checkpoint before the first validation and the next checkpoint."""
    data, trainer = {"validation": 0.2}, {"max_epochs": 2, "limit_val_batches": 1}
    stop = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_validation_batch_start")
    with pytest.raises(Stopped):
        fit(tiny_model, source, tmp_path / "cut", data=data, trainer=with_callbacks(stop, **trainer), **ADAMW)
    steps: dict[str, list[Any]] = {"whole": [], "rest": []}

    class Note(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            value = float(trainer.callback_metrics["val/all/sft_loss"])
            steps[self.name].append((trainer.global_step, value, trainer.state.fn))

    fit(tiny_model, source, tmp_path / "whole", data=data, trainer=with_callbacks(Note("whole"), **trainer), **ADAMW)
    rest = {"ckpt_path": checkpoint(tmp_path / "cut"), "trainer": with_callbacks(Note("rest"), **trainer)}
    fit(tiny_model, source, tmp_path / "rest", data=data, **rest, **ADAMW)
    assert [step for step, _, _ in steps["whole"]] == [5, 10] and steps["rest"] == steps["whole"]


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:the best checkpoint so far")
@pytest.mark.parametrize(
    ("mode", "crash_at", "options"),
    [
        ("max", 7, {}),  # the checkpoint precedes the first validation, which makes the first file
        ("min", 7, {}),
        ("min", 12, {}),  # the second validation has replaced the file that the checkpoint names
        ("min", 12, {"save_top_k": 2}),
    ],
)
def test_the_best_is_that_of_the_whole_run_wherever_it_was_cut(
    mode: str, crash_at: int, options: dict[str, Any], tiny_model: str, source: str, tmp_path: Path
) -> None:
    """By a crash, so that the checkpoint is one from before a validation, which acts at the end of its epoch."""
    data, epochs = {"validation": 0.2, "routing": Routing(hard_fraction=1.0)}, {"max_epochs": 3}
    best: dict[str, ModelCheckpoint] = {}

    def run(name: str, *callbacks: Any, ckpt_path: str | None = None) -> None:
        best[name] = ModelCheckpoint(monitor="val/all/sft_loss", mode=mode, **options)
        trainer = with_callbacks(best[name], *callbacks, **epochs)
        fit(tiny_model, source, tmp_path / name, data=data, trainer=trainer, ckpt_path=ckpt_path, **ADAMW)

    run("whole")
    with pytest.raises(Crash):
        run("cut", At(crash_at, crash))
    run("rest", ckpt_path=checkpoint(tmp_path / "cut"))
    assert best["rest"].best_model_score == best["whole"].best_model_score
    assert Path(best["rest"].best_model_path).name == Path(best["whole"].best_model_path).name
    assert adapter(tmp_path / "rest") == adapter(tmp_path / "whole")


def test_a_best_checkpoint_that_is_gone_is_told(tiny_model: str, source: str, tmp_path: Path) -> None:
    data, epochs = {"validation": 0.2}, {"max_epochs": 3}
    best = ModelCheckpoint(monitor="val/all/sft_loss")
    trainer = with_callbacks(At(9, crash), best, **epochs)
    trainer["callbacks"][-2] = LastCheckpoint(every_n_steps=1)
    with pytest.raises(Crash):
        fit(tiny_model, source, tmp_path / "cut", data=data, trainer=trainer, **ADAMW)
    Path(best.best_model_path).unlink()
    again = with_callbacks(ModelCheckpoint(monitor="val/all/sft_loss"), **epochs)
    with pytest.warns(UserWarning, match=r"epoch=0-step=5.ckpt, is not there any more"):
        cut = checkpoint(tmp_path / "cut")
        fit(tiny_model, source, tmp_path / "rest", data=data, ckpt_path=cut, trainer=again, **ADAMW)


def test_a_checkpoint_of_a_validation_owes_none(tiny_model: str, source: str, tmp_path: Path) -> None:
    """Else its score would count twice: as no improvement, which ends the run."""
    data = {"validation": 0.2, "routing": Routing(hard_fraction=1.0)}
    monitor: dict[str, Any] = {"monitor": "val/all/sft_loss", "mode": "min"}

    def callbacks() -> dict[str, Any]:
        early = EarlyStopping(patience=1, **monitor)
        return with_callbacks(early, ModelCheckpoint(save_top_k=-1, **monitor), val_check_interval=2, max_epochs=2)

    whole = fit(tiny_model, source, tmp_path / "whole", data=data, trainer=callbacks(), **ADAMW)
    (path,) = (tmp_path / "whole" / "checkpoints").glob("epoch=0-step=4.ckpt")
    assert torch.load(path, weights_only=True)["owes_validation"] == "no"
    rest = fit(tiny_model, source, tmp_path / "rest", data=data, trainer=callbacks(), ckpt_path=str(path), **ADAMW)
    assert same(rest, whole) and rest.trainer.global_step == whole.trainer.global_step > 4


def test_a_pause_adds_no_validation(tiny_model: str, source: str, tmp_path: Path) -> None:
    found: dict[str, list[int]] = {}

    def run(name: str, steps: int, ckpt_path: str | None = None) -> None:
        seen = found[name] = []
        note = Callback()
        note.on_validation_end = lambda trainer, *_: seen.append(trainer.global_step)  # type: ignore[method-assign]
        trainer = with_callbacks(ValidateAtMaxSteps(), note, max_steps=steps, val_check_interval=2)
        options = {"data": {"validation": 0.2}, "trainer": trainer, "ckpt_path": ckpt_path, **ADAMW}
        fit(tiny_model, source, tmp_path / name, **options)

    run("whole", 5)
    run("paused", 3)
    run("rest", 5, checkpoint(tmp_path / "paused"))
    assert found == {"whole": [2, 4, 5], "paused": [2, 3], "rest": [4, 5]}


@pytest.mark.parametrize("how", ["a signal in a validation", "max_time", "early stopping"])
def test_a_stop_in_the_middle_of_a_step_waits_for_its_end(
    how: str, tiny_model: str, source: str, tmp_path: Path
) -> None:
    """Two micro-batches are a step; but for max_time the stop comes in a validation after three."""
    every = 1.0 if how == "max_time" else 3
    data, trainer = {"validation": 0.2}, {"accumulate_grad_batches": 2, "val_check_interval": every, "max_epochs": 2}
    whole = fit(tiny_model, source, tmp_path / "whole", data=data, trainer=trainer, **ADAMW)

    class Timer(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1 and trainer.fit_loop._should_accumulate():
                trainer.should_stop = True

        def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
            assert trainer.sanity_checking or not trainer.fit_loop._should_accumulate()

    kill = At(1, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_validation_batch_start")
    early = At(1, lambda: setattr(early.trainer, "should_stop", True), "on_validation_end")
    early.setup = lambda trainer, *_, **__: setattr(early, "trainer", trainer)  # type: ignore[method-assign]
    stop = {"a signal in a validation": kill, "max_time": Timer(), "early stopping": early}[how]
    cut = {"data": data, "trainer": with_callbacks(stop, **trainer), **ADAMW}
    if stop is not kill:
        assert fit(tiny_model, source, tmp_path / "cut", **cut).trainer.global_step == 2
    else:
        with pytest.raises(Stopped):
            fit(tiny_model, source, tmp_path / "cut", **cut)
    assert torch.load(checkpoint(tmp_path / "cut"), weights_only=True)["global_step"] == 2
    rest = {"ckpt_path": checkpoint(tmp_path / "cut"), "trainer": trainer, "data": data}
    assert same(fit(tiny_model, source, tmp_path / "rest", **rest, **ADAMW), whole)


def test_a_checkpoint_from_the_middle_of_a_step_is_refused(tiny_model: str, source: str, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop._should_accumulate():
                trainer.save_checkpoint(tmp_path / "in.ckpt")

    trainer = {"accumulate_grad_batches": 2}
    fit(tiny_model, source, tmp_path / "cut", trainer=with_callbacks(Save(), **trainer), **ADAMW)
    with pytest.raises(InputError, match="in the middle of an optimizer step"):
        fit(tiny_model, source, tmp_path / "rest", ckpt_path=str(tmp_path / "in.ckpt"), trainer=trainer, **ADAMW)


def test_a_row_is_of_all_its_steps_in_a_continued_run_too(tiny_model: str, source: str, tmp_path: Path) -> None:
    rows = {}
    for name, options in {"whole": {}, "cut": {"max_steps": 2}, "rest": {}}.items():
        logger = CSVLogger(str(tmp_path / name), name="", version="")
        path = checkpoint(tmp_path / "cut") if name == "rest" else None
        trainer = with_callbacks(logger=logger, log_every_n_steps=4, **options)
        fit(tiny_model, source, tmp_path / name, ckpt_path=path, trainer=trainer, **ADAMW)
        if name != "cut":  # which ends before its first row
            with (tmp_path / name / "metrics.csv").open(newline="") as file:
                rows[name] = list(csv.DictReader(file))
    assert rows["rest"] == rows["whole"] and rows["whole"][0]["step"] == "3"


def test_after_an_early_stop_a_signal_ends_at_once(tiny_model: str, source: str, tmp_path: Path) -> None:
    handlers = []

    class Look(Callback):
        def on_train_end(self, *_: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

    early = EarlyStopping("val/all/sft_loss", mode="max", patience=1)
    trainer = with_callbacks(early, Look(), max_epochs=9)
    run = fit(tiny_model, source, tmp_path / "run", data={"validation": 0.2}, trainer=trainer, **ADAMW)
    assert run.trainer.current_epoch < 9 and handlers == [signal.SIG_DFL]


# What a run may be continued with.


def test_more_steps_continue_exactly_where_the_schedule_was_made_for_them(
    tiny_model: str, source: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = ADAMW | {"schedule": StagedCosine(warmup=0.2), "schedule_steps": 5}
    whole = fit(tiny_model, source, tmp_path / "whole", **options)
    fit(tiny_model, source, tmp_path / "cut", trainer={"max_steps": 2}, **options)
    assert same(fit(tiny_model, source, tmp_path / "rest", ckpt_path=checkpoint(tmp_path / "cut"), **options), whole)


def test_more_steps_are_refused_where_the_schedule_was_made_for_fewer(
    tiny_model: str, source: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = ADAMW | {"schedule": StagedCosine(warmup=0.2)}
    fit(tiny_model, source, tmp_path / "cut", trainer={"max_steps": 3}, **options)
    with pytest.raises(InputError, match=r"step \d+ had .* × peak.*StagedCosine.*steps, now 5.*schedule_steps"):
        fit(tiny_model, source, tmp_path / "rest", ckpt_path=checkpoint(tmp_path / "cut"), **options)
    with pytest.raises(InputError, match="less than the run's 5 steps"):
        fit(tiny_model, source, tmp_path / "short", schedule_steps=4, **ADAMW)


def other_base(model: str, folder: Path) -> str:
    """The same architecture and tokenizer with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    changed = AutoModelForCausalLM.from_pretrained(model)
    changed.model.norm.weight.data.mul_(1.5)
    changed.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("data", {"rows": [row | {"chosen": f"{row['chosen']} red"} for row in make_pairs(20)]}),
        ("route", {"rows": [row | {"margin": -row["margin"]} for row in make_pairs(20)]}),
        ("template", {"data": {"chat_template": TEMPLATE + " "}}),
        ("lengths", {"data": {"max_length": 60}}),
        ("base", {"base": True}),
        ("preference_loss", {"preference_loss": IPO()}),
        ("optimizer.lr", {"lr": 2e-2}),
        ("gradient_clip_val", {"trainer": {"gradient_clip_val": 1.0}}),
        ("gradient_clip_algorithm", {"trainer": {"gradient_clip_algorithm": "value"}}),
        ("batch_size", {"data": {"batch_size": 2}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_changed_is_named(
    named: str, change: dict[str, Any], tiny_model: str, source: str, tmp_path: Path, stopped_after_two: str
) -> None:
    change = dict(change)
    base = other_base(tiny_model, tmp_path / "base") if change.pop("base", False) else tiny_model
    pairs = write_pairs(tmp_path / "other.jsonl", change.pop("rows")) if "rows" in change else source
    with pytest.raises(InputError, match=rf"another run \({named}: |; {named}: "):
        fit(base, pairs, tmp_path / "rest", ckpt_path=stopped_after_two, **(ADAMW | change))


@pytest.fixture(scope="module")
def stopped_after_two(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("stopped")
    pairs = write_pairs(folder / "pairs.jsonl", make_pairs(20))
    fit(tiny_model, pairs, folder / "cut", trainer={"max_steps": 2}, **ADAMW)
    return checkpoint(folder / "cut")


class Own:
    """A loss without a repr."""

    def __init__(self, beta: float, inner: Any = DPO.__call__) -> None:
        self.beta, self.inner, self.calls = beta, inner, 0

    def __call__(self, *sequences: Any) -> torch.Tensor:
        self.calls += 1
        return DPO(self.beta)(*sequences)


class OwnModule(torch.nn.Module):
    """One without extra_repr."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, *sequences: Any) -> torch.Tensor:
        return DPO(self.beta)(*sequences)


@pytest.mark.parametrize("kind", [Own, OwnModule])
def test_a_loss_of_ones_own_is_continued_with_the_same_numbers_only(
    kind: Any, tiny_model: str, source: str, tmp_path: Path
) -> None:
    fit(tiny_model, source, tmp_path / "cut", preference_loss=kind(0.1), trainer={"max_steps": 1}, **ADAMW)
    cut = {"ckpt_path": checkpoint(tmp_path / "cut"), "trainer": {"max_steps": 2}}
    with pytest.raises(InputError, match=r"\(preference_loss: .*0\.1.* there, .*0\.2.* here\)"):
        fit(tiny_model, source, tmp_path / "other", preference_loss=kind(0.2), **cut, **ADAMW)
    assert fit(tiny_model, source, tmp_path / "rest", preference_loss=kind(0.1), **cut, **ADAMW).global_step == 2


# Numbers that are not finite.


class BadOnce(DPO):
    """DPO, but the first pair of its third call has a loss that is not finite."""

    calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        BadOnce.calls += 1
        losses = super().__call__(*arguments)
        return losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1)) if BadOnce.calls == 3 else losses


@pytest.mark.parametrize("every", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_gets_into_a_checkpoint(
    every: int, tiny_model: str, source: str, tmp_path: Path
) -> None:
    BadOnce.calls = 0
    trainer = {"log_every_n_steps": every, "callbacks": [NonFinite(), RunFiles(), LastCheckpoint(every_n_steps=2)]}
    with pytest.raises(NonFiniteError) as error:
        fit(tiny_model, source, tmp_path / "run", trainer=trainer, preference_loss=BadOnce(), **ADAMW)
    report = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert report["step"] == 2 and len(report["rows"]) == 4
    (bad,) = [row for row in report["rows"] if row["loss"] == "nan"]
    row = json.loads(Path(source).read_text().splitlines()[bad["row"] - 1])
    assert bad["chosen"] == f"{row['chosen']} <|im_end|>" and bad["rejected"] == f"{row['rejected']} <|im_end|>"
    said = str(error.value)
    assert f"step 2 has a loss of row {bad['row']} of {source}" in said and "non_finite.json" in said
    assert report["again"] in said and checkpoint(tmp_path / "run") in report["again"]
    saved = torch.load(checkpoint(tmp_path / "run"), weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_such_a_step_can_be_left_out(tiny_model: str, source: str, tmp_path: Path) -> None:
    """The optimizer does not move in it, and all others are made."""
    BadOnce.calls, weights = 0, []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            weights.append(adapter_weights(pl_module))

    trainer = {"callbacks": [NonFinite("skip"), Watch(), RunFiles(), LastCheckpoint()]}
    module = fit(tiny_model, source, tmp_path / "run", trainer=trainer, preference_loss=BadOnce(), **ADAMW)
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    assert moved == [True, False, True, True]
    assert all(value.isfinite().all() for value in adapter_weights(module).values())
    assert json.loads((tmp_path / "run" / "non_finite.json").read_text())["step"] == 2


# Disk and memory.


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    tiny_model: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("lightning_modules.callbacks.checkpoint.shutil.disk_usage", lambda _: usage(10**9, 10**9, 1000))
    trainer, module, pairs = build(tiny_model, source, tmp_path / "run", **ADAMW)
    with pytest.raises(OutOfSpaceError, match=r"run has 0 MB free.*take 0 MB.*--runs"):
        trainer.fit(module, pairs)
    assert trainer.global_step == 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(
    tiny_model: str, source: str, tmp_path: Path
) -> None:
    """The kernel refuses files of more than 20 kB from the third step on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = At(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    trainer = {"callbacks": [small, RunFiles(), LastCheckpoint(every_n_steps=1)]}
    try:
        with pytest.raises(OutOfSpaceError, match=r"checkpoint of step 3 .*checkpoints: File too large"):
            fit(tiny_model, source, tmp_path / "run", trainer=trainer, **ADAMW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(checkpoint(tmp_path / "run"), weights_only=True)["global_step"] == 2


def test_out_of_memory_says_what_to_change(tiny_model: str, source: str, tmp_path: Path) -> None:
    class Full(DPO):
        def __call__(self, *arguments: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(tiny_model, source, tmp_path / "run", trainer=with_callbacks(), preference_loss=Full(), **ADAMW)
    said = _for_the_user(error.value)
    assert said is not None and "4 pairs with" in said and "tokens" in said
    assert "trainer.accumulate_grad_batches 2 (now 1, at most 4)" in said and "data.max_length 32 (now 64)" in said


def test_out_of_memory_in_a_validation(tiny_model: str, source: str, tmp_path: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = with_callbacks()
    trainer["callbacks"].append(At(5, full, "on_validation_batch_start"))
    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(tiny_model, source, tmp_path / "run", data={"validation": 0.2}, trainer=trainer, **ADAMW)
    said = _for_the_user(error.value)
    assert said is not None and "data.eval_batch_size 1 (now 8)" in said and "accumulate_grad_batches" not in said


def test_out_of_memory_after_the_last_step_is_no_micro_batchs_fault(
    tiny_model: str, source: str, tmp_path: Path
) -> None:
    """Such as where GoldEvaluation responses."""

    class Full(Callback):
        def on_train_end(self, *_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(tiny_model, source, tmp_path / "run", trainer=with_callbacks(Full()), **ADAMW)
    assert _for_the_user(error.value) == "out of memory: CUDA out of memory"


def test_a_signal_ends_at_once_what_is_done_again_after_the_last_step(
    tiny_model: str, source: str, tmp_path: Path
) -> None:
    """No step is left that could be finished first."""
    fit(tiny_model, source, tmp_path / "run", **ADAMW)
    handlers = []

    class Look(Callback):
        def on_train_end(self, *_: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGINT))

    again = {"ckpt_path": checkpoint(tmp_path / "run"), "trainer": with_callbacks(Look())}
    fit(tiny_model, source, tmp_path / "again", **again, **ADAMW)
    assert not any(isinstance(getattr(handler, "__self__", None), LastCheckpoint) for handler in handlers)
    assert len(handlers) == 1
