import numpy as np
import pytest
import torch
from torch import nn

from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.inspect.branches import chosen_blocks, gate_stats, watching

PAIR = Pair(np.full((2, 3), 4, dtype=np.uint8), np.full((2, 3), 5, dtype=np.uint8))
DOCUMENT = encode_pair(PAIR)  # 19 tokens, of which 18 are packed; the prefix has 10
BLOCK = 4


class Attention(nn.Module):
    watch = None

    def __init__(self, gate, index):
        super().__init__()
        self.gate, self.index = gate, index


class Watched(nn.Module):
    """Blocks that tell ``watch`` a gate of 0.1, 0.2, 0.3 times their number, and what
    ``index(tokens)`` gives."""

    def __init__(self, num_blocks=2, index=lambda tokens: None):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(nn.Module() for _ in range(num_blocks))
        for number, block in enumerate(self.blocks, start=1):
            block.attention = Attention(number * torch.tensor([0.1, 0.2, 0.3]), index)

    def forward(self, batch):
        num_tokens = batch.num_tokens
        for block in self.blocks:
            attention = block.attention
            gate_NH3 = attention.gate.expand(num_tokens, 2, 3)
            if attention.watch is not None:
                attention.watch(gate_NH3, attention.index(num_tokens))


def test_gates_are_told_by_block_branch_and_side():
    stats = gate_stats(Watched(), [DOCUMENT, DOCUMENT], batch_tokens=1)
    assert stats.layers == (0, 1)
    assert stats.quantiles.shape == (2, 2, 3, 3)
    for side in range(2):
        np.testing.assert_allclose(
            stats.quantiles[side, 1], [[0.2] * 3, [0.4] * 3, [0.6] * 3], rtol=1e-6
        )


def test_quantiles_are_over_tokens_and_heads_of_their_side():
    class Sides(Watched):
        def forward(self, batch):
            in_output = (batch.positions_N3[:, 2] == 3).float()
            gate = (0.2 + 0.5 * in_output)[:, None, None].expand(-1, 2, 3)
            self.blocks[0].attention.watch(gate, None)

    quantiles = gate_stats(Sides(1), [DOCUMENT]).quantiles
    np.testing.assert_allclose(quantiles[0], 0.2, rtol=1e-6)
    np.testing.assert_allclose(quantiles[1], 0.7, rtol=1e-6)


def two_groups(num_tokens):
    """Group 0 chose block 0 and its own, group 1 block 0 alone."""
    own = torch.arange(num_tokens) // BLOCK
    first = torch.zeros_like(own)
    nothing = torch.full_like(own, -1)
    return torch.stack([torch.stack([first, own], 1), torch.stack([first, nothing], 1)], dim=1)


def test_shares_are_those_of_the_groups_that_chose_the_block_of_a_token():
    choice = chosen_blocks(Watched(index=two_groups), DOCUMENT, BLOCK, causal=True)
    assert choice.share_ATT.shape == (2, 18, 18)
    query = choice.share_ATT[0, 14]
    assert query[:4].tolist() == [1, 1, 1, 1]
    assert query[4:12].tolist() == [0] * 8
    assert query[12:15].tolist() == [0.5, 0.5, 0.5]
    assert query[15:].tolist() == [0, 0, 0]  # later tokens of its own block


def test_the_prefix_sees_its_later_tokens_under_a_prefix_mask_only():
    seen, hidden = (
        chosen_blocks(Watched(index=two_groups), DOCUMENT, BLOCK, causal).share_ATT[0, 1]
        for causal in (False, True)
    )
    assert seen[:4].tolist() == [1] * 4
    assert hidden[:4].tolist() == [1, 1, 0, 0]


def test_tokens_and_positions_are_those_of_the_packed_document():
    choice = chosen_blocks(Watched(index=two_groups), DOCUMENT, BLOCK, causal=True)
    assert choice.tokens_T.tolist() == DOCUMENT.tokens[:-1].tolist()
    assert choice.positions_T3.tolist() == DOCUMENT.positions[:-1].tolist()


def test_without_nsa_or_without_a_choice_there_is_nothing_to_tell():
    class Full(Watched):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block.attention = nn.Identity()

        def forward(self, batch):
            pass

    assert gate_stats(Full(), [DOCUMENT]) is None
    assert chosen_blocks(Full(), DOCUMENT, BLOCK, causal=True) is None
    assert chosen_blocks(Watched(), DOCUMENT, BLOCK, causal=True) is None


def test_watching_ends_with_its_block_also_after_an_error():
    model = Watched()
    with pytest.raises(RuntimeError), watching(model):
        assert model.blocks[0].attention.watch is not None
        raise RuntimeError
    assert all(block.attention.watch is None for block in model.blocks)
