"""What the processes of one run tell each other: numbers at every step, shards when asked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class StepChannel:
    """Exchanges a few numbers a step between all processes, on the CPU.

    A gloo group of its own, so that the numbers never wait for the accelerator. In a single
    process everything is the identity. Building it is a collective call.
    """

    def __init__(self) -> None:
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self._group = None
        if self.world > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def gather(self, *values: float) -> Tensor:
        """(world, len(values)) float64: row r holds what process r gave."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return mine.unsqueeze(0)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(rows, mine, group=self._group)
        return torch.stack(rows)

    def any(self, flag: bool) -> bool:
        """Whether any process gave True."""
        return bool(self.gather(float(flag)).any())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which is a collective call; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
