"""Weights from trainer to engines: HF-named tensors in buckets, over a transport, as one all-or-nothing publication.

Trainer.named_weights() --publish--> WeightTransport.send(bucket) --> every engine --> version v serves
"""

from .buckets import BucketLayout, TensorSlot, iter_buckets, layout
from .checksum import tensor_checksum
from .publish import PublishStats, publish
from .shm import SharedMemoryTransport
from .torch_sharing import TorchSharingTransport

__all__ = [
    "BucketLayout",
    "PublishStats",
    "SharedMemoryTransport",
    "TensorSlot",
    "TorchSharingTransport",
    "iter_buckets",
    "layout",
    "publish",
    "tensor_checksum",
]
