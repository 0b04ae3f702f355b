"""The packed form of a 2:4 matrix: half its values and a 4-bit code for every group of four.

A code is two 2-bit places, the lower one first: places i < j make i + 4 j, one of 4, 8, 9, 12, 13,
14. Groups with fewer than two nonzeros keep zeros too, at the places that torch's conversion
chooses: 0 or 1 alone goes with place 2 or 2, everything else is (2, 3). float32 has its own form
in hardware, 1:2, whose codes describe float16 halves: 4 keeps the first of two values, 14 the
second.

Two layouts of the codes:

* ``hardware``: what CUTLASS's sparse kernels read, and bit for bit what
  ``torch.sparse._semi_structured_conversions`` makes. Four codes an int16, eight an int32 for
  int8. Rows are interleaved and 2x2 blocks of these transposed, columns are stored in pairs.
* ``rows``: two codes a byte in order, for storage: widths that fill no tile, and float32 or float64
  2:4, which no hardware multiplies.

A negative zero comes back as zero; every other value comes back bit for bit.

Shapes: R rows, C columns, leading dimensions (experts) in front; Q = C / 4 codes a row (C / 2 for
1:2), K meta elements a row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import TWO_FOUR
from tiny_onn.sparse.pattern import NMPattern, refuse_nonfinite

Layout = Literal["hardware", "rows"]
ONE_TWO = NMPattern(1, 2)
CODES = (4, 8, 9, 12, 13, 14)
CODES_OF_ONE_TWO = (4, 14)
HARDWARE: dict[tuple[torch.dtype, tuple[int, int]], tuple[int, int, torch.dtype]] = {
    (torch.float16, (2, 4)): (32, 32, torch.int16),
    (torch.bfloat16, (2, 4)): (32, 32, torch.int16),
    (torch.int8, (2, 4)): (16, 64, torch.int32),
    (torch.float32, (1, 2)): (32, 16, torch.int16),
}
"""(type, pattern) -> multiples of rows and columns, type of the meta elements."""
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)


class PackedTensor(NamedTuple):
    """values (..., R, C n / m) in the tensor's type; meta (..., R, K): int16 or int32 in the
    hardware's order, uint8 in the layout ``rows``. Two plain tensors, to be saved as they are;
    everything else follows from them.
    """

    values: Tensor
    meta: Tensor

    @property
    def layout(self) -> Layout:
        return "rows" if self.meta.dtype == torch.uint8 else "hardware"

    @property
    def pattern(self) -> NMPattern:
        codes = self.meta.shape[-1] * self.meta.element_size() * 2
        return ONE_TWO if self.values.shape[-1] == codes else TWO_FOUR

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., R, C) of the dense tensor."""
        return (*self.values.shape[:-1], 2 * self.values.shape[-1])

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.meta.nbytes


def violations(x: Tensor, pattern: NMPattern = TWO_FOUR) -> Tensor:
    """int64 (V, x.dim()): the groups with more than n nonzeros, in order.

    Each row is an index of x grouped (``pattern.group``): for a matrix (row, group) where the
    groups run along its rows, (column, group) where they run along its columns.

    Raises:
        UserError: a size that m does not divide.
    """
    return ((pattern.group(x) != 0).sum(-1) > pattern.n).nonzero()


def refuse_violations(x: Tensor, pattern: NMPattern = TWO_FOUR) -> None:
    """Raises:
    UserError: some group has more than n nonzeros; how many do, and where the first is.
    """
    found = violations(x, pattern)
    if not len(found):
        return
    *where, group = (int(i) for i in found[0])
    names = ["row" if pattern.dim in (-1, x.dim() - 1) else "column"] if len(where) == 1 else []
    leading = f"{names[0]} {where[0]}" if names else f"row {tuple(where)}"
    count = int((pattern.group(x)[tuple(found[0])] != 0).sum())
    raise UserError(
        f"{len(found)} groups break {pattern}, the first in {leading}, group {group} "
        f"(entries {group * pattern.m} to {group * pattern.m + pattern.m - 1}): {count} nonzeros; "
        "mask the tensor first (topk_mask), nothing was packed"
    )


def _refuse_unfit(x: Tensor, pattern: NMPattern, layout: str) -> None:
    """Type, pattern and sizes: everything but the values."""
    shape, name = tuple(x.shape), str(x.dtype).removeprefix("torch.")
    if layout not in ("hardware", "rows"):
        raise UserError(f"unknown layout {layout!r}; choose hardware or rows")
    if x.dim() < 2 or pattern.dim not in (-1, x.dim() - 1):
        raise UserError(
            f"packing takes a matrix grouped along its last dimension, got {shape} and dimension "
            f"{pattern.dim}; transpose it first"
        )
    if layout == "rows":
        if x.dtype not in STORED or (pattern.n, pattern.m) not in ((2, 4), (1, 2)):
            raise UserError(
                f"layout rows holds 2:4 or 1:2 of "
                f"{', '.join(str(d).removeprefix('torch.') for d in STORED)}, got {pattern} of "
                f"{name}"
            )
        rows, columns = 1, 2 * pattern.m
    else:
        known = HARDWARE.get((x.dtype, (pattern.n, pattern.m)))
        if known is None:
            raise UserError(
                f"no sparse tensor core takes {pattern} of {name}; pack 2:4 of float16, bfloat16 "
                "or int8, 1:2 of float32, or use layout rows to store it"
            )
        rows, columns, _ = known
    if x.shape[-2] % rows or x.shape[-1] % columns or 0 in shape:
        raise UserError(
            f"packing {pattern} of {name} needs rows and columns in multiples of {rows} and "
            f"{columns}, got {shape}; " + ("use layout rows" if rows > 1 else "pad the columns")
        )


def _encode(groups: Tensor) -> Tensor:
    """int64 (..., Q) codes of groups (..., Q, 4), or of pairs (..., Q, 2) for 1:2."""
    filled = groups != 0
    if groups.shape[-1] == 2:
        return torch.where(filled[..., 0], 4, 14)
    table = torch.empty(16, dtype=torch.int64)
    for bits in range(16):  # those with three or four ones are never looked up
        places = [i for i in range(4) if bits >> i & 1][:2]
        alone = (places[0], 2) if places in ([0], [1]) else (2, 3)
        low, high = places if len(places) == 2 else alone
        table[bits] = low + 4 * high
    weights = torch.tensor([1, 2, 4, 8], device=groups.device)
    return table.to(groups.device)[(filled * weights).sum(-1)]


def _places(codes: Tensor, m: int) -> Tensor:
    """int64 (..., Q, n): places within a group that its code keeps."""
    if m == 2:
        return (codes == 14).long().unsqueeze(-1)
    return torch.stack([codes & 3, codes >> 2], dim=-1)


def _interleave(rows: int, meta_dtype: torch.dtype) -> tuple[int, int]:
    """Groups of eight rows that are interleaved, and of these those that are not a 2x2 block's."""
    interleaved = 4 if meta_dtype == torch.int16 else 2
    assert rows % (8 * interleaved) == 0, (rows, meta_dtype)
    return interleaved, interleaved // 2


def _to_hardware(meta: Tensor) -> Tensor:
    """(..., R, K) in the hardware's order.

    Row 8 (I i + b) + c of I = 4 (int32: 2) eights goes to place 8 I i + I c + b; then each 2x2
    block of places and columns is transposed; then pairs of columns follow each other whole.
    """
    *lead, rows, columns = meta.shape
    interleaved, halves = _interleave(rows, meta.dtype)
    d = len(lead)
    parts = meta.reshape(*lead, rows // (8 * interleaved), halves, 2, 8, columns // 2, 2)
    # i, b // 2, b % 2, c, column // 2, column % 2  ->  column // 2, i, c, b // 2, column % 2, b % 2
    order = (*range(d), d + 4, d, d + 3, d + 1, d + 5, d + 2)
    return parts.permute(order).reshape(meta.shape)


def _from_hardware(meta: Tensor) -> Tensor:
    """Inverse of :func:`_to_hardware`."""
    *lead, rows, columns = meta.shape
    interleaved, halves = _interleave(rows, meta.dtype)
    d = len(lead)
    parts = meta.reshape(*lead, columns // 2, rows // (8 * interleaved), 8, halves, 2, 2)
    order = (*range(d), d + 1, d + 3, d + 5, d + 2, d, d + 4)
    return parts.permute(order).reshape(meta.shape)


@torch.no_grad()
def pack(x: Tensor, pattern: NMPattern = TWO_FOUR, layout: Layout = "hardware") -> PackedTensor:
    """Pack a tensor that holds at most n nonzeros a group; see the module for the two layouts.

    Args:
        x: (..., R, C). ``hardware``: float16 or bfloat16 with R a multiple of 32 and C of 32, int8
            with 16 and 64, or float32 as 1:2 with 32 and 16. ``rows``: those and float64, C a
            multiple of 2 m.
        pattern: 2:4 or 1:2 along the last dimension.

    Raises:
        UserError: a type, pattern or size that the layout does not hold, a NaN or infinity, a
            group with too many nonzeros. Nothing is truncated, nothing packed.
    """
    _refuse_unfit(x, pattern, layout)
    if x.is_floating_point():
        refuse_nonfinite(x, pattern, "the tensor to pack")
    refuse_violations(x, pattern)
    groups = pattern.group(x)
    codes = _encode(groups)
    values = groups.gather(-1, _places(codes, pattern.m)).flatten(-2)
    meta_dtype = (
        torch.uint8 if layout == "rows" else HARDWARE[x.dtype, (pattern.n, pattern.m)][2]
    )
    per_element = meta_dtype.itemsize * 2
    shifts = torch.arange(per_element, device=x.device) * 4
    meta = (codes.unflatten(-1, (-1, per_element)) << shifts).sum(-1)
    bits = 8 * meta_dtype.itemsize
    if meta_dtype.is_signed:  # the highest code holds the sign bit
        meta = torch.where(meta >= 1 << (bits - 1), meta - (1 << bits), meta)
    meta = meta.to(meta_dtype)
    return PackedTensor(values, meta if layout == "rows" else _to_hardware(meta))


@torch.no_grad()
def unpack(packed: PackedTensor) -> Tensor:
    """(..., R, C), the tensor that was packed.

    Raises:
        UserError: values and meta that belong to no packed tensor: types, shapes, codes.
    """
    values, meta = packed
    n, m = packed.pattern.n, packed.pattern.m
    fits = (
        meta.dtype in (torch.uint8, torch.int16, torch.int32)
        and meta.shape[:-1] == values.shape[:-1]
        and meta.shape[-1] * meta.element_size() * 2 * n == values.shape[-1]
    )
    if fits and packed.layout == "hardware":
        eights = 16 if meta.dtype == torch.int32 else 32
        fits = meta.shape[-2] % eights == 0 and meta.shape[-1] % 2 == 0
    if not fits:
        raise UserError(
            f"values {tuple(values.shape)} and meta {tuple(meta.shape)} of {meta.dtype} make no "
            "packed tensor; read both from one file"
        )
    if packed.layout == "hardware":
        meta = _from_hardware(meta)
    shifts = torch.arange(meta.element_size() * 2, device=meta.device) * 4
    codes = ((meta.long().unsqueeze(-1) >> shifts) & 15).flatten(-2)
    legal = torch.tensor(CODES_OF_ONE_TWO if m == 2 else CODES, device=meta.device)
    if not torch.isin(codes, legal).all():
        raise UserError(
            f"packed meta holds codes other than {legal.tolist()}: the file is damaged or of "
            "another layout; pack the tensor again"
        )
    dense = values.new_zeros(*codes.shape, m)
    dense.scatter_(-1, _places(codes, m), values.unflatten(-1, codes.shape[-1:] + (-1,)))
    return dense.flatten(-2)


def packed_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, pattern: NMPattern = TWO_FOUR
) -> int:
    """Bytes of a packed tensor, either layout: n/m of the values and 4 bits a code.

    Of the dense tensor that is 0.5625 for float16 2:4 and float32 1:2, 0.625 for int8 2:4,
    0.53125 for float32 2:4.
    """
    entries = 1
    for size in shape:
        entries *= size
    return entries // pattern.m * pattern.n * dtype.itemsize + entries // pattern.m // 2
