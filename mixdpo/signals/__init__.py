"""Difficulty signals: what configs name."""

from mixdpo.signals.signals import CHES, ImplicitReward, PolicyLogProb, Rating, RewardModel

__all__ = ["CHES", "ImplicitReward", "PolicyLogProb", "Rating", "RewardModel"]
