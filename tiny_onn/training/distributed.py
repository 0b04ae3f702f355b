"""What the processes of one run tell each other: numbers at every step, shards when asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``value``, which every process holds whole, sharded as ``like`` is.

    Nothing is communicated. As it is where ``like`` is not sharded.
    """
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def set_where(tensor: Tensor, where: Tensor, values: Tensor) -> None:
    """``tensor[where] = values[where]`` in place, sharded or not; ``where`` (bool) and ``values``
    are whole, on any device, and the same in every process."""
    full = whole(tensor.detach())
    new = torch.where(where.to(full.device), values.to(full), full)
    tensor.copy_(sharded_like(new, tensor))


@torch.no_grad()
def set_rows(tensor: Tensor, rows: Sequence[int], values: Tensor | float) -> None:
    """``tensor[rows] = values`` in place, sharded or not; every process must give the same."""
    full = whole(tensor.detach())
    full[list(rows)] = values if isinstance(values, float) else values.to(full)
    if isinstance(tensor, DTensor):
        tensor.copy_(sharded_like(full, tensor))
