"""The gate: which experts fire, how they are weighted, and what gradient each pair gets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_onn.losses.sdl import sparsity
from tiny_onn.model.gate import CosineGate, _MeanWeights, exact_product, unit

WIDTH, EXPERTS = 24, 5


def make_gate(seed=0, target=1.5, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return CosineGate(WIDTH, EXPERTS, target, **options).to(dtype)


def tokens(count=40, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def cosines(gate, x_NC):
    return torch.nn.functional.cosine_similarity(
        x_NC.double().unsqueeze(1), gate.prototypes.detach().double().unsqueeze(0), dim=2
    )


@pytest.mark.parametrize("level", [0.05, 0.3, 0.999])
def test_an_expert_fires_exactly_where_its_cosine_is_above_its_threshold(level):
    gate = make_gate(dtype=torch.float32)
    with torch.no_grad():
        gate.thresholds.uniform_(-level, level)
    x_NC = tokens(500, dtype=torch.float32)
    cos_NE = cosines(gate, x_NC)
    apart_NE = (cos_NE - gate.thresholds.detach()).abs() > 1e-5
    expected = cos_NE > gate.thresholds.detach()
    assert torch.equal(gate(x_NC).runs_NE[apart_NE], expected[apart_NE])
    assert apart_NE.float().mean() > 0.99


def test_no_length_of_tokens_or_prototypes_matters():
    gate, x_NC = make_gate(), tokens()
    before = gate(x_NC).runs_NE
    with torch.no_grad():
        gate.prototypes.mul_(torch.logspace(-2, 3, EXPERTS, dtype=torch.float64).unsqueeze(1))
    lengths = torch.logspace(-2, 3, len(x_NC), dtype=torch.float64).unsqueeze(1)
    assert torch.equal(gate(x_NC * lengths).runs_NE, before)


@pytest.mark.parametrize("target", [0.5, 2.0, 7.0])
def test_the_first_thresholds_activate_the_target_on_average(target):
    torch.manual_seed(0)
    gate = CosineGate(128, 8, target)
    active = gate(torch.randn(4000, 128)).runs_NE.sum(dim=1).float().mean()
    assert float(active) == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("experts", [4, 40])
def test_prototypes_start_orthogonal_as_far_as_they_can(experts):
    torch.manual_seed(0)
    gate = CosineGate(16, experts, 1.0)
    torch.testing.assert_close(gate.prototypes.square().mean(dim=1), torch.ones(experts))
    if experts <= 16:
        torch.testing.assert_close(gate.gram(), torch.eye(experts), rtol=0, atol=1e-5)


def test_a_token_below_every_threshold_runs_nothing_or_the_nearest_in_both_modes():
    x_NC = tokens()
    for mode in ("skip", "top1"):
        gate = make_gate(none_active=mode)
        with torch.no_grad():
            gate.thresholds += 0.2
        margin_NE = cosines(gate, x_NC) - gate.thresholds.detach()
        lost_N = (margin_NE <= 0).all(dim=1)
        assert 5 < lost_N.sum() < 38
        for training in (True, False):
            decision = gate.train(training)(x_NC)
            ran_N = decision.runs_NE[lost_N].sum(dim=1)
            assert (ran_N == (mode == "top1")).all()
            if mode == "top1":
                chosen = decision.runs_NE[lost_N].float().argmax(dim=1)
                assert torch.equal(chosen, margin_NE[lost_N].argmax(dim=1))
            else:
                assert decision.weight_NE[lost_N].abs().max() == 0
            assert torch.equal(decision.runs_NE[~lost_N], (margin_NE > 0)[~lost_N])


def test_mean_weights_are_one_over_the_number_that_runs():
    decision = make_gate(none_active="top1")(tokens())
    k_N1 = decision.runs_NE.sum(dim=1, keepdim=True)
    torch.testing.assert_close(decision.weight_NE, decision.runs_NE / k_N1.double())


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 2**5 - 1), st.integers(0, 10**6))
def test_a_mean_weights_gradient_is_what_switching_the_pair_changes(bits, seed):
    """With unknown outputs counted as zero; L is linear in the token's output."""
    runs_E = torch.tensor([float(bits >> e & 1) for e in range(5)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    outputs_EC = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    outputs_EC = outputs_EC * runs_E.unsqueeze(1)
    pull_C = torch.randn(3, generator=generator, dtype=torch.float64)

    def loss(mask_E):
        count = mask_E.sum()
        return pull_C @ (mask_E @ outputs_EC) / count if count else pull_C.sum() * 0

    mask_1E = runs_E.unsqueeze(0).requires_grad_()
    (pull_C @ (_MeanWeights.apply(mask_1E)[0] @ outputs_EC)).backward()
    for e in range(5):
        on, off = runs_E.clone(), runs_E.clone()
        on[e], off[e] = 1, 0
        expected = loss(on) - loss(off)
        torch.testing.assert_close(mask_1E.grad[0, e], expected, rtol=1e-9, atol=1e-12)


def test_the_surrogate_gives_every_pair_the_cauchy_density_of_its_margin():
    gate, x_NC = make_gate(), tokens().requires_grad_()
    gate.fires_for_gates(x_NC).sum().backward()
    margin_NE = cosines(gate, x_NC) - gate.thresholds.detach()
    s = math.sqrt(WIDTH)
    density_NE = (s / math.pi) / (1 + (s * margin_NE) ** 2)
    torch.testing.assert_close(-gate.thresholds.grad, density_NE.sum(dim=0), rtol=1e-6, atol=1e-9)
    leaf_EC = gate.prototypes.detach().clone().requires_grad_()
    (unit(x_NC.detach()) @ unit(leaf_EC).T * density_NE.detach()).sum().backward()
    torch.testing.assert_close(gate.prototypes.grad, leaf_EC.grad, rtol=1e-6, atol=1e-9)
    assert x_NC.grad is None  # SDL moves the gate, not the tokens


@pytest.mark.parametrize("none_active", ["skip", "top1"])
def test_the_task_reaches_prototype_and_threshold_of_an_expert_that_never_fires(none_active):
    gate, x_NC = make_gate(none_active=none_active), tokens()
    with torch.no_grad():
        gate.thresholds[2] = 0.9
    decision = gate(x_NC)
    assert not decision.runs_NE[:, 2].any()
    # An expert that did not run has no output, so its weight's gradient is zero.
    pull_NE = tokens(len(x_NC), seed=2)[:, :EXPERTS] * decision.runs_NE
    (decision.weight_NE * pull_NE).sum().backward()
    assert gate.thresholds.grad[2] != 0
    assert gate.prototypes.grad[2].abs().max() > 0


@pytest.mark.parametrize("combine", ["mean", "gated"])
def test_sdl_lifts_experts_that_never_fire_whatever_the_weights(combine):
    gate, x_NC = make_gate(combine=combine), tokens()
    with torch.no_grad():
        gate.thresholds.fill_(0.9)
    fires_NE = gate.fires_for_gates(x_NC)
    assert not fires_NE.any()
    sparsity(fires_NE.sum().unsqueeze(0) / len(x_NC), target=2.0).backward()
    assert (gate.thresholds.grad > 0).all()  # a step down the slope lowers them
    assert (gate.prototypes.grad.abs().amax(dim=1) > 0).all()


def test_higher_thresholds_never_activate_more():
    gate, x_NC = make_gate(), tokens(300)
    counts = []
    for level in (-1.5, -0.2, 0.0, 0.1, 0.3, 1.5):
        with torch.no_grad():
            gate.thresholds.fill_(level)
        counts.append(gate(x_NC).runs_NE.sum(dim=0))
    assert all((more >= fewer).all() for more, fewer in zip(counts, counts[1:], strict=False))
    assert (counts[0] == 300).all() and (counts[-1] == 0).all()


def test_gated_weights_come_and_go_without_a_jump_and_have_an_exact_gradient():
    gate = make_gate(combine="gated")
    x_NC = tokens()
    decision = gate(x_NC)
    margin_NE = cosines(gate, x_NC) - gate.thresholds.detach()
    expected = math.sqrt(WIDTH) * margin_NE.clamp(min=0)
    torch.testing.assert_close(decision.weight_NE, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(decision.runs_NE, decision.weight_NE > 0)

    def weights(x_NC, prototypes_EC, thresholds_E):
        parameters = {"prototypes": prototypes_EC, "thresholds": thresholds_E}
        return torch.func.functional_call(gate, parameters, (x_NC,)).weight_NE

    leaves = [t.detach().clone().requires_grad_() for t in (x_NC[:6], *gate.parameters())]
    assert torch.autograd.gradcheck(weights, leaves)


def test_a_zero_token_and_a_zero_prototype_are_finite():
    gate = make_gate(dtype=torch.float32)
    with torch.no_grad():
        gate.prototypes[0] = 0
    x_NC = tokens(dtype=torch.float32)
    x_NC[3] = 0
    x_NC.requires_grad_()
    decision = gate(x_NC)
    (decision.weight_NE.square().sum() + gate.gram().square().sum()).backward()
    for tensor in (decision.weight_NE, x_NC.grad, gate.prototypes.grad, gate.thresholds.grad):
        assert torch.isfinite(tensor).all()


def test_autocast_does_not_touch_the_gate():
    gate, x_NC = make_gate(dtype=torch.float32), tokens(dtype=torch.float32)
    plain = gate(x_NC)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gate(x_NC)
        half = gate(x_NC.bfloat16())
    assert torch.equal(plain.weight_NE, cast.weight_NE) and half.weight_NE.dtype == torch.float32


def test_a_run_that_allows_tf32_does_not_round_the_gates_cosines(monkeypatch):
    gate, x_NC = make_gate(dtype=torch.float32), tokens(dtype=torch.float32)
    product, seen = torch.Tensor.__matmul__, []

    def watched(a, b):
        seen.append(torch.get_float32_matmul_precision())
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        gate(x_NC)
        gate.fires_for_gates(x_NC)
        gate.gram()
        assert seen == ["highest"] * 3
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_decides_as_the_cpu_does_whatever_products_may_round():
    gate, x_NC = make_gate(dtype=torch.float32), tokens(4000, dtype=torch.float32)
    margin_NE = (cosines(gate, x_NC) - gate.thresholds.detach()).abs()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        got_NE = gate.cuda()(x_NC.cuda()).runs_NE.cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got_NE[margin_NE > 1e-6], gate.cpu()(x_NC).runs_NE[margin_NE > 1e-6])


def test_no_tokens_at_all():
    for mode in ("skip", "top1"):
        decision = make_gate(none_active=mode)(tokens(0))
        assert decision.runs_NE.shape == decision.weight_NE.shape == (0, EXPERTS)


def test_the_exact_product_is_an_operation_with_gradients():
    a_NC, b_EC = tokens(7).requires_grad_(), tokens(3).requires_grad_()
    torch.library.opcheck(exact_product, (a_NC, b_EC))
    torch._dynamo.reset()
    compiled = torch.compile(exact_product, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for product in (exact_product, compiled):
            a, b = a_NC.detach().float().requires_grad_(), b_EC.detach().float()
            out_NE = product(a, b)
            (grad_NC,) = torch.autograd.grad(out_NE, a, torch.ones_like(out_NE))
            torch.testing.assert_close(out_NE, (a_NC @ b_EC.T).float())
            torch.testing.assert_close(grad_NC, b.sum(0).expand_as(a))
    assert torch.autograd.gradcheck(exact_product, (a_NC, b_EC))
