"""Callbacks that configs name, imported when they are asked for."""

from mixdpo.options import lazily

HOMES = {"GoldEvaluation": "gold_evaluation", "RefreshReference": "clean_tokens", "run_callbacks": "run_files"}
__getattr__, __dir__ = lazily(__name__, HOMES)
