"""`mixdpo VERB`: what needs no Trainer."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mixdpo.errors import InputError, check_one_of

# verb: (module, function, what it does); the module is imported only when its verb is used.
VERBS = {
    "make-pairs": (
        "mixdpo.evaluation.make_pairs",
        "make_pairs",
        "sample a model, score the samples, write preference pairs",
    ),
    "report": ("mixdpo.token_cleaning.report", "report", "show what token cleaning cut, or compare two margins files"),
    "study": (
        "mixdpo.evaluation.study_run",
        "study",
        "run a grid of runs from one file, then a table with intervals and plots",
    ),
    "options": ("mixdpo.options", "options", "what a class that a config names takes"),
    "judge": ("mixdpo.evaluation.judge", "judge", "ask a judge whether a model's outputs or a baseline's are better"),
    "score": ("mixdpo.evaluation.score", "score", "win rates from a judge's verdicts, length-controlled as well"),
    "lm-eval": ("mixdpo.evaluation.harness", "evaluate", "the papers' benchmarks on a run's policy, by lm-eval"),
    "export": (
        "mixdpo.model.export",
        "export",
        "write a run's policy as an adapter or a plain model for other tools",
    ),
    "export-labels": (
        "mixdpo.token_cleaning.run_tokens",
        "export_labels",
        "write a run's cleaned labels as a data set",
    ),
}


POSITIONAL = set(VERBS) - {"make-pairs"}  # verbs whose required arguments have no name on the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: its own (0 if it has none), or 2 for bad input."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        check_one_of("the verb", verb, VERBS)
        from jsonargparse import auto_cli

        from mixdpo.options import Parser

        module, function, _ = VERBS[verb]
        if verb == "report" and any(map(Path.is_file, map(Path, rest))) and not any(map(Path.is_dir, map(Path, rest))):
            module, function = "mixdpo.signals.compare_margins", "compare"
        options = {"prog": f"mixdpo {verb}", "as_positional": verb in POSITIONAL, "parser_class": Parser}
        status = auto_cli(getattr(import_module(module), function), args=rest, **options)
    except InputError as error:
        print(f"mixdpo {verb}: {error}", file=sys.stderr)
        return 2
    return status or 0


def _usage() -> str:
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {verb:<{width}}  {what}" for verb, (_, _, what) in VERBS.items())
    return f"usage: mixdpo VERB [options]\n\nverbs:\n{listed}\n\nmixdpo VERB --help lists a verb's options."


if __name__ == "__main__":
    sys.exit(main())
