"""The packed form against torch's own conversion, round trips, sizes and refusals."""

import itertools

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import apply_mask, topk_mask
from tiny_onn.sparse.packed import (
    ONE_TWO,
    PackedTensor,
    pack,
    packed_bytes,
    refuse_violations,
    unpack,
    violations,
)
from tiny_onn.sparse.pattern import NMPattern, patterns

TWO_FOUR = NMPattern()
HARDWARE = [
    (torch.float16, TWO_FOUR, (32, 32)),
    (torch.bfloat16, TWO_FOUR, (32, 32)),
    (torch.int8, TWO_FOUR, (16, 64)),
    (torch.float32, ONE_TWO, (32, 16)),
]
STORED = [
    *((dtype, pattern) for dtype, pattern, _ in HARDWARE),
    (torch.float32, TWO_FOUR),
    (torch.float64, TWO_FOUR),
    (torch.float16, ONE_TWO),
]


def sparse(shape, dtype, pattern, zeros=0.4):
    """Random, n:m, and with groups of every smaller number of nonzeros."""
    torch.manual_seed(0)
    x = torch.randint(-120, 120, shape).to(dtype) if dtype == torch.int8 else torch.randn(shape)
    x = apply_mask(x, topk_mask(x, pattern) & (torch.rand(shape) > zeros))
    return x.to(dtype)


def bits(x):
    """Values as integers, so that NaN-free equality is of bits."""
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize(("dtype", "pattern", "tile"), HARDWARE, ids=lambda v: str(v))
@pytest.mark.parametrize("tiles", [(1, 1), (1, 3), (4, 1), (3, 4)])
def test_bit_for_bit_what_torch_makes(dtype, pattern, tile, tiles):
    """Oracle 20."""
    x = sparse((tile[0] * tiles[0], tile[1] * tiles[1]), dtype, pattern)
    packed = pack(x, pattern)
    values, meta = sparse_semi_structured_from_dense_cutlass(x)
    assert packed.values.dtype == values.dtype and packed.meta.dtype == meta.dtype
    assert torch.equal(bits(packed.values), bits(values))
    assert torch.equal(packed.meta, meta)
    assert torch.equal(bits(unpack(packed)), bits(x))
    assert torch.equal(unpack(PackedTensor(values, meta)), x)
    if dtype != torch.float32:  # its decoding goes through float16 and may change a half's bits
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), x)


def test_every_group_that_can_be_has_the_code_of_torch():
    """All eleven groups of at most two nonzeros; the six full ones have the six codes."""
    groups = [g for g in itertools.product([0.0, 1.0], repeat=4) if sum(g) <= 2]
    assert len(groups) == 11
    x = torch.zeros(32, 64, dtype=torch.float16)
    for row, group in enumerate(groups):
        x[row] = torch.tensor(group, dtype=torch.float16).repeat(16) * torch.arange(1, 65)
    packed = pack(x)
    values, meta = sparse_semi_structured_from_dense_cutlass(x)
    assert torch.equal(packed.values, values) and torch.equal(packed.meta, meta)
    full = patterns(2, 4).to(torch.float32).repeat(1, 2)
    codes = pack(full, layout="rows").meta[:, 0]
    assert codes.tolist() == [code * 17 for code in (4, 8, 12, 9, 13, 14)]


@pytest.mark.parametrize(("dtype", "pattern"), STORED, ids=lambda v: str(v))
@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (2, 5, 40), (2, 3, 7, 8)])
def test_rows_hold_any_number_of_them_and_come_back_bit_for_bit(dtype, pattern, shape):
    x = sparse(shape, dtype, pattern)
    packed = pack(x, pattern, "rows")
    assert packed.meta.dtype == torch.uint8
    assert (packed.layout, packed.shape) == ("rows", shape)
    assert (packed.pattern.n, packed.pattern.m) == (pattern.n, pattern.m)
    assert torch.equal(unpack(packed), x)


@pytest.mark.parametrize(("dtype", "pattern", "tile"), HARDWARE, ids=lambda v: str(v))
def test_experts_are_packed_one_by_one(dtype, pattern, tile):
    x = sparse((3, 2 * tile[0], tile[1]), dtype, pattern)
    packed = pack(x, pattern)
    assert (packed.layout, packed.shape) == ("hardware", tuple(x.shape))
    assert (packed.pattern.n, packed.pattern.m) == (pattern.n, pattern.m)
    for e in range(3):
        one = pack(x[e], pattern)
        assert torch.equal(packed.values[e], one.values) and torch.equal(packed.meta[e], one.meta)
    assert torch.equal(unpack(packed), x)


@pytest.mark.parametrize(("dtype", "pattern", "tile"), HARDWARE, ids=lambda v: str(v))
@pytest.mark.parametrize("layout", ["hardware", "rows"])
def test_bytes_are_those_computed(dtype, pattern, tile, layout):
    shape = (2, tile[0], 2 * tile[1])
    x = sparse(shape, dtype, pattern)
    packed = pack(x, pattern, layout)
    assert packed.num_bytes == packed_bytes(shape, dtype, pattern)
    ratio = 0.625 if dtype == torch.int8 else 0.5625
    assert packed.num_bytes == ratio * x.nbytes


def test_a_packed_tensor_is_two_tensors_that_can_be_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    x = sparse((32, 64), torch.bfloat16, TWO_FOUR)
    save_file(pack(x)._asdict(), tmp_path / "w.safetensors")
    assert torch.equal(unpack(PackedTensor(**load_file(tmp_path / "w.safetensors"))), x)


def test_strided_tensors_are_packed_as_their_copies():
    x = sparse((64, 32), torch.float16, TWO_FOUR)
    wide = torch.zeros(64, 64, dtype=torch.float16)
    wide[:, ::2] = x
    packed, expected = pack(wide[:, ::2]), pack(x)
    assert torch.equal(packed.values, expected.values) and torch.equal(packed.meta, expected.meta)


def test_violations_are_found_and_named():
    x = torch.zeros(32, 32, dtype=torch.float16)
    x[3, 28:32] = 1
    x[5, 0:3] = 2
    assert violations(x).tolist() == [[3, 7], [5, 0]]
    words = r"2 groups break 2:4, the first in row 3, group 7 \(entries 28 to 31\): 4 nonzeros"
    for call in (pack, refuse_violations, lambda x: pack(x, layout="rows")):
        with pytest.raises(UserError, match=words):
            call(x)
    assert violations(x.T, NMPattern(dim=0)).tolist() == [[3, 7], [5, 0]]
    with pytest.raises(UserError, match="in column 3, group 7"):
        refuse_violations(x.T, NMPattern(dim=0))
    with pytest.raises(UserError, match=r"1 groups break 2:4, the first in row \(1, 2\), group 0"):
        y = torch.zeros(2, 3, 8)
        y[1, 2, :3] = 1
        refuse_violations(y)
    assert len(violations(torch.zeros(4, 8))) == 0


def test_what_cannot_be_packed_is_refused_in_one_line():
    good = sparse((32, 64), torch.float16, TWO_FOUR)
    nan, overflow = good.clone(), torch.zeros(32, 64)
    nan[7, 9] = float("nan")
    overflow[1, 4] = 70_000.0
    for call, words in (
        (lambda: pack(nan), r"1 NaN, the first at index \(7, 9\), group 2"),
        (lambda: pack(overflow.half()), r"1 infinities.*\(1, 4\).*float16 ends at 65504.*bfloat16"),
        (lambda: pack(good[:, :6]), "divisible by 4|multiples of 32 and 32"),
        (lambda: pack(good[:31]), r"multiples of 32 and 32, got \(31, 64\); use layout rows"),
        (lambda: pack(good[:, :48]), r"multiples of 32 and 32, got \(32, 48\); use layout rows"),
        (lambda: pack(good[:, :4], layout="rows"), "multiples of 1 and 8.*pad"),
        (lambda: pack(good.float()), "2:4 of float32.*use layout rows"),
        (lambda: pack(good.double()), "2:4 of float64"),
        (lambda: pack(good.bool()), "2:4 of bool"),
        (lambda: pack(good.bool(), layout="rows"), "layout rows holds"),
        (lambda: pack(good, NMPattern(1, 4), "rows"), "holds 2:4 or 1:2"),
        (lambda: pack(good, NMPattern(dim=0)), "last dimension.*transpose"),
        (lambda: pack(good[0]), "takes a matrix"),
        (lambda: pack(good, layout="columns"), "unknown layout 'columns'; choose"),
        (lambda: pack(good[:0]), "multiples"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_what_was_never_packed_is_not_unpacked():
    packed = pack(sparse((64, 64), torch.float16, TWO_FOUR))
    rows = pack(sparse((64, 64), torch.float16, TWO_FOUR), layout="rows")
    for values, meta, words in (
        (packed.values, packed.meta[:32], "make no packed tensor"),
        (packed.values[:, :16], packed.meta, "make no packed tensor"),
        (packed.values, packed.meta.float(), "make no packed tensor"),
        (packed.values[:8], packed.meta[:8], "make no packed tensor"),
        (rows.values, torch.full_like(rows.meta, 0x55), "codes other than"),
        (packed.values, torch.full_like(packed.meta, 3), "codes other than"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            unpack(PackedTensor(values, meta))
        assert "\n" not in str(caught.value)
