"""Bad input ends in one named error that says where and what to do, or in a tolerance with a count; never otherwise.

The table is in bad_input/: each row is executed here, and what happened is what counts.
"""

import re
from pathlib import Path

import pytest
from bad_input import checkpoints, models, options, pairs, samples, stored, studies, templates
from bad_input.case import Case, Place, Shared
from bad_input.runs import BORNE, RUNS, Run
from test_cli import in_process, in_shell, message_of

from mixdpo.errors import InputError

MODULES = (pairs, samples, templates, models, options, stored, checkpoints, studies)
CASES = [case for module in MODULES for case in module.CASES]
IGNORED = (":Already found a `peft_config` attribute", ":Found missing adapter keys", "::ResourceWarning")
pytestmark = pytest.mark.filterwarnings(*(f"ignore{each}" for each in IGNORED))


@pytest.fixture(scope="session")
def shared(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("shared"), tiny_model)


@pytest.fixture
def place(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, shared)


def outcome(case: Case, place: Place) -> tuple[str, str]:
    try:
        said = case.do(place)
    except InputError as error:
        return "named error", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    counted = isinstance(said, str) and re.search(r"\d", said)
    return "tolerated with count" if counted else "nothing", str(said)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case(case: Case, place: Place) -> None:
    kind, said = outcome(case, place)
    assert kind == ("tolerated with count" if case.tolerated else "named error"), said
    assert not [part for part in case.says if part not in said], said
    assert len(said) < 1500


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run(run: Run, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    status = in_process(*run.arguments(place))
    said = message_of(status, capfd.readouterr().err)
    assert not [part for part in run.says if part not in said], said
    assert not list((place.folder / "runs").rglob("*")), "something half-written is left"


@pytest.mark.parametrize("run", BORNE, ids=lambda run: run.name)
def test_a_run_that_goes_on(run: Run, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    status = in_process(*run.arguments(place), "--trainer.max_steps", "1", "--data.validation", "0")
    assert not status and all(part in caplog.text for part in run.says), caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS[::12], ids=lambda run: run.name)
def test_a_process(run: Run, place: Place) -> None:
    """The same by exit status and stderr of a real process."""
    said = message_of(*in_shell(*run.arguments(place)))
    assert not [part for part in run.says if part not in said], said
