"""The Triton branches against the reference in float64, values and gradients, indices shared."""

import inspect
from dataclasses import replace

import pytest
import torch

from tiny_onn_kernels.nsa import reference
from tiny_onn_kernels.nsa.cases import Case

pytestmark = pytest.mark.usefixtures("poison")

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PACKED = Case((5, 1, 9, 3, 26), (2, 0, 9, 3, 11), heads=4, kv_heads=2)
FEW = Case((5, 1, 14), (2, 0, 9), heads=4, kv_heads=2, count=3)
CASES = (
    *(Case((n,), (0,)) for n in (1, 3, 4, 5, 23)),
    Case((23,), (9,)),
    PACKED,
    Case((29, 14), (9, 3), heads=3, kv_heads=1, width=5, value_width=7),
    Case((31, 26), (13, 0), heads=2, kv_heads=2, block=6, stride=3, select_block=3, count=4),
    Case((31, 6), (0, 4), block=8, stride=2, select_block=4, count=4, window=1),
    Case((33,), (0,), block=1, stride=1, select_block=5, count=4, window=40),
)
GROUPS = tuple(
    Case((37,), (0,), groups, 1, width, 16, 8, 4, 16, count=3, window=9)
    for groups, width in ((1, 24), (2, 16), (4, 40), (8, 16), (16, 16), (20, 80))
)
ORDERS = {"queries first": 0, "keys first": 1000}


def branch(implementation, name, tensors, index, layout):
    """(q, k, v) by one branch."""
    if name == "compressed":
        return implementation.compressed_attention(*tensors, layout)[0]
    if name == "selected":
        return implementation.selected_attention(*tensors, index, layout)
    return implementation.window_attention(*tensors, layout)


def both_ways(implementation, name, tensors, index, layout, pull):
    """Output and gradients of q, k, v."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = branch(implementation, name, leaves, index, layout)
    return [out, *torch.autograd.grad(out, leaves, pull.to(out))]


def names_of(case):
    """Each branch with its places among a case's tensors."""
    return {"compressed": (0, 1, 2), "selected": (0, 3, 4), "window": (0, 5, 6)}


@pytest.fixture
def agrees(kernel, device, assert_close):
    """Asserts that the kernels compute, on a case, what the reference does in float64."""

    def check(case, dtype=torch.float32, names=("compressed", "selected", "window")):
        low, layout = case.inputs(dtype, device).tensors(), case.layout(device)
        exact, on_cpu = [t.double().cpu() for t in low], case.layout()
        _, index = reference.attend_compressed_and_choose(*exact[:3], on_cpu, case.count)
        generator = torch.Generator().manual_seed(3)
        shape = (*exact[0].shape[:2], case.value_width)
        pull = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name in names:
            places = names_of(case)[name]
            tensors = [low[i] for i in places]
            got = both_ways(kernel, name, tensors, index.to(device), layout, pull)
            wide = [exact[i] for i in places]
            want = both_ways(reference, name, wide, index, on_cpu, pull)
            for what, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
                assert a.dtype == dtype
                assert_close(a, b, LIMITS[dtype], f"{name} {what}")

    return check


@pytest.fixture(params=ORDERS)
def order(request, kernel, monkeypatch):
    """Both ways of the selected branch."""
    from tiny_onn_kernels.nsa import kernel_selected_plan

    monkeypatch.setattr(kernel_selected_plan, "KEYS_FIRST_SHARE", ORDERS[request.param])
    return request.param


def test_the_signatures_are_the_references(kernel):
    assert set(reference.__all__) <= set(kernel.__all__)
    for name in reference.__all__:
        right = getattr(reference, name)
        if inspect.isfunction(right):
            assert inspect.signature(getattr(kernel, name)) == inspect.signature(right), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_window_and_compressed_branch_equal_the_reference(case, agrees):
    agrees(case, names=("compressed", "window"))


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_the_selected_branch_equals_the_reference(case, agrees, order):
    agrees(case, names=("selected",))


@pytest.mark.parametrize("case", GROUPS, ids=lambda case: f"G{case.heads}-D{case.width}")
def test_any_group_size_and_head_width(case, agrees):
    agrees(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float64(dtype, agrees, order):
    agrees(replace(FEW, width=16, value_width=16), dtype)


def test_blocks_of_several_tiles_of_keys(agrees, order):
    case = Case((84,), (20,), 1, 1, block=16, stride=16, select_block=80, count=3)
    agrees(case, names=["selected"])


def test_a_block_that_many_chose_is_cut_into_parts(agrees, order, monkeypatch):
    from tiny_onn_kernels.nsa import kernel_selected

    monkeypatch.setattr(kernel_selected, "pairs_of_a_part", lambda *_: 7)
    agrees(replace(PACKED, lengths=(22, 3), prefixes=(0, 2)), names=["selected"])


@pytest.mark.parametrize("part", [5, 1000])
def test_a_long_batch_goes_slice_by_slice(part, agrees, monkeypatch):
    from tiny_onn_kernels.nsa import kernel_selected, kernel_selected_plan

    monkeypatch.setattr(kernel_selected_plan, "KEYS_FIRST_SHARE", ORDERS["keys first"])
    monkeypatch.setattr(kernel_selected, "tokens_of_a_slice", lambda *_: 16)
    monkeypatch.setattr(kernel_selected, "pairs_of_a_part", lambda *_: part)
    agrees(replace(PACKED, lengths=(40, 3, 9), prefixes=(0, 2, 9)), names=["selected"])


def test_slices_hold_every_pair_once_in_order(kernel, device):
    from tiny_onn_kernels.nsa.kernel_selected_plan import cut_into_slices
    from tiny_onn_kernels.nsa.selected import invert_index

    layout = PACKED.layout(device)
    num_tokens = len(layout.time_N)
    index = torch.randint(-1, 1, (num_tokens, 2, 3), device=device)
    inverse = invert_index(index, layout)
    token_P = inverse.pair_P // 6
    for size in (1, 7, num_tokens - 1, num_tokens, num_tokens + 1):
        slices = cut_into_slices(inverse.pair_P, inverse.offset_Z1, num_tokens, size)
        assert len(slices) == -(-num_tokens // size)
        end_Z = inverse.offset_Z1[:-1]
        for number, piece in enumerate(slices):
            assert piece.first_pair == number * size * 6
            begin_Z, stop_Z = piece.bound_2Z
            assert torch.equal(begin_Z, end_Z)
            for begin, stop in zip(begin_Z.tolist(), stop_Z.tolist(), strict=True):
                assert ((token_P[begin:stop] // size) == number).all()
            end_Z = stop_Z
        assert torch.equal(end_Z, inverse.offset_Z1[1:])


def test_keys_of_few_tiles_are_split_over_their_queries(agrees, monkeypatch):
    from tiny_onn_kernels.nsa import kernel_band

    right = kernel_band.tile_sizes
    monkeypatch.setattr(
        kernel_band, "tile_sizes", lambda *a: right(*a) | {"BLOCK_R": 16, "BLOCK_C": 16}
    )
    agrees(Case((50, 23), (20, 0), heads=4, kv_heads=2, window=21), names=["compressed", "window"])


@pytest.mark.parametrize("rows", ["some", "all"])
def test_rows_without_any_block_are_zero_with_finite_gradients(rows, kernel, device, order):
    case = Case((9, 6), (0, 4), heads=4, kv_heads=2)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    _, index = kernel.attend_compressed_and_choose(*inputs.tensors()[:3], layout, case.count)
    empty = torch.arange(15, device=device) % 3 == 0
    empty = empty | (rows == "all")
    index = index.masked_fill(empty[:, None, None], -1)
    pull = torch.randn(15, 4, 8, device=device)
    tensors = [inputs.q, inputs.k_selected, inputs.v_selected]
    out, *grads = both_ways(kernel, "selected", tensors, index, layout, pull)
    assert (out[empty] == 0).all() and (grads[0][empty] == 0).all()
    assert all(t.isfinite().all() for t in (out, *grads))
    if rows == "all":
        assert all((t == 0).all() for t in grads)


def test_tokens_that_no_whole_block_precedes_get_exactly_zero(kernel, device):
    case = Case((3, 40, 2), (0, 0, 0), block=4, stride=2, select_block=2)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    tensors = inputs.tensors()[:3]
    pull = torch.randn(45, 2, 8, device=device)
    out, *grads = both_ways(kernel, "compressed", tensors, None, layout, pull)
    early = layout.end_N < case.block - 1
    assert early.any() and (out[early] == 0).all() and (grads[0][early] == 0).all()
    assert (out[~early].abs().amax((1, 2)) > 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("size", [100.0, -1e4])
def test_extreme_logits_stay_finite_and_constant_values_come_back(size, kernel, device, order):
    case = Case((18, 2), (0, 2), count=3)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    inputs.q.abs_()
    late = layout.end_N >= case.block - 1
    index = None
    for name, places in names_of(case).items():
        q, k, v = (inputs.tensors()[i] for i in places)
        k[0], k[3], v[:] = size, -size, 1.5  # token 0 as a sink, or as the opposite
        if index is None:
            _, index = kernel.attend_compressed_and_choose(q, k, v, layout, case.count)
        out, *grads = both_ways(kernel, name, (q, k, v), index, layout, torch.ones_like(q))
        rows = out[late] if name == "compressed" else out
        torch.testing.assert_close(rows, torch.full_like(rows, 1.5))
        assert all(grad.isfinite().all() for grad in grads)


def test_packed_documents_equal_each_alone(kernel, device, order):
    inputs, layout = FEW.inputs(torch.float32, device), FEW.layout(device)
    together = inputs.run_with(kernel, layout, FEW.count)
    start, first, parts = 0, 0, []
    counts = layout.compressed.doc_M.bincount(minlength=len(FEW.lengths)).tolist()
    for length, prefix, blocks in zip(FEW.lengths, FEW.prefixes, counts, strict=True):
        tokens, compressed = slice(start, start + length), slice(first, first + max(1, blocks))
        alone = replace(FEW, lengths=(length,), prefixes=(prefix,))
        own = replace(
            inputs,
            **{
                name: t[compressed if "compressed" in name else tokens]
                for name, t in vars(inputs).items()
            },
        )
        parts.append(own.run_with(kernel, alone.layout(device), FEW.count))
        start, first = start + length, first + blocks
    assert torch.equal(together[1], torch.cat([index for _, index in parts]))
    torch.testing.assert_close(together[0], torch.cat([out for out, _ in parts]))


def test_two_backward_runs_are_bit_equal(kernel, device, monkeypatch):
    from tiny_onn_kernels.nsa import kernel_selected

    monkeypatch.setattr(kernel_selected, "pairs_of_a_part", lambda *_: 8)
    gradients = []
    for _ in range(2):
        inputs = FEW.inputs(torch.float32, device).require_grad()
        out, _ = inputs.run_with(kernel, FEW.layout(device), FEW.count)
        out.square().sum().backward()
        gradients.append([out, *(t.grad for t in inputs.tensors())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_strided_queries_keys_and_values(kernel, device):
    case = Case((21,), (6,), 4, 2)
    layout, tensors = case.layout(device), case.inputs(torch.float32, device).tensors()
    q, k, v = tensors[0], tensors[5], tensors[6]
    index = torch.arange(5, device=device).expand(21, 2, 5)
    for name in ("window", "selected"):
        want = branch(kernel, name, (q, k, v), index, layout)
        apart = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        torch.testing.assert_close(branch(kernel, name, apart, index, layout), want)
        spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (q, k, v)]
        assert spread[0].stride(-1) == 2
        torch.testing.assert_close(branch(kernel, name, spread, index, layout), want)


@pytest.mark.parametrize(
    ("name", "share"),
    [("compressed", 0), *(("selected", share) for share in ORDERS.values()), ("window", 0)],
)
def test_gradcheck_in_float64(name, share, kernel, device, monkeypatch):
    if not kernel.INTERPRETED:
        pytest.skip("the kernels sum in float64 in the interpreter only")
    from tiny_onn_kernels.nsa import kernel_selected_plan

    monkeypatch.setattr(kernel_selected_plan, "KEYS_FIRST_SHARE", share)
    case = Case((7,), (3,), 2, 1, 2, 2, block=2, stride=1, select_block=2, count=3, window=3)
    layout, tensors = case.layout(), case.inputs().tensors()
    _, index = reference.attend_compressed_and_choose(*tensors[:3], layout, case.count)
    leaves = [tensors[i].requires_grad_() for i in names_of(case)[name]]
    assert torch.autograd.gradcheck(
        lambda *t: branch(kernel, name, t, index, layout), leaves, fast_mode=True
    )


def test_mixed_dtypes_are_refused(kernel):
    case = Case((5,), (0,))
    q, _, _, _, _, k, v, _ = case.inputs(torch.float32).tensors()
    with pytest.raises(ValueError, match="of one of"):
        kernel.window_attention(q, k.half(), v, case.layout())


def test_operations_have_true_schemas_and_fakes(kernel, device):
    from tiny_onn_kernels.nsa import kernel_band, kernel_decode, kernel_select, kernel_selected
    from tiny_onn_kernels.nsa.selected import invert_index

    case = Case((9, 4), (0, 0), heads=4, kv_heads=2)
    layout, tensors = case.layout(device), case.inputs(torch.float32, device).tensors()
    q, k, v = tensors[0], tensors[5], tensors[6]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel_band.band, (q, k, v, *layout.window_range), test_utils=checks)
    _, lse = kernel_band.band(*tensors[:3], *layout.compressed_range)
    times = (layout.time_N, layout.end_N, *layout.compressed_range)
    first = layout.tiles.blocks.first_row_M
    choose = (q, tensors[1], lse, first, *times, 64, 4, 2, 4, 3, 5)
    torch.library.opcheck(kernel_select.choose, choose, test_utils=checks)
    index = kernel_select.choose(*choose)
    found = invert_index(index, layout)
    rest = (layout.time_N, layout.end_N, layout.selectable.blocks.first_row_M, 4, 9, 64)
    selected = (q, k, v, index, found.pair_P, found.offset_Z1, *rest)
    torch.library.opcheck(kernel_selected.selected, selected, test_utils=checks)
    out, lse = kernel_selected.selected(*selected)
    adjoint = (torch.ones_like(out), *selected[:9], out, lse, *rest[3:])
    torch.library.opcheck(kernel_selected.selected_backward, adjoint, test_utils=checks)
    out, lse = kernel_band.band(q, k, v, *layout.window_range)
    adjoint = (torch.ones_like(out), q, k, v, *layout.window_range, out, lse)
    torch.library.opcheck(kernel_band.band_backward, adjoint, test_utils=checks)
    share = (q, tensors[1], kernel_band.band(*tensors[:3], *layout.compressed_range)[1])
    share = (*share, first, layout.time_N, *layout.compressed_range, 64, 5)
    torch.library.opcheck(kernel_select.share, share, test_utils=checks)
    step = (kernel_select.share(*share)[:2], layout.time_N[:2], 4, 2, 4, 3)
    torch.library.opcheck(kernel_select.choose_from_share, step, test_utils=checks)
    caches = [torch.randn(2, 2, 9, 8, device=device) for _ in range(2)]
    counts = torch.tensor([3, 9], device=device)
    decode = (q[:2], *caches, None, counts * 0, counts, 9, 1)
    torch.library.opcheck(kernel_decode.attend, decode, test_utils=checks)


@pytest.mark.slow
def test_batches_of_other_lengths_are_soon_compiled_no_more(kernel, device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(kernel.nsa_attention, backend="eager")
    seen = []
    for lengths in ((9,), (5, 7), (4, 8, 6), (3, 6, 4, 5)):
        case = replace(FEW, lengths=lengths, prefixes=(0,) * len(lengths))
        layout = case.layout(device)
        layout.compute_for_kernels()
        tensors = case.inputs(torch.float32, device).tensors()
        compiled = run(*tensors, layout, case.count)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen[-1] == seen[2] <= 3, seen
    torch.testing.assert_close(compiled, kernel.nsa_attention(*tensors, layout, case.count))


def test_every_operation_makes_its_tensors_device_current(kernel):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {
        "band", "band_backward", "choose", "choose_in_step", "decode", "decode_share", "selected",
        "selected_backward", "share",
    }  # fmt: skip
    assert all(registered(f"tiny_onn::nsa_{name}", "CUDA") for name in names)
