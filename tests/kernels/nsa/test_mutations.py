"""Each of these faults makes the comparison with the definitions fail (property 25)."""

import pytest
import torch

from tiny_onn_kernels.nsa import layout, reference, select, selected, tile_attention
from tiny_onn_kernels.nsa.cases import Case

CASES = (
    Case((5, 26, 8), (0, 0, 0), heads=4, kv_heads=2, tile=8),
    Case((5, 26, 8), (2, 13, 8), heads=4, kv_heads=2, tile=8),
    Case((40,), (11,), heads=3, kv_heads=1, select_block=8, window=6),
)


def literal_equation_9(block, stride, select_block):
    first, weights = RIGHT["overlap_taps"](block, stride, select_block)
    return first - (select_block // stride - 1), weights


def window_bounds(first_by, stop_by):
    def bounds(time, prefix, window):
        first, stop = RIGHT["window_bounds"](time, prefix, window)
        return (first + first_by).clamp(min=0), stop + stop_by

    return bounds


RIGHT = {
    "overlap_taps": select.overlap_taps,
    "window_bounds": layout.window_bounds,
    "lay_out": layout.lay_out,
}


def forget_the_prefix(cu_seqlens_B1, **options):
    return RIGHT["lay_out"](cu_seqlens_B1, **(options | {"prefix_lens_B": None}))


def one_document(cu_seqlens_B1, **options):
    """Blocks counted from the batch's start."""
    laid = RIGHT["lay_out"](cu_seqlens_B1, **options)
    whole = RIGHT["lay_out"](
        cu_seqlens_B1[[0, -1]], **(options | {"prefix_lens_B": None, "lengths": None})
    )
    return whole if len(laid.lengths) > 1 else laid


MUTATIONS = {
    "compressed block seen one token early": (
        layout,
        "compressed_visible",
        lambda end, number, block, stride: number * stride + block - 1 <= end + 1,
    ),
    "compressed block seen one token late": (
        layout,
        "compressed_visible",
        lambda end, number, block, stride: number * stride + block - 1 < end,
    ),
    "selected branch sees the next token": (
        selected,
        "token_visible",
        lambda end, time: time <= end + 1,
    ),
    "selected branch does not see the own token": (
        selected,
        "token_visible",
        lambda end, time: time < end,
    ),
    "next block may be chosen": (
        select,
        "block_visible",
        lambda end, number, select_block: (number - 1) * select_block <= end,
    ),
    "block that begins at the query may not be chosen": (
        select,
        "block_visible",
        lambda end, number, select_block: number * select_block < end,
    ),
    "window of w + 1": (layout, "window_bounds", window_bounds(-1, 0)),
    "window of w - 1": (layout, "window_bounds", window_bounds(1, 0)),
    "window sees the next token": (layout, "window_bounds", window_bounds(0, 1)),
    "window one token late": (layout, "window_bounds", window_bounds(-1, -1)),
    "equation 9 as printed": (select, "overlap_taps", literal_equation_9),
    "scores of the group's first head": (
        tile_attention,
        "group_share",
        lambda weights: weights[..., 0].clone(),
    ),
    "one local block": (select, "NUM_LOCAL", 1),
    "gates of the branches swapped": (
        reference,
        "combine",
        lambda gate, a, b, c: sum(
            g[..., None] * x for g, x in zip(gate.unbind(-1), (b, a, c), strict=True)
        ),
    ),
    "blocks merged by the largest log-sum-exp": (
        selected,
        "total_lse",
        lambda lse: lse.amax(dim=1),
    ),
}


def test_the_comparison_holds_without_a_mutation(agrees):
    for case in CASES:
        agrees(case)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch, agrees):
    module, attribute, wrong = MUTATIONS[name]
    assert hasattr(module, attribute)
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        for case in CASES:
            agrees(case)


@pytest.mark.parametrize("wrong", [forget_the_prefix, one_document])
def test_a_wrong_layout_is_noticed(wrong, monkeypatch, agrees):
    from tiny_onn_kernels.nsa import cases

    monkeypatch.setattr(cases, "lay_out", wrong)
    with pytest.raises(AssertionError):
        for case in CASES:
            agrees(case)


def test_mutations_are_not_vacuous_on_one_hot_windows():
    """The window's bounds, read directly: w keys that end with the own one."""
    time = torch.arange(9)
    first, stop = layout.window_bounds(time, torch.zeros_like(time), 3)
    assert (stop - first).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert torch.equal(stop, time + 1)
