"""Messages between pipeline stages whose micro-batches differ in tokens.

stage --shape, then activations--> next stage          stage --shape, then gradients--> stage before
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor


class StageLinks(P2PCommunicator):
    """Megatron's, with shapes sent in the order of what they announce.

    Megatron's own exchange of shapes mixes up the two directions where both neighbours are one rank, as in an interleaved
    pipeline of two.
    """

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        device: Any = torch.cuda.current_device()

        def announced(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64, device=device)

        def place(wanted: bool) -> Tensor | None:
            return torch.zeros(3, dtype=torch.int64, device=device) if wanted else None

        from_prev, from_next = place(recv_prev), place(recv_next)
        # Kept until they have been sent.
        to_prev, to_next = announced(tensor_send_prev), announced(tensor_send_next)
        requests = p2p_communication._p2p_ops(
            tensor_send_prev=to_prev,
            tensor_recv_prev=from_prev,
            tensor_send_next=to_next,
            tensor_recv_next=from_next,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        torch.cuda.synchronize()
        nothing = [0, 0, 0]
        return (
            nothing if from_prev is None else from_prev.tolist(),
            nothing if from_next is None else from_next.tolist(),
        )
