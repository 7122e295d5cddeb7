"""Difficulty signals: what configs name."""

from mixdpo.options import lazily

NAMES = ("CHES", "ImplicitReward", "PolicyLogProb", "Rating", "RewardModel")

__getattr__, __dir__ = lazily(__name__, dict.fromkeys(NAMES, "signals"))
