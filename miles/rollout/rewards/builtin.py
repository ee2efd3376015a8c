"""Registers the built-in rewards."""

from . import answers, instructions, reward_model, rules, shape

__all__ = ["answers", "instructions", "reward_model", "rules", "shape"]
