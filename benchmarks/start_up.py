"""CPU time until a misspelt command is refused, or help is printed: `python benchmarks/start_up.py > TABLE.md`."""

import resource
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_first_look import REFUSED  # noqa: E402

HELPS = ["--help", "fit --help", "--config configs/demo.yaml --help", "mixdpo --help"]
MIXDPO = ["-c", "import sys; from lightning_modules.cli import main; sys.exit(main())"]


def seconds(command: str) -> tuple[float, str]:
    """CPU time of one process, and what it prints."""
    words = shlex.split(command)
    program = [*MIXDPO, *words[1:]] if words[0] == "mixdpo" else ["run.py", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, done.stderr + done.stdout


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    cpu = next(line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    print(f"# Start-up\n\n`python benchmarks/start_up.py`, commit {commit.strip()},{cpu}.\n")
    print("| command | CPU seconds | answer |\n|---|---|---|")
    spent = []
    for command in [*REFUSED, *HELPS]:
        took, printed = seconds(command)
        spent.append(took)
        answer = (
            f"did you mean {printed.partition('did you mean ')[2].split('?')[0]}?" if command in REFUSED else "help"
        )
        print(f"| `{command if command.startswith('mixdpo') else f'run.py {command}'}` | {took:.2f} | {answer} |")
    print(f"\nLongest: {max(spent):.2f} s.")


if __name__ == "__main__":
    main()
