"""The megatron-core trainer."""

from . import cpu

cpu.prepare()

from .trainer import MegatronTrainer  # noqa: E402  (megatron is imported after that)

__all__ = ["MegatronTrainer"]
