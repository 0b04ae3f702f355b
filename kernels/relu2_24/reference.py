"""ReLU^2, token-wise 2:4 and packing, in PyTorch: the definition.

    r = ReLU(x)    y = r^2    m = among the two largest r of its group, and y != 0
    packed: the values y o m, two a group, and where they stand
    dx = 2 dy r where m, else 0

A group is four neighbours along the features; of equals the lower one is kept, and a NaN ranks
below zero. Squares have the order of r, so r is compared: a square that overflows still ranks
rightly. ReLU^2: So et al., arXiv
2109.08668; 2:4 activations: Haziza et al., arXiv 2503.16672.

Shapes: T tokens, F features, V = F / 2 packed values, B = ceil(F / 8) bytes, G = F / 4 groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nn_functional
from torch import Tensor


class Packed24(NamedTuple):
    """A 2:4 sparse activation, row by row.

    values: (T, F / 2), dtype of x; the two values of each group, in the order of their positions.
    codes: (T, B) uint8, four bits a group, the even group in the low half: two bits the position of
    the first value, two that of the second (0100, 1000, 1001, 1100, 1101 or 1110: what torch's
    conversion for CUTLASS has; seen as int16 these are its words before they are reordered). The
    odd half of a last byte that has but one group is 0.
    bits: (T, B) uint8; bit i of byte b: feature 8 b + i is kept and not zero.
    flags: (2,) int32; 1 where a square that is kept, of a finite number, is not finite in x's
    dtype; 1 where x is not finite.
    """

    values: Tensor
    codes: Tensor
    bits: Tensor
    flags: Tensor


def require_features(x_TF: Tensor) -> None:
    """Raises ValueError where rows have no whole groups."""
    if x_TF.ndim != 2 or x_TF.shape[1] % 4:
        raise ValueError(
            f"got activations of {tuple(x_TF.shape)}, expected (tokens, features), features a "
            "multiple of 4; flatten the tokens and round the width up"
        )
    if not x_TF.is_floating_point():
        raise ValueError(f"got activations of {x_TF.dtype}, expected floating point")


def require_same(grad_TF: Tensor, x_TF: Tensor, bits_TB: Tensor) -> None:
    """Raises ValueError where the arguments of the gradient do not fit each other."""
    require_features(x_TF)
    expected = (x_TF.shape[0], -(-x_TF.shape[1] // 8))
    if grad_TF.shape != x_TF.shape or grad_TF.dtype != x_TF.dtype:
        raise ValueError(
            f"got a gradient of {tuple(grad_TF.shape)}, {grad_TF.dtype}, for activations of "
            f"{tuple(x_TF.shape)}, {x_TF.dtype}; expected the same"
        )
    if bits_TB.shape != expected or bits_TB.dtype != torch.uint8:
        raise ValueError(
            f"got bits of {tuple(bits_TB.shape)}, {bits_TB.dtype}, expected {expected} of uint8"
        )


def require_finite(flags: Tensor, dtype: torch.dtype) -> None:
    """Waits for the device; raises ValueError where a square overflowed or x was not finite."""
    overflowed, not_finite = flags.tolist()
    if not_finite:
        raise ValueError("got activations with NaN or infinity; nothing is packed; find the cause")
    if overflowed:
        most = torch.finfo(dtype).max
        raise ValueError(
            f"got activations whose squares exceed {most:g}, the largest of {dtype}; nothing is "
            "packed; use bfloat16 or scale the activations down"
        )


def _bytes(half_TG: Tensor) -> Tensor:
    """(T, B): four bits of every group, the even group in the low half."""
    half_TG = nn_functional.pad(half_TG, (0, half_TG.shape[1] % 2))
    return (half_TG[:, ::2] | (half_TG[:, 1::2] << 4)).to(torch.uint8)


def _positions(kept_TG4: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first and the second value of each group stand, as torch's conversion puts them:
    zeros beside a lone value, or in an empty group, come from the higher positions."""
    k0_TG, k1_TG, _, k3_TG = kept_TG4.unbind(-1)
    two = torch.full_like(k0_TG, 2, dtype=torch.int64)
    first_TG = torch.where(k0_TG, 0, torch.where(k1_TG, 1, two))
    second_TG = torch.where(k3_TG | (first_TG == 2), 3, two)
    return first_TG, torch.where(k0_TG & k1_TG, 1, second_TG)


def unpack_bits(bits_TB: Tensor, num_features: int) -> Tensor:
    """(T, F) bool."""
    shift_8 = torch.arange(8, device=bits_TB.device)
    mask_TF = ((bits_TB.unsqueeze(-1) >> shift_8) & 1).flatten(1)
    return mask_TF[:, :num_features].bool()


def unpack(packed: Packed24) -> Tensor:
    """(T, F): the dense tensor that values and codes stand for."""
    num_tokens, num_values = packed.values.shape
    num_groups = num_values // 2
    half_TG = torch.stack([packed.codes & 15, packed.codes >> 4], dim=-1).flatten(1)
    half_TG = half_TG[:, :num_groups].long()
    place_TG2 = torch.stack([half_TG & 3, half_TG >> 2], dim=-1)
    dense_TG4 = packed.values.new_zeros(num_tokens, num_groups, 4)
    values_TG2 = packed.values.reshape(num_tokens, num_groups, 2)
    return dense_TG4.scatter_(2, place_TG2, values_TG2).flatten(1)


def cutlass_metadata(codes_TB: Tensor) -> Tensor:
    """(T, F / 16) int16: the codes in the order in which CUTLASS reads words of four groups.

    With row t = 32 a + 16 b + 8 c + d and column 2 p + q of the words, word (t, 2 p + q) goes to
    place (p, a, d, b, q, c) of a row-major tensor: 32 rows are interwoven by 8, blocks of two by
    two transposed, and pairs of columns stored one pair after the other.

    Raises:
        ValueError: T or F no multiple of 32 (the products want 64 of F).
    """
    num_tokens, num_bytes = codes_TB.shape
    if num_tokens % 32 or num_bytes % 4:
        raise ValueError(
            f"got codes of {num_tokens} tokens and {8 * num_bytes} features, expected multiples of "
            "32; pad the tokens and round the width up"
        )
    words_TW = codes_TB.contiguous().view(torch.int16)
    words_abcdpq = words_TW.reshape(num_tokens // 32, 2, 2, 8, num_bytes // 4, 2)
    return words_abcdpq.permute(4, 0, 3, 1, 5, 2).reshape(words_TW.shape)


def _relu(x: Tensor) -> Tensor:
    return torch.where(x <= 0, torch.zeros_like(x), x)  # NaN stays


def _keep(x_TF: Tensor) -> Tensor:
    """(T, F) bool: m."""
    r_TF = _relu(x_TF.detach())
    r_TG4 = r_TF.masked_fill(r_TF.isnan(), -1.0).reshape(len(x_TF), x_TF.shape[1] // 4, 4)
    best_TG2 = r_TG4.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    kept_TG4 = torch.zeros_like(r_TG4, dtype=torch.bool).scatter_(2, best_TG2, True)
    return kept_TG4.flatten(1) & (r_TF.square() != 0)


def relu2_24(x_TF: Tensor, check: bool = False) -> Packed24:
    """ReLU^2, 2:4 and packed; without gradient (:func:`relu2_24_gradient` has it).

    Args:
        x_TF: before the activation; F a multiple of 4; float16, bfloat16, float32 or float64.
        check: waits for the device, to refuse numbers that are not finite.

    Raises:
        ValueError: no whole groups; with ``check``, squares that overflow, or NaN.
    """
    require_features(x_TF)
    x_TF = x_TF.detach()
    y_TF, kept_TF = _relu(x_TF).square(), _keep(x_TF)
    groups = (len(x_TF), x_TF.shape[1] // 4, 4)
    kept_TG4 = kept_TF.reshape(groups)
    place_TG2 = torch.stack(_positions(kept_TG4), dim=-1)
    values_TG2 = torch.where(kept_TF, y_TF, 0.0).reshape(groups).gather(2, place_TG2)
    weight_4 = torch.tensor([1, 2, 4, 8], device=x_TF.device)
    overflows = (kept_TF & y_TF.isinf() & x_TF.isfinite()).any()
    flags = torch.stack([overflows, ~x_TF.isfinite().all()]).int()
    if check:
        require_finite(flags, x_TF.dtype)
    return Packed24(
        values=values_TG2.flatten(1),
        codes=_bytes(place_TG2[..., 0] | (place_TG2[..., 1] << 2)),
        bits=_bytes((kept_TG4 * weight_4).sum(dim=-1)),
        flags=flags,
    )


def relu2_24_gradient(
    grad_TF: Tensor, x_TF: Tensor, bits_TB: Tensor, pack: bool = False
) -> tuple[Tensor, Tensor]:
    """2 dy ReLU(x) where the forward pass kept x, else 0.

    Args:
        grad_TF: by y, of x's shape and dtype.
        x_TF: as the forward pass had it.
        bits_TB: of :class:`Packed24`.
        pack: also the two values of every group, which stand where the forward pass's codes say.

    Returns:
        dx (T, F), and its values (T, F / 2), or (T, 0) without ``pack``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    require_same(grad_TF, x_TF, bits_TB)
    kept_TF = unpack_bits(bits_TB, x_TF.shape[1])
    wide = torch.promote_types(x_TF.dtype, torch.float32)
    slope_TF = 2 * grad_TF.to(wide) * _relu(x_TF).to(wide)
    dx_TF = torch.where(kept_TF, slope_TF, 0.0).to(x_TF.dtype)
    if not pack:
        return dx_TF, dx_TF.new_empty(len(dx_TF), 0)
    groups = (len(x_TF), x_TF.shape[1] // 4, 4)
    place_TG2 = torch.stack(_positions(kept_TF.reshape(groups)), dim=-1)
    return dx_TF, dx_TF.reshape(groups).gather(2, place_TG2).flatten(1)


def relu2_24_dense(x_TF: Tensor) -> Tensor:
    """(T, F): ReLU^2 with zeros where 2:4 drops it; differentiable, with the forward mask kept."""
    return relu2_24_dense_bits(x_TF)[0]


def relu2_24_dense_bits(x_TF: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`relu2_24_dense`, and ``bits`` of :class:`Packed24`, for products that take no packed
    operand."""
    require_features(x_TF)
    kept_TF = _keep(x_TF)
    weight_4 = torch.tensor([1, 2, 4, 8], device=x_TF.device)
    bits_TB = _bytes((kept_TF.unflatten(1, (x_TF.shape[1] // 4, 4)) * weight_4).sum(dim=-1))
    return torch.where(kept_TF, _relu(x_TF).square(), 0.0), bits_TB
