"""The Triton patterns against the reference with the same noise: on a GPU, or interpreted."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

import triton
import triton.language as tl

from tiny_onn_kernels.pattern24 import kernel, kernel_draw, reference
from tiny_onn_kernels.pattern24.cases import CASES, SEED, Case, make_inputs, run_case
from tiny_onn_kernels.pattern24.noise import philox

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


def run(module, case, dtype, device=DEVICE, exact=None):
    """A case by the kernels or the reference; ``exact``: computed in that dtype instead."""
    function = module.pattern24_free if case.free else module.pattern24
    weight, source = (t.to(device) for t in make_inputs(case, dtype))
    if exact is not None:
        weight, source = weight.to(exact), source.to(exact)
    return [t.cpu() for t in run_case(function, case, weight, source)]


def assert_same_choice_and_near(got, want, most):
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].double(), want[0].double())
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        assert (a.double() - b.double()).norm() <= most * b.double().norm()


@triton.jit
def draw_words(seed_ptr, counter_ptr, out_ptr, N: tl.constexpr):
    place_N = tl.arange(0, N)
    words = tl.randint4x(tl.load(seed_ptr), tl.load(counter_ptr + place_N))
    for number in tl.static_range(4):
        tl.store(out_ptr + number * N + place_N, words[number])


@pytest.mark.parametrize("seed", [0, 1, SEED, -7, 2**63 - 1])
def test_philox_in_pytorch_has_the_bits_of_tritons(seed):
    generator = torch.Generator().manual_seed(1)
    counter_N = torch.randint(-(2**62), 2**62, (256,), generator=generator)
    counter_N[:4] = torch.tensor([0, 1, 2**32 - 1, 2**32])
    seed, counter_N = torch.tensor(seed, device=DEVICE), counter_N.to(DEVICE)
    out_4N = torch.empty(4, 256, dtype=torch.int32, device=DEVICE)
    draw_words[(1,)](seed, counter_N, out_4N, N=256)
    assert torch.equal(out_4N.long() & 0xFFFFFFFF, philox(seed, counter_N))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_references_in_float32(case):
    want = run(reference, case, torch.float32, exact=torch.float64)
    most = 2e-4 if case.tau < 0.5 else 1e-5  # a cold softmax enlarges rounding 8 times over
    assert_same_choice_and_near(run(kernel, case, torch.float32), want, most)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_references_in_float64(case):
    want = run(reference, case, torch.float64)
    assert_same_choice_and_near(run(kernel, case, torch.float64), want, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_values_and_gradients_equal_the_references_in_half_precision(case, dtype, most):
    want = run(reference, case, dtype, exact=torch.float64)
    assert_same_choice_and_near(run(kernel, case, dtype), want, most)


def test_half_precision_weights_with_float32_scores():
    case = Case((9, 24), agents=2)
    (weight, _), (_, score) = (make_inputs(case, d) for d in (torch.bfloat16, torch.float32))
    got, want = (
        run_case(m.pattern24, case, weight.to(DEVICE), score.to(DEVICE))
        for m in (kernel, reference)
    )
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert_same_choice_and_near([t.cpu() for t in got], [t.cpu() for t in want], 1e-2)


@pytest.mark.parametrize("groups", [16, 512])
def test_the_size_of_blocks_changes_nothing(groups, monkeypatch):
    case = Case((7, 36), agents=2)
    want = run(kernel, case, torch.float32)
    monkeypatch.setattr(kernel_draw, "BLOCK_GROUPS", groups)
    assert all(
        torch.equal(a, b) for a, b in zip(run(kernel, case, torch.float32), want, strict=True)
    )


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_results_repeat_bit_for_bit(case):
    first, second = (run(kernel, case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_agents_have_the_noise_of_the_offsets_behind_one_another():
    case = Case((5, 16), agents=3)
    weight, score = (t.to(DEVICE) for t in make_inputs(case, torch.float32))
    together = kernel.pattern24(weight, score, 1.0, 1.0, 3, 10)[1]
    num_groups = weight.numel() // 4
    alone = [
        kernel.pattern24(weight, s, 1.0, 1.0, 3, 10 + num_groups * agent)[1]
        for agent, s in enumerate(score)
    ]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, kernel.pattern24(weight, score, 1.0, 1.0, 4, 10)[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, interpreted
def test_wild_numbers_and_equal_ones_have_the_references_values_and_gradients():
    weight = torch.ones(40, 4, device=DEVICE)
    score = torch.randint(0, 3, (40, 4), generator=torch.manual_seed(0)).float().to(DEVICE)
    score[::5, 1:3] = torch.nan
    score[3] = torch.inf
    weight[7, 2], weight[8] = torch.nan, torch.inf
    for sample in (True, False):
        found = []
        for module in (kernel, reference):
            leaves = [t.clone().requires_grad_() for t in (weight, score)]
            out, pattern = module.pattern24(*leaves, 1.0, 1.0, 0, sample=sample)
            found.append([out, pattern, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        assert torch.equal(found[0][1], found[1][1])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_nothing_but_the_arguments_is_kept_for_the_backward_pass():
    weight, score = (t.to(DEVICE) for t in make_inputs(Case((64, 64)), torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.pattern24(weight.requires_grad_(), score.requires_grad_(), 1.0, 1.0, 0)
    assert sum(t.numel() for t in kept) == weight.numel() + score.numel() + 4


def test_strided_weights_scores_and_gradients():
    case = Case((12, 8))

    def strided(weight, score, *rest, **options):
        out, pattern = kernel.pattern24(weight.T.clone().T, score.T.clone().T, *rest, **options)
        return out.T.clone().T, pattern

    weight, score = (t.to(DEVICE) for t in make_inputs(case, torch.float32))
    got, want = (run_case(f, case, weight, score) for f in (strided, kernel.pattern24))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_operators_are_registered_rightly():
    case = CASES[1]
    weight, source = (t.to(DEVICE).requires_grad_() for t in make_inputs(case, torch.float32))
    numbers = [torch.tensor(v, device=DEVICE) for v in (2.0, 0.75, 5, 0)]
    torch.library.opcheck(kernel.pattern24_draw, (weight, source, *numbers, False, True, False))


def test_a_schedule_of_tensors_compiles_once_into_one_graph():
    weight, score = (
        t.to(DEVICE).requires_grad_() for t in make_inputs(Case((6, 8)), torch.float32)
    )
    compiled = torch.compile(kernel.pattern24, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            values = (1.0 + step, 2.0 - 0.5 * step, step)
            numbers = [torch.tensor(v, device=DEVICE) for v in values]
            found = []
            for function in (kernel.pattern24, compiled):
                out, pattern = function(weight, score, *numbers)
                found.append([out, pattern, *torch.autograd.grad(out.sum(), (weight, score))])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def with_argument(name, place, change):
    """A function of the kernels' launches that is given something else at one place."""
    right = getattr(kernel, name)

    def wrong(*args):
        args = list(args)
        args[place] = change(args[place])
        return right(*args)

    return name, wrong


MUTATIONS = {
    "another seed forward": lambda: with_argument("run_draw", 3, lambda t: t + 1),
    "another offset forward": lambda: with_argument("run_draw", 4, lambda t: t + 2),
    "noise left out": lambda: with_argument("run_draw", 8, lambda t: False),
    "kappa left out": lambda: with_argument("run_draw", 2, lambda t: t * 0),
    "another seed backward": lambda: with_argument("run_differentiate", 5, lambda t: t + 1),
    "another offset backward": lambda: with_argument("run_differentiate", 6, lambda t: t + 2),
    "another kappa backward": lambda: with_argument("run_differentiate", 3, lambda t: t * 1.01),
    "another tau backward": lambda: with_argument("run_differentiate", 4, lambda t: t * 1.01),
    "noise left out backward": lambda: with_argument("run_differentiate", 8, lambda t: False),
    "gradient to dropped weights": lambda: with_argument("run_differentiate", 9, lambda t: True),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch):
    monkeypatch.setattr(kernel, *MUTATIONS[name]())
    case = CASES[1]
    want = run(reference, case, torch.float32, exact=torch.float64)
    with pytest.raises(AssertionError):
        assert_same_choice_and_near(run(kernel, case, torch.float32), want, 1e-5)


def test_the_signatures_are_the_references():
    for name in ("pattern24", "pattern24_free"):
        ours, theirs = (getattr(module, name) for module in (kernel, reference))
        assert inspect.signature(ours) == inspect.signature(theirs)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        kernel.pattern24(torch.ones(3, 6), torch.ones(3, 6), 1.0, 1.0, 0)
    with pytest.raises(ValueError, match="got logits of"):
        kernel.pattern24_free(torch.ones(3, 8), torch.ones(3, 8), 1.0, 1.0, 0)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    weight, score = (t.to(DEVICE).requires_grad_() for t in make_inputs(CASES[1], torch.float32))
    for mode in (0, 2):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, _ = kernel.pattern24(weight, score, 1.0, 1.0, 0)
            torch.autograd.grad(out, (weight, score), torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.gpu
@pytest.mark.slow
def test_places_beyond_two_to_the_31():
    rows, tail = 2**21 + 5, 64
    weight = torch.zeros(rows, 1024, dtype=torch.bfloat16, device=DEVICE)
    weight[-tail:].normal_()
    score = weight.abs()
    out, pattern = kernel.pattern24(weight, score, 1.0, 1.0, 3, 0)
    offset = (rows - tail) * 256
    want = reference.pattern24(weight[-tail:], score[-tail:], 1.0, 1.0, 3, offset)
    same = (pattern[-tail:] == want[1]).float().mean()
    assert same > 0.999 and (out[-tail:] != 0).reshape(-1, 4).sum(dim=1).max() <= 2
