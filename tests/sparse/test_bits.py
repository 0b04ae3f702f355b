"""Masks at one bit an entry."""

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.sparse.bits import pack_bits, unpack_bits


@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 3, 13), (1, 1), (2, 0), (0, 8)])
def test_masks_come_back(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpack_bits(packed, shape[-1]), mask)


def test_the_first_entry_is_the_lowest_bit():
    mask = torch.tensor([True, False, True, False, False, False, False, True, True])
    assert pack_bits(mask).tolist() == [0b10000101, 1]


def test_what_is_no_mask_and_no_bits_of_it_is_refused():
    for call, words in (
        (lambda: pack_bits(torch.ones(8)), "got torch.float32 .* expected a bool mask"),
        (lambda: unpack_bits(torch.zeros(2, dtype=torch.uint8), 8), "expected 1 bytes of uint8"),
        (lambda: unpack_bits(torch.zeros(1), 8), "got torch.float32 .* expected 1 bytes of uint8"),
    ):
        with pytest.raises(UserError, match=words):
            call()
