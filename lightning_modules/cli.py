"""The command line: `mixdpo VERB …` and `python run.py …`. Lightning is imported only where a verb needs a Trainer."""

import os
import sys
from collections.abc import Sequence
from pkgutil import resolve_name

from mixdpo import __main__ as verbs
from mixdpo.errors import Stopped
from mixdpo.first_look import first_look


def main(arguments: Sequence[str] | None = None) -> int:
    """`mixdpo VERB …`; returns the exit status of a verb that needs no Trainer."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.append(os.getcwd())  # classes of the user's own, as with python run.py
    if arguments[:1] and arguments[0] in verbs.RUN_VERBS:
        run(arguments)
        return 0
    return verbs.main(arguments)


def run(arguments: list[str] | None = None) -> None:
    """`run.py …`: a user's mistake is one message on stderr and exit status 1, and leaves no empty run folder."""
    arguments = first_look(sys.argv[1:] if arguments is None else arguments)
    # before torch is imported, which reads either name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    verbs.quieten()
    from lightning_modules.verbs import messages, run_cli

    try:
        own = {"estimate": "estimate:estimate", "inspect": "estimate:inspect", "cross-fit": "cross_fit:cross_fit"}
        if arguments[:1] and arguments[0] in own:
            return resolve_name(f"lightning_modules.verbs.{own[arguments[0]]}")(arguments[1:])
        run_cli.start(arguments)
    except Stopped as stop:
        sys.exit(128 + stop.signal)  # LastCheckpoint has printed the command that continues
    except Exception as error:
        if (message := messages.message_for_user(error)) is None:
            raise
        sys.exit(f"error: {message}")


if __name__ == "__main__":  # of a study's runs, in any folder
    run()
