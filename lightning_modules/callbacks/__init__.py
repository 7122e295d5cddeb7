"""Callbacks that configs name, imported when they are asked for."""

from mixdpo.options import lazily

__getattr__, __dir__ = lazily(__name__, {"GoldEvaluation": "gold_evaluation", "RefreshReference": "clean_tokens"})
