"""The Triton experts against the reference and float64 loops: on a GPU, or interpreted on a CPU."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

from tiny_onn.model.experts import Experts
from tiny_onn_kernels.moe import kernel, kernel_launch, kernel_pairs, reference
from tiny_onn_kernels.moe.cases import (
    CASES,
    ODD_CASES,
    Case,
    make_inputs,
    make_mask,
    run_case,
)
from tiny_onn_kernels.moe.kernel import expert_ffn, expert_pair_norms
from tiny_onn_kernels.moe.naive import naive_expert_ffn

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ALL_CASES = CASES + ODD_CASES
WIDE = Case(130, 64, 128, 128, "random")
"""Several tiles of all sizes that a GPU is given."""


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever the kernels allocate holds no number, or ones, until they write to it."""
    allocate = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        made = allocate(self, *args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def assert_near(got, want, most):
    """Each tensor within ``most`` of the wanted one, which may be exactly zero."""
    for a, b in zip(got, want, strict=True):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        assert a.shape == b.shape and torch.isfinite(a).all()
        assert (a - b).norm() <= most * b.norm(), (float((a - b).norm()), float(b.norm()))


def rounded_to(dtype, definition=naive_expert_ffn):
    """The definition in float64, of inputs that ``dtype`` can hold."""

    def run(x_NC, mask_NE, *floats):
        x_NC, *floats = (t + (t.detach().to(dtype).double() - t.detach()) for t in (x_NC, *floats))
        return definition(x_NC, mask_NE, *floats)

    return run


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_values_and_gradients_equal_the_loops_in_float32(case):
    got = run_case(expert_ffn, case, torch.float32, DEVICE)
    assert_near(got, run_case(rounded_to(torch.float32), case, torch.float64), 1e-5)
    assert_near(got, run_case(reference.expert_ffn, case, torch.float32), 1e-5)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_values_and_gradients_equal_the_definition_in_float16(case):
    got = run_case(expert_ffn, case, torch.float16, DEVICE)
    assert_near(got, run_case(rounded_to(torch.float16), case, torch.float64), 2e-3)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_values_and_gradients_equal_the_definition_in_bfloat16(case):
    got = run_case(expert_ffn, case, torch.bfloat16, DEVICE)
    most = 1e-2 if ON_GPU else 2e-2  # the interpreter truncates to bfloat16: twice the error
    assert_near(got, run_case(rounded_to(torch.bfloat16), case, torch.float64), most)


@pytest.mark.parametrize("case", ALL_CASES[:3], ids=str)
def test_values_and_gradients_equal_the_definition_in_float64(case):
    got = run_case(expert_ffn, case, torch.float64, DEVICE)
    assert_near(got, run_case(naive_expert_ffn, case, torch.float64), 1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [130, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients_of_wide_layers(tokens, dtype):
    case = WIDE._replace(tokens=tokens)
    got = run_case(expert_ffn, case, dtype, DEVICE)
    want = run_case(rounded_to(dtype, reference.expert_ffn), case, torch.float64, DEVICE)
    assert_near(got, want, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_numeric_gradients():
    case = Case(5, 3, 4, 3, "every_k")
    x_NC, mask_NE, *floats = (t.to(DEVICE) for t in make_inputs(case, torch.float64))
    leaves = [t.requires_grad_() for t in (x_NC, *floats)]
    run = torch.autograd.gradcheck
    assert run(lambda x, *rest: expert_ffn(x, mask_NE, *rest), leaves, fast_mode=True)


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
def test_the_size_of_tiles_and_chunks_changes_nothing(tile_rows, monkeypatch):
    case = Case(150, 4, 24, 72, "every_k")
    monkeypatch.setattr(kernel_pairs, "MASK_ELEMENTS", 64)
    for module in ("kernel_pairs", "kernel_forward", "kernel_backward"):
        monkeypatch.setattr(f"tiny_onn_kernels.moe.{module}.block_rows", lambda _: tile_rows)
    got = run_case(expert_ffn, case, torch.float32, DEVICE)
    assert_near(got, run_case(reference.expert_ffn, case, torch.float64), 1e-5)


def test_tiles_grow_with_the_number_of_tokens():
    sizes = [kernel_launch.block_rows(n) for n in (0, 1, 32, 33, 4095, 4096)]
    assert sizes == [16, 16, 16, 64, 64, 128]


@pytest.mark.parametrize("case", ALL_CASES[:4], ids=str)
def test_what_was_not_kept_for_the_backward_pass_is_computed_again(case, monkeypatch):
    kept = run_case(expert_ffn, case, torch.float32, DEVICE)
    monkeypatch.setattr(kernel, "MOST_SAVED_BYTES", 0)
    assert_near(run_case(expert_ffn, case, torch.float32, DEVICE), kept, 1e-6)


@pytest.mark.parametrize("elements", [8, 4096])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_pairs_stand_where_the_reference_puts_them_and_tiles_cover_them(
    case, elements, monkeypatch
):
    monkeypatch.setattr(kernel_pairs, "MASK_ELEMENTS", elements)
    mask_NE = make_mask(case)
    want = reference.dispatch(mask_NE)
    got = kernel_pairs.PairLayout(*(t.cpu() for t in kernel.moe_pairs(mask_NE.to(DEVICE))))
    num_pairs, ends = len(want.token_P), want.ends_E.tolist()
    assert got.token_P[:num_pairs].tolist() == want.token_P.tolist()
    assert got.row_P[:num_pairs].tolist() == want.row_P.tolist()
    assert got.begin_N.tolist() == [*want.begin_N.tolist(), num_pairs]
    assert got.begin_E.tolist() == [0, *ends]
    step = kernel_launch.block_rows(case.tokens)
    tiles = [
        [expert, row]
        for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        for row in range(begin, end, step)
    ]
    assert got.tile_T2[: int(got.tiles_1)].tolist() == tiles


def test_an_expert_without_tokens_and_a_token_without_experts_get_exactly_nothing():
    case = Case(40, 5, 16, 8, "dead")
    mask_NE = make_mask(case)
    out_NC, x_grad, weight_grad, up_grad, down_grad = (
        t.cpu() for t in run_case(expert_ffn, case, torch.float32, DEVICE)
    )
    alone_N = ~mask_NE.any(dim=1)
    assert alone_N.any() and not alone_N.all()
    for exact_zero in (out_NC[alone_N], x_grad[alone_N], weight_grad[~mask_NE]):
        assert exact_zero.abs().max() == 0
    for gradient in (up_grad, down_grad):
        used_E = gradient.abs().amax(dim=(1, 2)) > 0
        assert used_E.tolist() == [False, True, True, True, False]


def test_weights_of_inactive_pairs_are_not_read():
    case = CASES[1]

    def run(x_NC, mask_NE, weight_NE, *matrices):
        return expert_ffn(x_NC, mask_NE, weight_NE.masked_fill(~mask_NE, torch.nan), *matrices)

    got, want = (run_case(f, case, torch.float32, DEVICE) for f in (run, expert_ffn))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("saved_bytes", [0, 2**28])
def test_results_repeat_bit_for_bit(saved_bytes, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_SAVED_BYTES", saved_bytes)
    a, b = (run_case(expert_ffn, CASES[0], torch.float32, DEVICE) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_token_that_occurs_again_gets_the_same_row_wherever_it_stands():
    tensors = (t.to(DEVICE) for t in make_inputs(Case(70, 5, 16, 24, "every_k"), torch.float32))
    x_NC, mask_NE, weight_NE, *matrices = tensors
    twice_M = torch.cat([torch.arange(70), torch.arange(0, 70, 3), torch.tensor([68, 1])])
    out_MC = expert_ffn(x_NC[twice_M], mask_NE[twice_M], weight_NE[twice_M], *matrices)
    torch.testing.assert_close(out_MC[70:], out_MC[twice_M[70:]], rtol=1e-6, atol=1e-7)


def test_strided_inputs_and_a_strided_gradient():
    case = Case(18, 3, 8, 8, "every_k")

    def strided(x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF):
        out_NC = expert_ffn(
            x_NC.T.contiguous().T, mask_NE.T.contiguous().T, weight_NE.T.contiguous().T,
            gate_up_EHC.mT.contiguous().mT, down_ECF.mT.contiguous().mT,
        )  # fmt: skip
        return out_NC.T.contiguous().T

    got, want = (run_case(f, case, torch.float32, DEVICE) for f in (strided, expert_ffn))
    assert_near(got, want, 1e-7)


def test_a_summed_loss_whose_gradient_has_no_strides():
    x_NC, *rest = (t.to(DEVICE) for t in make_inputs(CASES[0], torch.float32))
    grads = []
    for run in (expert_ffn, reference.expert_ffn):
        leaf_NC = x_NC.clone().requires_grad_()
        run(leaf_NC, *rest).sum().backward()
        grads.append(leaf_NC.grad)
    assert_near(grads[:1], grads[1:], 1e-5)


@pytest.mark.parametrize("factor", [1e2, 1e4])
def test_huge_values_before_the_activation_stay_finite(factor):
    def scaled(run):
        return lambda x_NC, *rest: run(factor * x_NC, *rest)

    got = run_case(scaled(expert_ffn), CASES[0], torch.float32, DEVICE)
    want = run_case(scaled(rounded_to(torch.float32)), CASES[0], torch.float64)
    assert_near(got, want, 1e-3)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_norms_of_pairs_equal_the_references(case):
    x_NC, mask_NE, _, *matrices = make_inputs(case, torch.float32)
    grad_NC = torch.randn(x_NC.shape, generator=torch.manual_seed(2))
    tensors = (x_NC, mask_NE, *matrices, grad_NC)
    got = expert_pair_norms(*(t.to(DEVICE) for t in tensors))
    want = reference.expert_pair_norms(*tensors)
    assert_near(got, want, 1e-5)
    for norm_NE in (got.hidden_NE.cpu(), got.inner_NE.cpu()):
        assert not norm_NE[~mask_NE].any()


def test_without_gradient_nothing_is_kept_and_values_are_the_same():
    tensors = [t.to(DEVICE) for t in make_inputs(CASES[0], torch.float32)]
    with torch.no_grad():
        out_NC = expert_ffn(*tensors)
    assert torch.equal(out_NC, expert_ffn(*tensors))


def test_the_operators_are_registered_rightly_and_compile_into_one_graph():
    case = Case(19, 3, 16, 16, "all")  # no row is left as it was allocated
    x_NC, mask_NE, *floats = (t.to(DEVICE) for t in make_inputs(case, torch.float32))
    leaves = [t.requires_grad_() for t in (x_NC, *floats)]
    torch.library.opcheck(kernel.moe_pairs, (mask_NE,))
    layout = list(kernel.moe_pairs(mask_NE))
    torch.library.opcheck(kernel.moe_forward, (*leaves, layout, True))

    compiled = torch.compile(expert_ffn, backend="aot_eager", fullgraph=True)
    found = []
    for run in (expert_ffn, compiled):
        out_NC = run(x_NC, mask_NE, *floats)
        found.append([out_NC, *torch.autograd.grad(out_NC.square().sum(), leaves)])
    assert_near(*found, 1e-6)


def test_a_layers_experts_compile_into_one_graph():
    experts = Experts(width=16, hidden=24, experts=5).to(DEVICE)
    x_NC, mask_NE, weight_NE, *_ = (t.to(DEVICE) for t in make_inputs(CASES[0], torch.float32))
    want_NC = experts(x_NC, mask_NE, weight_NE)
    experts.backend = "triton"
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    assert_near([compiled(x_NC, mask_NE, weight_NE)], [want_NC], 1e-5)


def test_the_signatures_are_the_references():
    for ours in (expert_ffn, expert_pair_norms):
        assert inspect.signature(ours) == inspect.signature(getattr(reference, ours.__name__))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    x_NC, mask_NE, *floats = (t.to(DEVICE) for t in make_inputs(CASES[0], torch.float32))
    leaves = [t.requires_grad_() for t in (x_NC, *floats)]
    for mode in (0, 2):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out_NC = expert_ffn(x_NC, mask_NE, *floats)
            torch.autograd.grad(out_NC, leaves, torch.ones_like(out_NC))
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.gpu
@pytest.mark.slow
def test_places_beyond_two_to_the_31():
    tokens, width, tail = 2**21 + 5, 1024, 64
    x_NC = torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    x_NC[-tail:].normal_()
    mask_NE = torch.ones(tokens, 1, dtype=torch.bool, device=DEVICE)
    gate_up_EHC = torch.randn(1, 32, width, dtype=torch.bfloat16, device=DEVICE) / 32
    down_ECF = torch.randn(1, width, 16, dtype=torch.bfloat16, device=DEVICE) / 4
    with torch.no_grad():
        got = expert_ffn(x_NC, mask_NE, mask_NE.to(x_NC.dtype), gate_up_EHC, down_ECF)[-tail:]
        tensors = (x_NC[-tail:], mask_NE[-tail:], mask_NE[-tail:], gate_up_EHC, down_ECF)
        exact = (t if t.dtype == torch.bool else t.double() for t in tensors)
        want = reference.expert_ffn(*exact)
    assert_near([got], [want], 1e-2)


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (0, lambda t: t.half(), "one dtype and a boolean mask"),
        (1, lambda t: t.int(), "one dtype and a boolean mask"),
        (1, lambda t: t[:, :2], r"got mask of \(\d+, 2\), expected"),
        (2, lambda t: t[:1], "got weight of"),
        (3, lambda t: t[:, 1:], "got gate_up of"),
        (4, lambda t: t[..., 1:], "got gate_up of|got down of"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(place, change, said):
    tensors = [t.to(DEVICE) for t in make_inputs(CASES[0], torch.float32)]
    tensors[place] = change(tensors[place])
    with pytest.raises(ValueError, match=said):
        expert_ffn(*tensors)
