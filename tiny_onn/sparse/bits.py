"""Masks at one bit an entry: what shared weights cost per expert.

Shapes: C entries of the last dimension, B = ceil(C / 8) bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.errors import UserError


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 (..., B) of a bool mask (..., C): entry 8 b + i is bit i, the lowest first, of byte b.

    Raises:
        UserError: not bool, or without dimensions.
    """
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise UserError(
            f"got {mask.dtype} {tuple(mask.shape)}; expected a bool mask to pack; compare it with 0"
        )
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, entries: int) -> Tensor:
    """bool (..., entries) of :func:`pack_bits`'s bytes.

    Raises:
        UserError: not uint8, or the bytes of another number of entries.
    """
    if bits.dtype != torch.uint8 or bits.dim() == 0 or bits.shape[-1] != -(-entries // 8):
        raise UserError(
            f"got {bits.dtype} {tuple(bits.shape)}; expected {-(-entries // 8)} bytes of uint8 a "
            f"row for {entries} bits; pack the mask again"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :entries].bool()
