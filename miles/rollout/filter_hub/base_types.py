"""Compatibility: `DynamicFilterOutput` where modules written for Miles look for it."""

from miles.interfaces import DynamicFilterOutput

__all__ = ["DynamicFilterOutput"]
