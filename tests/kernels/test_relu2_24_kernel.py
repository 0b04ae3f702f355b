"""ReLU^2, 2:4 and packing in Triton against the reference: on a GPU, or interpreted on a CPU."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

from tiny_onn.sparse.semi_structured import refusal
from tiny_onn_kernels.relu2_24 import kernel, kernel_pack, reference
from tiny_onn_kernels.relu2_24.cases import CASES, Case, make_gradient, make_input

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever the kernels allocate holds no number, or 77, until they write to it."""
    allocate = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        made = allocate(self, *args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def run(module, x_TF):
    """Values, codes, bits, flags; gradient and its values; the dense tensor, bits, its gradient."""
    x_TF = x_TF.to(DEVICE)
    grad_TF = make_gradient(x_TF.cpu()).to(DEVICE)
    packed = module.relu2_24(x_TF)
    slopes = module.relu2_24_gradient(grad_TF, x_TF, packed.bits, pack=True)
    leaf_TF = x_TF.clone().requires_grad_()
    dense_TF, bits_TB = module.relu2_24_dense_bits(leaf_TF)
    assert not bits_TB.requires_grad
    dense_grad = torch.autograd.grad(dense_TF, leaf_TF, grad_TF)
    return [t.detach().cpu() for t in (*packed, *slopes, dense_TF, bits_TB, *dense_grad)]


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_everything_equals_the_reference_bit_for_bit(case, dtype):
    x_TF = make_input(case, dtype)
    assert_equal(run(kernel, x_TF), run(reference, x_TF))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_equals_the_reference(case):
    x_TF = make_input(case, torch.bfloat16)
    got, want = run(kernel, x_TF), run(reference, x_TF)
    if ON_GPU:
        return assert_equal(got, want)
    for a, b in zip(got, want, strict=True):  # the interpreter truncates to bfloat16
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=0)
    assert_equal(got[1:4], want[1:4])


@pytest.mark.parametrize("width", [32, 512])
@pytest.mark.parametrize("case", [Case(13, 48), Case(37, 20)], ids=str)
def test_the_size_of_blocks_changes_nothing(case, width, monkeypatch):
    x_TF = make_input(case, torch.float32)
    want = run(kernel, x_TF)
    monkeypatch.setattr(kernel_pack, "BLOCK_BYTES", width)
    assert_equal(run(kernel, x_TF), want)


def test_results_repeat_bit_for_bit():
    x_TF = make_input(CASES[1], torch.float32)
    assert_equal(run(kernel, x_TF), run(kernel, x_TF))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's, interpreted
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf, 300.0, -300.0, 255.9, 256.0])
@pytest.mark.parametrize("width", [16, 20])
def test_numbers_that_are_not_finite_or_overflow_raise_the_references_flags(wild, width):
    x_TF = make_input(Case(9, width), torch.float16)
    x_TF[4, 2] = x_TF[7, 0] = wild
    got, want = (m.relu2_24(x_TF.to(DEVICE)) for m in (kernel, reference))
    assert_equal([t.nan_to_num(7.0) for t in got], [t.nan_to_num(7.0) for t in want])
    if any(want.flags.tolist()):
        with pytest.raises(ValueError, match="nothing is packed"):
            kernel.relu2_24(x_TF.to(DEVICE), check=True)
    else:
        kernel.relu2_24(x_TF.to(DEVICE), check=True)


def test_groups_of_nothing_but_wild_numbers_keep_two():
    x_TF = torch.tensor([torch.nan, torch.inf, 1.0]).repeat(8).reshape(2, 12).to(DEVICE)
    got, want = (m.relu2_24(x_TF) for m in (kernel, reference))
    assert_equal([t.nan_to_num(7.0) for t in got], [t.nan_to_num(7.0) for t in want])


def test_strided_activations_and_gradients():
    x_TF = make_input(CASES[0], torch.float32).to(DEVICE)
    grad_TF = make_gradient(x_TF.cpu()).to(DEVICE)
    packed = kernel.relu2_24(x_TF)
    assert_equal(kernel.relu2_24(x_TF.T.clone().T), packed)
    strided = kernel.relu2_24_gradient(grad_TF.T.clone().T, x_TF.T.clone().T, packed.bits)
    assert_equal(strided, kernel.relu2_24_gradient(grad_TF, x_TF, packed.bits))


def test_activations_are_kept_for_the_backward_pass_with_a_bit_each():
    x_TF = make_input(Case(16, 64), torch.float32).to(DEVICE).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.relu2_24_dense(x_TF)
    assert sum(t.nbytes for t in kept) == x_TF.nbytes + x_TF.numel() // 8


def test_the_operators_are_registered_rightly_and_compile_into_one_graph():
    x_TF = make_input(Case(6, 20), torch.float32).to(DEVICE)
    bits_TB = kernel.relu2_24(x_TF).bits
    torch.library.opcheck(kernel.relu2_24_pack, (x_TF,))
    torch.library.opcheck(kernel._relu2_24_dense, (x_TF.clone().requires_grad_(),))
    torch.library.opcheck(kernel.relu2_24_grads, (x_TF, x_TF, bits_TB, True))

    def packed_and_dense(leaf_TF):
        return (*kernel.relu2_24(leaf_TF), kernel.relu2_24_dense(leaf_TF))

    compiled = torch.compile(packed_and_dense, backend="aot_eager", fullgraph=True)
    found = []
    for function in (packed_and_dense, compiled):
        leaf_TF = x_TF.clone().requires_grad_()
        out = function(leaf_TF)
        found.append([*out, *torch.autograd.grad(out[-1].square().sum(), leaf_TF)])
    assert_equal(*found)


def in_launch(name, change):
    """A launch whose results are changed."""
    right = getattr(kernel, name)
    return name, lambda *args, **options: change(list(right(*args, **options)))


def changed(place, change):
    def apply(results):
        results[place] = change(results[place])
        return tuple(results)

    return apply


MUTATIONS = {
    "values one place on": lambda: in_launch("run_square", changed(1, lambda t: t.roll(1, 1))),
    "codes of the other group": lambda: in_launch(
        "run_square", changed(2, lambda t: (t >> 4) | (t << 4))
    ),
    "bits of the dropped": lambda: in_launch("run_square", changed(3, lambda t: ~t)),
    "gradient without its factor": lambda: in_launch(
        "run_differentiate", changed(0, lambda t: t / 2)
    ),
    "values of the gradient swapped": lambda: in_launch(
        "run_differentiate", changed(1, lambda t: t.flip(1))
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch):
    x_TF = make_input(CASES[0], torch.float32)
    want = run(reference, x_TF)
    monkeypatch.setattr(kernel, *MUTATIONS[name]())
    with pytest.raises(AssertionError):
        assert_equal(run(kernel, x_TF), want)


def keep_by_magnitude(a0_G, a1_G, a2_G, a3_G):
    """Faults in the choice itself: the two smallest."""
    return tuple(~k for k in RIGHT(a0_G, a1_G, a2_G, a3_G))


RIGHT = kernel_pack.keep_two


@pytest.mark.skipif(ON_GPU, reason="a kernel that was compiled stays as it is")
def test_a_wrong_choice_is_noticed(monkeypatch):
    x_TF = make_input(CASES[0], torch.float32)
    want = run(reference, x_TF)
    monkeypatch.setattr(kernel_pack, "keep_two", keep_by_magnitude)
    with pytest.raises(AssertionError):
        assert_equal(run(kernel, x_TF), want)


def test_the_signatures_are_the_references():
    for name in ("relu2_24", "relu2_24_gradient", "relu2_24_dense", "relu2_24_dense_bits"):
        ours, theirs = (getattr(module, name) for module in (kernel, reference))
        assert inspect.signature(ours) == inspect.signature(theirs)


def test_what_does_not_fit_is_refused():
    x_TF = torch.ones(3, 8)
    for function in (kernel.relu2_24, kernel.relu2_24_dense):
        with pytest.raises(ValueError, match="features a multiple"):
            function(x_TF[:, :6])
    with pytest.raises(ValueError, match="got bits of"):
        kernel.relu2_24_gradient(x_TF, x_TF, torch.zeros(3, 2, dtype=torch.uint8))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    x_TF = make_input(CASES[0], torch.float16).to(DEVICE)
    for mode in (0, 2):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            packed = kernel.relu2_24(x_TF)
            kernel.relu2_24_gradient(x_TF, x_TF, packed.bits, pack=True)
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cutlass_multiplies_what_the_kernel_packed(dtype):
    x_TF = make_input(Case(128, 256), dtype).to(DEVICE)
    weight_FC = torch.randn(256, 64, device=DEVICE, dtype=dtype)
    if why := refusal(reference.relu2_24_dense(x_TF), "cutlass"):
        pytest.skip(why)
    packed = kernel.relu2_24(x_TF)
    sparse_TF = torch.sparse.SparseSemiStructuredTensorCUTLASS(
        x_TF.shape, packed=packed.values, meta=reference.cutlass_metadata(packed.codes),
        packed_t=None, meta_t=None, compressed_swizzled_bitmask=None,
    )  # fmt: skip
    want_TC = reference.relu2_24_dense(x_TF).double() @ weight_FC.double()
    error_TC = (sparse_TF @ weight_FC).double() - want_TC
    assert error_TC.norm() <= 1e-2 * want_TC.norm()


@pytest.mark.gpu
@pytest.mark.slow
def test_places_beyond_two_to_the_31():
    tokens, tail = 2**21 + 5, 64
    x_TF = torch.zeros(tokens, 1024, dtype=torch.bfloat16, device=DEVICE)
    x_TF[-tail:].normal_()
    got = kernel.relu2_24(x_TF)
    want = reference.relu2_24(x_TF[-tail:])
    assert_equal([t[-tail:] for t in got[:3]], want[:3])
    assert_equal([kernel.relu2_24_dense(x_TF)[-tail:]], [reference.relu2_24_dense(x_TF[-tail:])])
