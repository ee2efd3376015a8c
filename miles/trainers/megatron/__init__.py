"""The megatron-core trainer. Importing this package prepares torch for megatron on machines without a GPU."""

from . import cpu

cpu.install()

from .trainer import MegatronTrainer  # noqa: E402  (megatron must be imported after install)

__all__ = ["MegatronTrainer"]
