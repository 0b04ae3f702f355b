"""The gate of DynMoE: which experts fire for a token, decided by each expert alone.

Expert e fires for token t where  cos(x_t, prototype_e) > threshold_e  (Guo et al., DynMoE, arXiv
2405.14297, equations 3 to 5, without the sigmoids, which change no decision and saturate). All of
it is computed in float32, under autocast and where matrix products may round their inputs to TF32
too: training and prediction, which differ in these, decide alike.

The decision is a step, so its gradient is a surrogate, and it is given to *every* pair: with
z = cos - threshold and s = sqrt(C), which is one over the spread of the cosine of two random
directions,

    d fires / d z  :=  (s / pi) / (1 + (s z)^2),

the density of a Cauchy distribution (the arctangent surrogate of spiking networks, Fang et al.,
arXiv 2007.05785). Its heavy tails still move an expert that fires for no token; the published
code's relu in front of its straight-through estimator gives such an expert exactly nothing.

Shapes: N tokens, E experts, C width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-8
LEAST_SHARE = 1e-3


class Decision(NamedTuple):
    """runs_NE: bool, the experts above their threshold and the fallback; weight_NE: of their
    outputs, zero elsewhere, float32 (float64 for a float64 model)."""

    runs_NE: Tensor
    weight_NE: Tensor


def _wide(x_NC: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x_NC if x_NC.dtype == torch.float64 else x_NC.float()


def _inverse_norm(x_NC: Tensor) -> Tensor:
    """(N, 1): one over each row's length; finite, with a finite gradient, for zero too."""
    return (x_NC.square().sum(dim=-1, keepdim=True) + NORM_EPS).rsqrt()


def unit(x_NC: Tensor) -> Tensor:
    """Rows divided by their norm, in float32 or wider; zero stays zero, with a finite gradient."""
    x_NC = _wide(x_NC)
    return x_NC * _inverse_norm(x_NC)


def no_autocast(device: torch.device) -> torch.autocast:
    """What is computed within keeps the dtype of its inputs."""
    return torch.autocast(device.type, enabled=False)


@torch.library.custom_op("tiny_onn::exact_product", mutates_args=())
def exact_product(a_NC: Tensor, b_EC: Tensor) -> Tensor:
    """a b^T in the inputs' dtype, under autocast too, and without TF32 where a run on CUDA allows
    it (its gradients may use it)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with no_autocast(a_NC.device):
            return a_NC @ b_EC.T
    finally:
        torch.set_float32_matmul_precision(allowed)


@exact_product.register_fake
def _(a_NC, b_EC):
    return a_NC.new_empty(a_NC.shape[0], b_EC.shape[0])


def _differentiate(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a_NC, b_EC = ctx.saved_tensors
    wants_a, wants_b = ctx.needs_input_grad
    with no_autocast(grad_NE.device):  # compiled, it runs under the forward pass's
        return grad_NE @ b_EC if wants_a else None, grad_NE.T @ a_NC if wants_b else None


exact_product.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class _Fires(torch.autograd.Function):
    """1 where the margin is positive, else 0; the surrogate of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, margin_NE: Tensor, sharpness: float) -> Tensor:
        ctx.save_for_backward(margin_NE)
        ctx.sharpness = sharpness
        return (margin_NE > 0).to(margin_NE.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, None]:
        (margin_NE,) = ctx.saved_tensors
        tail_NE = 1 + (ctx.sharpness * margin_NE).square()
        return grad_NE * (ctx.sharpness / math.pi) / tail_NE, None


class _MeanWeights(torch.autograd.Function):
    """w = r / k with r_te in {0, 1}, k = sum_e r: every running expert counts the same.

    The gradient of r_te is what switching the pair changes, to first order in the token's output
    y = sum_e w y_e. With g = dL/dy, so that dw_te = <g, y_e> and b = sum_e w dw = <g, y>:

        running, k > 1:  (dw_te - b) / (k - 1)     without the pair the others' mean is left
        running, k = 1:  dw_te                     without the pair nothing is left
        not running:     -b / (k + 1)              its output is unknown and counts as zero
    """

    @staticmethod
    def forward(ctx: Any, runs_NE: Tensor) -> Tensor:
        ctx.save_for_backward(runs_NE)
        return runs_NE / runs_NE.sum(dim=1, keepdim=True).clamp(min=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> Tensor:
        (runs_NE,) = ctx.saved_tensors
        k_N1 = runs_NE.sum(dim=1, keepdim=True)
        mean_N1 = (grad_NE * runs_NE).sum(dim=1, keepdim=True) / k_N1.clamp(min=1)
        off_NE = torch.where(k_N1 > 1, (grad_NE - mean_N1) / (k_N1 - 1).clamp(min=1), grad_NE)
        return torch.where(runs_NE > 0, off_NE, -mean_N1 / (k_N1 + 1))


class CosineGate(nn.Module):
    """Args:
    width: C.
    experts: E.
    target_active: thresholds start where random directions would activate that many experts.
    none_active: "skip", a token that no expert fires for runs none; "top1", it runs the one
        that is nearest to firing (largest cos - threshold). The same in training and evaluation.
    combine: "mean", weights are 1/k for the k experts that run; "gated", weights are
        s (cos - threshold), which is zero at the threshold, so that a pair comes and goes without
        a jump (as in ReMoE, arXiv 2412.14711) and the gradient is exact: inactive pairs have
        none, and only SDL's sparsity term moves an expert that never fires.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        target_active: float,
        none_active: Literal["skip", "top1"] = "skip",
        combine: Literal["mean", "gated"] = "mean",
    ) -> None:
        super().__init__()
        self.none_active, self.combine = none_active, combine
        self.sharpness = math.sqrt(width)
        self.prototypes = nn.Parameter(torch.empty(experts, width))
        self.thresholds = nn.Parameter(torch.empty(experts))
        self.reset_parameters(target_active / experts)

    @torch.no_grad()
    def reset_parameters(self, share: float) -> None:
        """Orthogonal prototypes (as far as E <= C) whose entries have mean square 1, and the
        threshold that a random direction passes with probability ``share``."""
        nn.init.orthogonal_(self.prototypes)
        self.prototypes.copy_(unit(self.prototypes) * self.sharpness)
        share = min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)
        quantile = torch.special.ndtri(torch.tensor(1 - share, dtype=torch.float64))
        self.thresholds.fill_(float(quantile) / self.sharpness)

    def margins(self, x_NC: Tensor) -> Tensor:
        """(N, E): cos - threshold."""
        x_NC = _wide(x_NC)
        # Scaled after the product: its N x E numbers are fewer than the N x C of the tokens.
        cos_NE = exact_product(x_NC, unit(self.prototypes)) * _inverse_norm(x_NC)
        return cos_NE - self.thresholds

    def forward(self, x_NC: Tensor) -> Decision:
        with no_autocast(x_NC.device):
            margin_NE = self.margins(x_NC)
            fires_NE = margin_NE > 0
            if self.combine == "gated":
                return Decision(fires_NE, self.sharpness * F.relu(margin_NE))
            runs_NE = fires_NE
            step_NE = _Fires.apply(margin_NE, self.sharpness)
            if self.none_active == "top1":
                nearest_NE = F.one_hot(margin_NE.argmax(dim=1), margin_NE.shape[1]).bool()
                nearest_NE &= ~fires_NE.any(dim=1, keepdim=True)
                runs_NE = fires_NE | nearest_NE
                step_NE = step_NE + nearest_NE.to(step_NE.dtype)
            return Decision(runs_NE, _MeanWeights.apply(step_NE))

    def fires_for_gates(self, x_NC: Tensor) -> Tensor:
        """(N, E) 0 or 1, differentiable in prototypes and thresholds only: what SDL sees, which
        shall move the gate and not what the tokens are."""
        with no_autocast(x_NC.device):
            return _Fires.apply(self.margins(x_NC.detach()), self.sharpness)

    def gram(self) -> Tensor:
        """(E, E): cosines of all prototypes with each other."""
        with no_autocast(self.prototypes.device):
            unit_EC = unit(self.prototypes)
            return exact_product(unit_EC, unit_EC)
