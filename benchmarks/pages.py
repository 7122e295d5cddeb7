"""Makes the pages that `mixdpo report` draws, from real runs: OUT/mixdpo.html, dpo.html, cleaned.html, comparison.html.

    python benchmarks/pages.py OUT [options of run.py …]     # for a quick look: --data.limit 24 --trainer.max_steps 4

The runs are those of configs/demo.yaml, of its control dpo, and of configs/mixdpo_cleaned.yaml; OUT/runs has them.
"""

import subprocess
import sys
from pathlib import Path

from mixdpo.evaluation.report import report

RUNS = {
    "mixdpo": ["configs/demo.yaml"],
    "dpo": ["configs/demo.yaml", "configs/controls/dpo.yaml"],
    "cleaned": ["configs/mixdpo_cleaned.yaml"],
}


def main() -> None:
    out, options = Path(sys.argv[1]), sys.argv[2:]
    for name, configs in RUNS.items():
        if not (out / "runs" / name / "report.html").exists():  # one that a run ended with
            command = [word for config in configs for word in ("--config", config)]
            command += ["--runs", str(out / "runs"), "--name", name, *options]
            subprocess.run([sys.executable, "run.py", *command], check=True)
        report([str(out / "runs" / name)], out=str(out / f"{name}.html"))
    report([str(out / "runs" / name) for name in RUNS], out=str(out / "comparison.html"))


if __name__ == "__main__":
    main()
