"""Compatibility: `from miles.utils.types import Sample` in modules written for Miles."""

from miles.types import RolloutOutput, Sample, SampleGroup, Status

__all__ = ["RolloutOutput", "Sample", "SampleGroup", "Status"]
