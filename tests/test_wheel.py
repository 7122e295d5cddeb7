"""The wheel alone, built from the sdist, in a virtual environment and an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tarfile import TarFile
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mixdpo", "lightning_modules", "datamodules", "configs")
COMPARE = "compare demo --with dpo --seeds 1 --dry_run true"
INSPECT = "inspect constraints --config demo --data.limit 8 --data.validation 0.4"
CUT = "--data.limit 8 --data.validation 0.4 --trainer.max_steps 1 --trainer.callbacks"


def in_folder(folder: Path, *command: str | Path) -> str:
    """What a command prints. The clone is not on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "data-*", "runs")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "clone" / name, ignore=left_out)
    for file in [*ROOT.glob("*.*"), ROOT / "LICENSE", ROOT / "Makefile"]:
        if file.is_file():
            shutil.copy(file, folder / "clone")
    call = "from setuptools.build_meta import *; build_{}('..')"
    in_folder(folder / "clone", sys.executable, "-c", call.format("sdist"))
    (sdist,) = folder.glob("*.tar.gz")
    with TarFile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    in_folder(folder / sdist.name.removesuffix(".tar.gz"), sys.executable, "-c", call.format("wheel"))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """bin/ of an environment with the wheel. Its other packages are those of the tests, without the editable install:
    a .pth file is read in site-packages itself, and not in a folder that another .pth file adds."""
    home = wheel.parent / "venv"
    in_folder(wheel.parent, sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin/python"
    in_folder(
        wheel.parent, sys.executable, *f"-m pip --python {python} install -q --no-index --no-deps {wheel}".split()
    )
    site = in_folder(home, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "tests.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


@pytest.mark.long
def test_the_wheel_has_every_file(wheel: Path) -> None:
    files = {path.relative_to(ROOT) for room in PACKAGES for path in (ROOT / room).rglob("*.*") if path.is_file()}
    names = {str(path) for path in files if path.suffix != ".pyc"}
    expected = {f"mixdpo/{name}" if name.startswith("configs/") else name for name in names}
    assert {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


@pytest.mark.real
@pytest.mark.long
@pytest.mark.timeout(900)
def test_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    mixdpo, python = installed / "mixdpo", installed / "python"
    where = in_folder(tmp_path, python, "-c", "import mixdpo, datamodules as d; print(mixdpo.__file__, d.__file__)")
    assert all(Path(file).is_relative_to(installed.parent) for file in where.split())
    listed = in_folder(tmp_path, mixdpo, "configs")
    assert re.search("^controls/dpo +DPO on all pairs", listed, re.MULTILINE) and listed.count("\n") > 50
    plan = in_folder(tmp_path, mixdpo, *COMPARE.split())
    assert plan.count("mixdpo fit --config ") == 2 and f"{installed.parent}/lib" in plan
    page = in_folder(tmp_path, mixdpo, *INSPECT.split())
    assert "wrote constraints.inspect.html" in page
    rows = (ROOT / "mixdpo/constraints/constraints_heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:2]))
    gold = {"class_path": "lightning_modules.callbacks.GoldEvaluation"}
    gold["init_args"] = {"prompts": "few.jsonl", "max_new_tokens": 8, "batch_size": 2}
    in_folder(tmp_path, mixdpo, "fit", "--config", "demo", *CUT.split(), json.dumps([gold]))
    run = tmp_path / "runs/demo"
    assert json.loads((run / "results.json").read_text())["steps"] == 1
    assert (run / "adapter/adapter_model.safetensors").exists() and (run / "report.html").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "few.jsonl", "constraints.inspect.html"}


@pytest.mark.real
@pytest.mark.long
@pytest.mark.skipif(not (page := ROOT / "docs/library.md").exists(), reason="docs/library.md is not there")
def test_the_script_of_the_page_about_the_library(installed: Path, tmp_path: Path) -> None:
    scripts = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "script.py").write_text(scripts[0])
    in_folder(tmp_path, installed / "python", "script.py")
