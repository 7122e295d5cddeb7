"""Break the code on purpose, one patch at a time, and demand that the test named in the patch turns red.

`python tests/mutants/run.py [NAME …]`

A mutant `NAME.patch` is a unified diff under two lines, `# test: FILE::TEST` and `# why it matters: …`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ("mixdpo", "lightning_modules", "datamodules", "benchmarks", "tests", "run.py", "setup.cfg", "configs")
OUTCOMES = {0: "SURVIVED", 1: "killed", 2: "INTERRUPTED", 3: "CRASHED", 4: "WRONG TEST NAME", 5: "NO SUCH TEST"}


def named_test(patch: Path) -> str:
    head = re.match(r"# test: (\S+::\S+)\n# why it matters: .+\n", patch.read_text("utf-8"))
    if not head:
        sys.exit(f"{patch}: should begin with '# test: FILE::TEST' and '# why it matters: …'")
    return head[1]


def copy_sources(folder: Path) -> None:
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)


def pytest(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Exit status 0 is green, 1 is red, any other tells nothing."""
    # an editable install points at the original: the copy has to come first
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def outcome(patch: Path, test: str, folder: Path) -> str:
    command = ["patch", "-p1", "--forward", "--fuzz=0", "--input", str(patch)]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        return "THE PATCH NO LONGER APPLIES"
    done = pytest(folder, test)
    if done.returncode == 1 and not re.search("^FAILED ", done.stdout, re.MULTILINE):
        return "ERROR OUTSIDE THE TEST"  # a fixture's error is exit status 1 as well
    return OUTCOMES.get(done.returncode, f"EXIT STATUS {done.returncode}")


def main(names: list[str]) -> None:
    patches = [patch for patch in sorted(HERE.glob("*.patch")) if not names or patch.stem in names]
    tests = {patch: named_test(patch) for patch in patches}
    with tempfile.TemporaryDirectory() as root:
        copy_sources(Path(root))
        unpatched = pytest(Path(root), *dict.fromkeys(tests.values()))
    if unpatched.returncode:
        sys.exit(f"the named tests should pass unpatched:\n{unpatched.stdout[-3000:]}{unpatched.stderr}")
    killed = 0
    for patch, test in tests.items():
        with tempfile.TemporaryDirectory() as root:
            copy_sources(Path(root))
            result = outcome(patch, test, Path(root))
        killed += result == "killed"
        print(f"{result:10} {patch.stem} ({test})", flush=True)
    print(f"{killed} of {len(patches)} mutants killed")
    sys.exit(killed != len(patches) or not patches)


if __name__ == "__main__":
    main(sys.argv[1:])
