"""Callbacks that configs name."""

from lightning_modules.callbacks.clean_tokens import RefreshReference
from lightning_modules.callbacks.gold_evaluation import GoldEvaluation

__all__ = ["GoldEvaluation", "RefreshReference"]
