"""`mixdpo VERB`: the verbs that need no Trainer."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from itertools import takewhile
from pkgutil import resolve_name

from mixdpo.errors import InputError, check_one_of

# The verbs of lightning_modules.cli, and what each does.
RUN_VERBS = {
    "fit": "train a policy",
    "validate": "measure a checkpoint on the held-out rows",
    "predict": "write a signal's margins of pairs, or a model's responses to prompts",
    "test": "score a model's responses to prompts",
    "inspect": "say what a run will make of its data, before anything is trained: counts, cuts, lengths, memory",
    "estimate": "predict the memory and hours of a run of a config on a GPU",
    "cross-fit": "write margins of pairs, each by a model that was trained on the other half of them",
}
# verb: (function, what it does). A function is imported only when its verb is used.
VERBS = {
    "make-pairs": ("evaluation.make_pairs:make_pairs", "sample a model, score the samples, write preference pairs"),
    "compare-margins": ("signals.compare_margins:compare", "compare two margins files: ranks and hard sets"),
    "combine-margins": ("signals.compare_margins:combine", "one margins file from two: alignment potential, or union"),
    "report": ("evaluation.report:report", "write a page of pictures of a run, or of several runs against the first"),
    "study": ("evaluation.study_run:study", "run a grid of runs from one file, then a table with intervals"),
    "chat": ("evaluation.chat:chat", "talk to a run's policy, and to its base beside it"),
    "compare": ("evaluation.compare:compare", "whether routing by margin helps: a config against controls, over seeds"),
    "options": ("options:options", "list the options of a class that a config names"),
    "configs": ("storage.shipped:configs", "list the configs that come with MixDPO, by the names that --config takes"),
    "judge": ("evaluation.judge:judge", "ask a judge whether a model's responses or a baseline's are better"),
    "score": ("evaluation.score:score", "win rates from a judge's verdicts, length-controlled as well"),
    "lm-eval": ("evaluation.harness:evaluate", "the papers' benchmarks on a run's policy, by lm-eval"),
    "export": ("model.export:export", "write a run's policy as an adapter or a plain model for other tools"),
    "export-labels": ("token_cleaning.run_tokens:export_labels", "write a run's cleaned labels as a data set"),
}


def quieten() -> None:
    """Silence what third parties say of themselves, and without a terminal their progress bars too."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|.*isinstance.treespec|.*does not have many workers")
    # on CPUs with AVX-512 BF16, bitsandbytes warns of a missing kernel that only inference would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # of Lightning: advertisement, and what the lines of a run say
    said = re.compile("litlogger|` reached|^Seed set to|^(GPU|TPU) available")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not said.search(record.getMessage()))
    if not sys.stderr.isatty():
        # read when datasets and huggingface_hub are imported
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the verb's exit status (0 if the verb gives none), or 2 for bad input."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        lines = RUN_VERBS | {verb: what for verb, (_, what) in VERBS.items()}
        listed = "\n".join(f"  {verb:<15}  {what}" for verb, what in lines.items())
        print(f"usage: mixdpo VERB [options]\n\nverbs:\n{listed}\n\nmixdpo VERB --help lists a verb's options.")
        return 0
    try:
        check_one_of("the verb", verb, (*RUN_VERBS, *VERBS))
        if verb in RUN_VERBS:
            raise InputError(f"this verb needs Lightning: type python run.py {verb}, or mixdpo {verb}")
        from jsonargparse import auto_cli

        from mixdpo.first_look import FirstLook, bare_config
        from mixdpo.options import Parser
        from mixdpo.storage.shipped import find_configs

        _, *rest = find_configs(bare_config([verb, *rest]))
        FirstLook(verb, *rest)
        quieten()
        if verb == "compare":  # options of run.py may follow
            return resolve_name("mixdpo.evaluation.compare:compare")(rest)
        if verb == "report" and (runs := list(takewhile(lambda word: not word.startswith("-"), rest))):
            rest = [json.dumps(runs), *rest[len(runs) :]]  # jsonargparse takes a list as one argument
        # make-pairs takes its required arguments by name, the other verbs by position
        options = {"prog": f"mixdpo {verb}", "as_positional": verb != "make-pairs", "parser_class": Parser}
        return auto_cli(resolve_name(f"mixdpo.{VERBS[verb][0]}"), args=rest, **options) or 0
    except InputError as error:
        print(f"mixdpo {verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
