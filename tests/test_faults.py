"""What a run does when it is stopped, when a number is not finite, and when disk or memory run out."""

import json
import os
import resource
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import adapter_weights, fit, make_pairs, same
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from test_cli import last_step, metrics

from lightning_modules.callbacks.checkpoint import ExactResume, LastCheckpoint
from lightning_modules.callbacks.faults import NonFinite, OutOfMemory
from lightning_modules.callbacks.run_files import RunFiles
from lightning_modules.verbs.messages import message_for_user
from mixdpo.errors import InputError, NonFiniteError, Stopped
from mixdpo.losses import DPO
from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant, StagedCosine

SOURCE_ROWS = make_pairs(20)
ADAMW: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr": 1e-2, "schedule": Constant(warmup=0.0)}
VALIDATED = {"validation": 0.2}
HARD = {"validation": 0.2, "routing": Routing(hard_fraction=1.0)}
TWO = {"accumulate_grad_batches": 2}


@pytest.fixture(scope="module")
def run(tiny_model: str, source: str) -> Callable[..., Any]:
    """Train in a folder, with callbacks before those of every run, in five steps an epoch; returns the module. The run
    continues the one in the folder `after`, or of that checkpoint."""

    def train(folder: Path, *callbacks: Any, after: Any = None, every: int = 50, trainer: Any = None, **options: Any):
        ours = [*callbacks, RunFiles(), ExactResume(), LastCheckpoint(every_n_steps=every), OutOfMemory()]
        path = after and (checkpoint(after) if after.is_dir() else str(after))
        trainer = {"callbacks": ours, **(trainer or {})}
        return fit(tiny_model, source, folder, trainer=trainer, ckpt_path=path, **(ADAMW | options))

    return train


@pytest.fixture(scope="module")
def whole(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The module of a run that was never stopped; each such run is made once."""
    modules: dict[str, Any] = {}

    def trained(**options: Any) -> Any:
        if str(options) not in modules:
            modules[str(options)] = run(tmp_path_factory.mktemp("whole"), **options)
        return modules[str(options)]

    return trained


def checkpoint(folder: Path) -> str:
    return str(folder / "checkpoints" / "last.ckpt")


class At(Callback):
    """Do something in the hook `when` of optimizer step `step`."""

    def __init__(self, step: int, action: Callable[[], Any], when: str = "on_train_batch_start") -> None:
        self.step, self.action, self.done = step, action, False
        setattr(self, when, self._act)

    def _act(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.done and not trainer.sanity_checking:
            self.done = True
            self.action()


def terminate(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_it_is_continued_exactly(number, run, whole, tmp_path, capsys) -> None:
    """In the first of two micro-batches of the third step."""
    cut = tmp_path / "cut"
    with pytest.raises(Stopped) as stopped:
        run(cut, At(2, lambda: terminate(number)), trainer=TWO)
    assert stopped.value.signal == number
    assert last_step(cut) == 3
    assert f"the same script in another folder, ckpt_path='{checkpoint(cut)}'" in capsys.readouterr().err
    assert not (cut / "adapter").exists()
    assert same(run(tmp_path / "rest", after=cut, trainer=TWO), whole(trainer=TWO))


def test_a_second_signal_ends_it_at_once(run: Any, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):  # Lightning's end of a KeyboardInterrupt
        run(tmp_path, At(2, lambda: [terminate(signal.SIGINT) for _ in range(2)]), every=1)
    signal.signal(signal.SIGINT, before)
    assert last_step(tmp_path) == 2


def test_the_step_that_a_signal_stops_at_is_logged(run: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, At(2, terminate), trainer={"logger": CSVLogger(str(tmp_path), name="", version="")})
    assert [row["step"] for row in metrics(tmp_path)] == ["0", "1", "2"]


def test_the_best_of_a_continued_run_may_be_older_than_it(run: Any, tmp_path: Path) -> None:
    """What falls is greatest after the first epoch; the run is stopped before it ends a second one."""
    options: dict[str, Any] = {"data": HARD, "trainer": {"max_epochs": 3}, "lr": 1e-3}
    first, best = (ModelCheckpoint(monitor="val/all/sft_loss", mode="max") for _ in range(2))
    with pytest.raises(Stopped):
        run(tmp_path / "cut", At(9, terminate), first, **options)
    run(tmp_path / "rest", best, after=tmp_path / "cut", **options)
    assert Path(best.best_model_path).is_relative_to(tmp_path / "rest") and "epoch=0" in best.best_model_path
    saved = load_file(tmp_path / "rest" / "adapter" / "adapter_model.safetensors")
    kept = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    kept = {key.replace(".policy", "").removeprefix("model."): value for key, value in kept.items()}
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)


def test_a_validation_that_was_cut_off_is_made_up_for(run: Any, tmp_path: Path) -> None:
    """As if a kill had come between the checkpoint before the first validation and the next checkpoint."""
    options: dict[str, Any] = {"data": VALIDATED, "trainer": {"max_epochs": 2, "limit_val_batches": 1}}
    with pytest.raises(Stopped):
        run(tmp_path / "cut", At(5, terminate, "on_validation_batch_start"), **options)
    assert last_step(tmp_path / "cut") == 5
    seen: dict[str, list[Any]] = {"whole": [], "rest": []}
    modules = []
    for name, after in (("whole", None), ("rest", tmp_path / "cut")):

        class Note(Callback):
            def on_validation_end(self, trainer: L.Trainer, *_: Any, name: str = name) -> None:
                value = float(trainer.callback_metrics["val/all/sft_loss"])
                seen[name].append((trainer.global_step, value, trainer.state.fn))

        modules.append(run(tmp_path / name, Note(), after=after, **options))
    assert [step for step, _, _ in seen["whole"]] == [5, 10] and seen["rest"] == seen["whole"] and same(*modules)


@pytest.mark.filterwarnings("ignore:the best checkpoint so far")
@pytest.mark.parametrize(("mode", "crash_at", "top"), [
    ("max", 7, 1),  # the checkpoint precedes the first validation, which makes the first file
    ("min", 7, 1),
    ("min", 12, 1),  # the second validation has replaced the file that the checkpoint names
    ("min", 12, 2),
])  # fmt: skip
def test_the_best_is_that_of_the_whole_run_wherever_it_was_cut(mode, crash_at, top, run, tmp_path) -> None:
    """By a crash, so that the checkpoint is one from before a validation, which acts at the end of its epoch."""
    best = {name: ModelCheckpoint(monitor="val/all/sft_loss", mode=mode, save_top_k=top) for name in ("whole", "rest")}
    cut = ModelCheckpoint(monitor="val/all/sft_loss", mode=mode, save_top_k=top)
    options: dict[str, Any] = {"data": HARD, "trainer": {"max_epochs": 3}}
    run(tmp_path / "whole", best["whole"], **options)
    with pytest.raises(Crash):
        run(tmp_path / "cut", cut, At(crash_at, crash), **options)
    run(tmp_path / "rest", best["rest"], after=tmp_path / "cut", **options)
    assert best["rest"].best_model_score == best["whole"].best_model_score
    assert Path(best["rest"].best_model_path).name == Path(best["whole"].best_model_path).name
    assert adapter(tmp_path / "rest") == adapter(tmp_path / "whole")


def test_a_checkpoint_of_a_validation_owes_none(run: Any, tmp_path: Path) -> None:
    """Else its score would count twice: as no improvement, which ends the run."""
    monitor: dict[str, Any] = {"monitor": "val/all/sft_loss", "mode": "min"}

    def train(name: str, after: Path | None = None) -> Any:
        callbacks = EarlyStopping(patience=1, **monitor), ModelCheckpoint(save_top_k=-1, **monitor)
        trainer = {"val_check_interval": 2, "max_epochs": 2}
        return run(tmp_path / name, *callbacks, after=after, data=HARD, trainer=trainer)

    expected = train("whole")
    path = tmp_path / "whole" / "checkpoints" / "epoch=0-step=4.ckpt"
    assert torch.load(path, weights_only=True)["owes_validation"] == "no"
    rest = train("rest", path)
    assert same(rest, expected) and rest.trainer.global_step == expected.trainer.global_step > 4


def test_a_pause_adds_no_validation(run: Any, tmp_path: Path) -> None:
    steps: dict[str, list[int]] = {"whole": [], "paused": [], "rest": []}
    for name, most, after in (("whole", 5, None), ("paused", 3, None), ("rest", 5, tmp_path / "paused")):
        note = Callback()
        note.on_validation_end = lambda trainer, *_, name=name: steps[name].append(trainer.global_step)  # type: ignore[method-assign]
        trainer = {"max_steps": most, "val_check_interval": 2}
        run(tmp_path / name, note, after=after, data=VALIDATED, trainer=trainer)
    assert steps == {"whole": [2, 4, 5], "paused": [2, 3], "rest": [4, 5]}


@pytest.mark.parametrize("how", ["a signal in a validation", "max_time", "early stopping"])
def test_a_stop_in_the_middle_of_a_step_waits_for_its_end(how: str, run: Any, whole: Any, tmp_path: Path) -> None:
    """Two micro-batches are a step; but for max_time the stop comes in a validation after three."""
    every = 1.0 if how == "max_time" else 3
    options: dict[str, Any] = {"data": VALIDATED, "trainer": {**TWO, "val_check_interval": every, "max_epochs": 2}}

    class Timer(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1 and trainer.fit_loop._should_accumulate():
                trainer.should_stop = True

        def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
            assert trainer.sanity_checking or not trainer.fit_loop._should_accumulate()

    kill = At(1, terminate, "on_validation_batch_start")
    early = At(1, lambda: setattr(early.trainer, "should_stop", True), "on_validation_end")
    early.setup = lambda trainer, *_, **__: setattr(early, "trainer", trainer)  # type: ignore[method-assign]
    stop = {"a signal in a validation": kill, "max_time": Timer(), "early stopping": early}[how]
    if stop is not kill:
        assert run(tmp_path / "cut", stop, **options).trainer.global_step == 2
    else:
        with pytest.raises(Stopped):
            run(tmp_path / "cut", stop, **options)
    assert last_step(tmp_path / "cut") == 2
    assert same(run(tmp_path / "rest", after=tmp_path / "cut", **options), whole(**options))


def test_a_checkpoint_from_the_middle_of_a_step_is_refused(run: Any, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop._should_accumulate():
                trainer.save_checkpoint(tmp_path / "in.ckpt")

    run(tmp_path / "cut", Save(), trainer=TWO)
    with pytest.raises(InputError, match="in the middle of an optimizer step"):
        run(tmp_path / "rest", after=tmp_path / "in.ckpt", trainer=TWO)


def test_a_row_is_of_all_its_steps_in_a_continued_run_too(run: Any, tmp_path: Path) -> None:
    for name, options in {"whole": {}, "cut": {"max_steps": 2}, "rest": {}}.items():  # cut ends before its first row
        trainer = {"logger": CSVLogger(str(tmp_path / name), name="", version=""), "log_every_n_steps": 4, **options}
        run(tmp_path / name, after=tmp_path / "cut" if name == "rest" else None, trainer=trainer)
    rows = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "rest") == rows and rows[0]["step"] == "3"


def test_after_the_last_step_a_signal_ends_at_once(run: Any, tmp_path: Path) -> None:
    """No step is left that could be finished first: after an early stop, and in a run that is complete already."""
    handlers: list[Any] = []
    look = LambdaCallback(on_train_end=lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    early = EarlyStopping("val/all/sft_loss", mode="max", patience=1)
    module = run(tmp_path / "early", early, look, data=VALIDATED, trainer={"max_epochs": 9})
    assert module.trainer.current_epoch < 9 and handlers == [signal.SIG_DFL]
    run(tmp_path / "run")
    run(tmp_path / "again", look, after=tmp_path / "run")
    assert len(handlers) == 2 and not isinstance(getattr(handlers[1], "__self__", None), LastCheckpoint)


def test_more_steps_continue_exactly_where_the_schedule_was_made_for_them(run: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": StagedCosine(warmup=0.2), "schedule_steps": 5}
    expected = run(tmp_path / "whole", **options)
    run(tmp_path / "cut", trainer={"max_steps": 2}, **options)
    assert same(run(tmp_path / "rest", after=tmp_path / "cut", **options), expected)


def test_more_steps_are_refused_where_the_schedule_was_made_for_fewer(run: Any, tmp_path: Path) -> None:
    schedule = StagedCosine(warmup=0.2)
    run(tmp_path / "cut", trainer={"max_steps": 3}, schedule=schedule)
    with pytest.raises(InputError, match=r"planned steps, now 5.*schedule_steps"):
        run(tmp_path / "rest", after=tmp_path / "cut", schedule=schedule)
    with pytest.raises(InputError, match="less than the run's 5 steps"):
        run(tmp_path / "short", schedule_steps=4)


class BadOnce(DPO):
    """DPO, but the first pair of its third call has a loss that is not finite."""

    calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        BadOnce.calls += 1
        losses = super().__call__(*arguments)
        return losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1)) if BadOnce.calls == 3 else losses


@pytest.mark.parametrize("every", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_gets_into_a_checkpoint(every, run, source, tmp_path) -> None:
    BadOnce.calls = 0
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, NonFinite(), every=2, trainer={"log_every_n_steps": every}, preference_loss=BadOnce())
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert report["step"] == 2 and len(report["rows"]) == 4
    (bad,) = [row for row in report["rows"] if row["loss"] == "nan"]
    row = json.loads(Path(source).read_text().splitlines()[bad["row"] - 1])
    assert bad["chosen"] == f"{row['chosen']} <|im_end|>" and bad["rejected"] == f"{row['rejected']} <|im_end|>"
    message = str(error.value)
    assert f"step 2 has a loss of row {bad['row']} of {source}" in message and "non_finite.json" in message
    assert report["again"] in message and checkpoint(tmp_path) in report["again"]
    saved = torch.load(checkpoint(tmp_path), weights_only=True)
    assert saved["global_step"] == 2 and all(value.isfinite().all() for value in saved["state_dict"].values())


def test_such_a_step_can_be_left_out(run: Any, tmp_path: Path) -> None:
    """The optimizer does not move in it, and all others are made."""
    BadOnce.calls, weights = 0, []
    watch = LambdaCallback(on_train_batch_end=lambda trainer, module, *_: weights.append(adapter_weights(module)))
    module = run(tmp_path, NonFinite("skip"), watch, preference_loss=BadOnce())
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    assert moved == [True, False, True, True]
    assert all(value.isfinite().all() for value in adapter_weights(module).values())
    assert json.loads((tmp_path / "non_finite.json").read_text())["step"] == 2


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(run: Any, tmp_path: Path) -> None:
    """The kernel refuses files of more than 20 kB from the third step on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = At(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    try:
        with pytest.raises(OSError, match=r"File too large: .*checkpoints/last.ckpt"):
            run(tmp_path, small, every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last_step(tmp_path) == 2


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_says_what_to_change(run: Any, tmp_path: Path) -> None:
    step = ("4 pairs with", "trainer.accumulate_grad_batches 2 (now 1, at most 4)", "data.max_length 32 (now 64)")
    validation = ("data.eval_batch_size 1 (now 8)",)
    end = ("out of memory: CUDA out of memory",)  # where GoldEvaluation generates: no micro-batch is at fault
    for callback, says, says_not in (
        (At(1, full, "on_before_backward"), step, "eval_batch_size"),
        (At(5, full, "on_validation_batch_start"), validation, "accumulate_grad_batches"),
        (LambdaCallback(on_train_end=full), end, "micro-batch"),
    ):
        # the callback comes after those of the run: a hook of theirs has seen the batch
        last = {"callbacks": [RunFiles(), OutOfMemory(), callback]}
        with pytest.raises(torch.OutOfMemoryError) as error:
            run(tmp_path / says[0], data=VALIDATED, trainer=last)
        message = message_for_user(error.value)
        assert message is not None and all(part in message for part in says) and says_not not in message
