"""What ops.pattern24 and ops.relu2_24 choose between, as the model trains with it, to be timed.

Shapes: T tokens, C width, A agents (1), O rows of a matrix, I columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiny_onn.config.schema_24 import ActSparse24Config, K24Config
from tiny_onn.model.ffn import ActSparse24MLP
from tiny_onn.model.k24_parts import K24Parts
from tiny_onn.sparse.activation_packed import takes_packed

Step = Callable[[str], list[Tensor]]
"""Back-end -> the result of a forward pass, and its gradients."""


def mask_training(rows: int, columns: int, device: torch.device) -> Step:
    """By a back-end: the masked weight of a K24Linear, and its gradients."""
    layer = K24Parts(K24Config()).linear(columns, rows).to(device).train()
    layer.pattern.reset_parameters()
    leaves = list(layer.parameters())
    grad_AOI = torch.randn(1, rows, columns, device=device)

    def step(backend: str) -> list[Tensor]:
        layer.pattern.backend = backend
        weight_AOI, _ = layer.pattern(layer.weight)
        return [weight_AOI.detach(), *torch.autograd.grad(weight_AOI, leaves, grad_AOI)]

    return step


def ffn_training(
    tokens: int, hidden: int, width: int, dtype: torch.dtype, device: torch.device
) -> Step:
    """By a back-end: the output of an FFN with 2:4 activations, and its gradients."""
    dtype = torch.float32 if dtype == torch.float16 else dtype  # which it refuses
    config = ActSparse24Config(activation_dense_warmup_steps=0)
    layer = ActSparse24MLP(width, hidden, config).to(device, dtype).train()
    layer.tally.active = False
    layer.takes_packed = takes_packed(hidden, device, dtype)
    x_TC = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    grad_TC = torch.randn_like(x_TC)
    leaves = [x_TC, *layer.parameters()]

    def step(backend: str) -> list[Tensor]:
        layer.backend = backend
        y_TC = layer(x_TC)
        return [y_TC.detach(), *torch.autograd.grad(y_TC, leaves, grad_TC)]

    return step
