"""SDL: driven to the target, zero where prototypes are orthogonal, finite and quiet everywhere."""

import pytest
import torch

from tiny_onn.losses.sdl import diversity, sdl_terms, sparsity
from tiny_onn.model.gate import unit


def gram(prototypes_EC):
    unit_EC = unit(prototypes_EC)
    return (unit_EC @ unit_EC.T).unsqueeze(0)


def prototypes(experts, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, width, generator=generator, dtype=torch.float64)


def used(*flags):
    return torch.tensor([flags], dtype=torch.bool)


def test_sparsity_is_the_mean_squared_relative_error():
    k_L = torch.tensor([2.0, 3.0, 0.0], requires_grad=True)
    value = sparsity(k_L, 2.0)
    assert float(value.detach()) == pytest.approx((0 + 0.25 + 1) / 3)
    value.backward()
    torch.testing.assert_close(k_L.grad, torch.tensor([0.0, 0.5, -1.0]) / 3)


def test_diversity_is_what_its_formula_says():
    torch.manual_seed(0)
    gram_LEE = torch.stack([gram(prototypes(4, 6, seed))[0] for seed in (1, 2)])
    used_LE = torch.tensor([[True, True, False, True], [True, True, True, True]])
    expected = 0.0
    for gram_EE, used_E in zip(gram_LEE, used_LE, strict=True):
        live = [e for e in range(4) if used_E[e]]
        terms = [float(gram_EE[i, j]) ** 2 for i in live for j in live if i != j]
        expected += sum(terms) / len(terms) / 2
    assert float(diversity(gram_LEE, used_LE)) == pytest.approx(expected)


def test_diversity_is_one_for_equal_prototypes_and_zero_for_orthogonal_ones():
    same = torch.ones(3, 5, dtype=torch.float64)
    assert float(diversity(gram(same), used(1, 1, 1))) == pytest.approx(1.0, rel=1e-6)
    orthogonal = 7 * torch.eye(3, 5, dtype=torch.float64)
    assert float(diversity(gram(orthogonal), used(1, 1, 1))) == 0


def test_an_orthonormal_start_gives_no_gradient_of_rounding_noise():
    p_EC = torch.nn.Parameter(torch.empty(16, 64))
    torch.nn.init.orthogonal_(p_EC)
    diversity(gram(p_EC), torch.ones(1, 16, dtype=torch.bool)).backward()
    assert float(p_EC.grad.norm()) < 1e-6


@pytest.mark.parametrize(("experts", "width"), [(8, 3), (20, 8)])
def test_more_experts_than_dimensions_go_down_to_welchs_bound(experts, width):
    p_EC = torch.nn.Parameter(prototypes(experts, width))
    everyone = torch.ones(1, experts, dtype=torch.bool)
    optimizer = torch.optim.LBFGS([p_EC], max_iter=200, line_search_fn="strong_wolfe")
    bound = (experts - width) / (width * (experts - 1))
    seen = []

    def closure():
        optimizer.zero_grad()
        value = diversity(gram(p_EC), everyone)
        value.backward()
        seen.append(float(value.detach()))
        return value

    optimizer.step(closure)
    assert seen[0] > 1.05 * bound
    assert min(seen) >= bound * (1 - 1e-6)
    assert min(seen) == pytest.approx(bound, rel=0.01)


def test_unused_experts_are_left_alone():
    p_EC = prototypes(4, 6).requires_grad_()
    diversity(gram(p_EC), used(1, 0, 1, 1)).backward()
    moved = p_EC.grad.abs().amax(dim=1) > 0
    assert moved.tolist() == [True, False, True, True]


@pytest.mark.parametrize("flags", [(0, 0, 0), (1, 0, 0), (1, 1, 1)])
def test_everything_is_finite_even_for_prototypes_of_length_zero(flags):
    p_EC = torch.zeros(3, 4, requires_grad=True)
    k_L = torch.zeros(1, requires_grad=True)
    terms = sdl_terms(k_L, gram(p_EC), used(*flags), target=2.0)
    (terms.sparsity + terms.diversity).backward()
    for tensor in (*terms, p_EC.grad, k_L.grad):
        assert torch.isfinite(tensor).all()


def test_the_prototypes_length_does_not_matter():
    p_EC = prototypes(4, 6)
    everyone = used(1, 1, 1, 1)
    scaled = diversity(gram(p_EC * torch.tensor([[0.1], [1.0], [3.0], [20.0]])), everyone)
    torch.testing.assert_close(scaled, diversity(gram(p_EC), everyone), rtol=1e-5, atol=0)
