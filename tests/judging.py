"""What the tests of judging share: responses to judge, a judge in this process or one of its own, a server likewise."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from judge_server import Request

from mixdpo.evaluation.judge import judge
from mixdpo.evaluation.verdicts import Verdict, read_verdicts

STARTED: list[subprocess.Popen[str]] = []
"""Judges in processes of their own."""


def write_responses(folder: Path, count: int) -> tuple[str, str]:
    """RESPONSES and BASELINE; prompt i asks `prompt-i`."""
    for who in ("model", "baseline"):
        rows = [{"instruction": f"prompt-{i}: say it", "output": f"{who} response {i}"} for i in range(count)]
        for i, row in enumerate(rows):
            row |= {"generator": f"the {who}"}
            row |= {"tokens": i, "ended": i % 2 == 0} if who == "model" else {"dataset": "x"}
        (folder / f"{who}.json").write_text(json.dumps(rows))
    return str(folder / "model.json"), str(folder / "baseline.json")


class Judging:
    """A judge of so many prompts in a folder; options as for `judge`."""

    def __init__(self, folder: Path, url: str, count: int = 6, **options: Any) -> None:
        responses, baseline = write_responses(folder, count)
        self.path = folder / "model.verdicts.sqlite"
        self.options = {"responses": responses, "baseline": baseline, "model": "m", "base_url": url, **options}

    def __call__(self, **options: Any) -> int:
        return judge(**{**self.options, **options})

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """In a process of its own."""
        given = {**self.options, **options}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
        environment |= {"NO_PROXY": "127.0.0.1"}
        words = [f"--{name}={value}" for name, value in given.items() if name != "responses"]
        command = [sys.executable, "-m", "mixdpo", "judge", str(given["responses"]), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        STARTED.append(subprocess.Popen(command, env=environment, **pipes))
        return STARTED[-1]

    @property
    def verdicts(self) -> dict[tuple[int, str], Verdict]:
        return {verdict.key: verdict for verdict in read_verdicts(self.path)[1]}

    def lines(self) -> int:
        """Verdicts in the file, which a judge may be writing to."""
        place = f"file:{self.path}?mode=ro&immutable=1"
        with suppress(sqlite3.Error), closing(sqlite3.connect(place, uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM entries").fetchone()[0])
        return 0


def in_turn(request: Request) -> dict[str, float]:
    """Prefers the model's response to even prompts, wherever it is shown."""
    wins = "X" if (request.order == "model_first") == (request.number % 2 == 0) else "Y"
    return {wins: 0.9, "X" if wins == "Y" else "Y": 0.1}


def wait_for(met: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def ends_with(process: subprocess.Popen[str], status: int) -> str:
    """What a judge said, which ended so."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, (process.returncode, out, err)
    return out + err


class ServerProcess:
    """The server in a process of its own, on one port, with a log of what it responded to."""

    def __init__(self, log: Path, seconds: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address, self.log = free.getsockname(), log
        script = str(Path(__file__).with_name("judge_server.py"))
        self.command = [sys.executable, script, str(self.address[1]), str(log), seconds]
        self.url = f"http://127.0.0.1:{self.address[1]}/v1"

    def start(self) -> None:
        self.process = subprocess.Popen(self.command)
        wait_for(self._listens)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "ServerProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        while STARTED:  # judges that a failed test has left
            STARTED[-1].kill()
            STARTED.pop().communicate()

    def _listens(self) -> bool:
        with socket.socket() as attempt:
            return attempt.connect_ex(self.address) == 0

    def answered(self) -> Counter[tuple[int, str]]:
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return Counter((int(number), order) for number, order in lines)
