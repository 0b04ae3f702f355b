import pytest
import torch

from tiny_onn.training.muon import (
    COEFFICIENTS,
    BatchedMuon,
    lr_adjustment,
    orthogonalize,
)


def polynomial_of_singular_values(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """What the iteration must compute, by SVD: the quintic applied to the singular values."""
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_applies_the_quintic_to_the_singular_values(shape, steps):
    stack = torch.randn(3, *shape, dtype=torch.float64, generator=torch.manual_seed(0))
    got = orthogonalize(stack, steps)
    for matrix, result in zip(stack, got, strict=True):
        expected = polynomial_of_singular_values(matrix, steps)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


def test_five_steps_bring_singular_values_near_one():
    stack = torch.randn(4, 16, 32, dtype=torch.float64, generator=torch.manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(stack))
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_zero_gradient_gives_a_zero_update():
    assert orthogonalize(torch.zeros(1, 4, 4)).abs().max() == 0


SHAPES = [(16, 16), (24, 16), (16, 24), (16, 16), (24, 16), (8, 40)]


@pytest.mark.parametrize(
    ("adjust", "torch_adjust"),
    [("original", "original"), ("match_rms_adamw", "match_rms_adamw")],
)
def test_batched_muon_follows_torch_muon(adjust, torch_adjust):
    torch.manual_seed(0)
    start = [torch.randn(s) for s in SHAPES]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    a = BatchedMuon(ours, lr=0.02, weight_decay=0.1, adjust=adjust)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=torch_adjust)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        moved = (q - p0).norm()
        assert (p - q).norm() < 0.02 * moved  # both iterate in bfloat16, in another order
        assert moved > 0.05


def test_float64_iteration_is_the_limit_of_the_bfloat16_one():
    torch.manual_seed(0)
    gradient = torch.randn(24, 16, dtype=torch.float64)
    moved = []
    for dtype in ("float64", "bfloat16"):
        p = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
        p.grad = gradient.clone()
        BatchedMuon([p], lr=1.0, weight_decay=0.0, ns_dtype=dtype).step()
        moved.append(p.detach())
    expected = polynomial_of_singular_values(gradient, 5) * -((24 / 16) ** 0.5)
    torch.testing.assert_close(moved[0], expected, rtol=1e-6, atol=1e-8)
    assert (moved[1] - expected).norm() < 0.05 * expected.norm()


def test_weight_decay_is_decoupled_from_the_gradient():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    BatchedMuon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.95))


def test_lr_adjustment_matches_both_papers():
    assert lr_adjustment(64, 16, "original") == 2.0
    assert lr_adjustment(16, 64, "original") == 1.0
    assert lr_adjustment(16, 100, "match_rms_adamw") == pytest.approx(2.0)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="2-D"):
        BatchedMuon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("shape", [(3, 16, 8), (3, 8, 16)])
def test_a_stack_moves_as_its_matrices_would_each_by_itself(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    stack = torch.nn.Parameter(start.clone())
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    optimizers = [BatchedMuon(p, lr=0.02, weight_decay=0.1) for p in ([stack], singles)]
    for _ in range(3):
        stack.grad = torch.randn(shape)
        for single, gradient in zip(singles, stack.grad, strict=True):
            single.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]))


def test_a_matrix_of_a_stack_without_gradient_is_left_alone_and_its_momentum_fades():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(2, 8, 4))
    optimizer = BatchedMuon([stack], lr=0.1, weight_decay=0.1)
    stack.grad = torch.randn(2, 8, 4)
    optimizer.step()
    before = stack.detach().clone()
    momentum = optimizer.state[stack]["momentum_buffer"].clone()
    stack.grad[0] = 0
    optimizer.step()
    assert torch.equal(stack[0], before[0]) and not torch.equal(stack[1], before[1])
    faded = optimizer.state[stack]["momentum_buffer"][0]
    torch.testing.assert_close(faded, 0.95 * momentum[0])
