"""Feed-forward networks: SwiGLU (Shazeer, arXiv 2002.05202), and squared ReLU (So et al., arXiv
2109.08668), whose activations may be made 2:4 sparse (tiny_onn/sparse/activation.py).

N tokens, C width, F hidden width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.config.schema import ModelConfig
from tiny_onn.config.schema_24 import ActSparse24Config
from tiny_onn.model.deep_embed import delta_factor, scale
from tiny_onn.model.k24_parts import SparseParts
from tiny_onn.sparse.activation import (
    ActSparse24,
    DropTally,
    squared_relu_24,
    squared_relu_24_frozen,
    token_keys,
    token_order,
)
from tiny_onn.sparse.activation_packed import squared_relu_24_packed


class SwiGLU(nn.Module):
    """x_NC -> (silu(x W_gate) * (x W_up)) W_down; W_gate and W_up are one matrix.

    ``delta_NF`` (DeepEmbed, form 4x) scales the hidden layer by 1 + delta. With ``sparse`` both
    matrices are 2:4 sparse.
    """

    def __init__(self, width: int, hidden: int, sparse: SparseParts | None = None) -> None:
        super().__init__()
        self.masked = sparse is not None
        if sparse is None:
            self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
            self.down = nn.Linear(hidden, width, bias=False)
        else:
            self.gate_up = sparse.linear(width, 2 * hidden)
            self.down = sparse.linear(hidden, width)

    def forward(self, x_NC: Tensor, delta_NF: Tensor | None = None) -> Tensor:
        gate_NF, up_NF = self.gate_up(x_NC).chunk(2, dim=-1)
        hidden_NF = F.silu(gate_NF) * up_NF
        if delta_NF is not None:
            hidden_NF = scale(hidden_NF, delta_NF)
        return self.down(hidden_NF)


class SquaredReLU(nn.Module):
    """x_NC -> relu(x W_up)^2 W_down; ``delta_NF`` and ``sparse`` as for :class:`SwiGLU`."""

    def __init__(self, width: int, hidden: int, sparse: SparseParts | None = None) -> None:
        super().__init__()
        self.masked = sparse is not None
        if sparse is None:
            self.up = nn.Linear(width, hidden, bias=False)
            self.down = nn.Linear(hidden, width, bias=False)
        else:
            self.up = sparse.linear(width, hidden)
            self.down = sparse.linear(hidden, width)

    def activate(self, x_NC: Tensor, delta_NF: Tensor | None) -> Tensor:
        """The hidden layer (N, F)."""
        relu_NF = F.relu(self.up(x_NC))
        hidden_NF = relu_NF * relu_NF
        return hidden_NF if delta_NF is None else scale(hidden_NF, delta_NF)

    def forward(self, x_NC: Tensor, delta_NF: Tensor | None = None) -> Tensor:
        return self.down(self.activate(x_NC, delta_NF))


class ActSparse24MLP(SquaredReLU):
    """:class:`SquaredReLU` with 2:4 activations, once its dense warm-up is over.

    ``optimizer_steps`` is saved with the weights: it says whether a loaded network is still in its
    warm-up, in which it is :class:`SquaredReLU` to the bit. Only :meth:`advance_step` moves it, so
    neither recomputed nor accumulated forwards count (see :func:`count_optimizer_steps`).

    In evaluation nothing is drawn and no token depends on another: the 2 largest of 4, or the soft
    threshold where that is the method.

    ``backend`` is a name that :func:`tiny_onn.ops.resolve_relu2_24` gave, "torch" runs anywhere;
    ``takes_packed``: by our kernels, whether the second product takes what they packed (see
    :func:`tiny_onn.sparse.activation_packed.takes_packed`).

    Raises:
        UserError: a hidden width not divisible by 4 (at the first sparse forward).
    """

    def __init__(self, width: int, hidden: int, config: ActSparse24Config) -> None:
        super().__init__(width, hidden)
        self.warmup_steps = config.activation_dense_warmup_steps
        self.options = ActSparse24(
            method=config.activation_sparse_method,
            gradient_method=config.gradient_sparse_method,
            split_ratio=config.split_ratio,
            split_by=config.split_by,
            keep_forward_mask=config.keep_forward_mask,
            dx_direct_sparse=config.dx_direct_sparse,
        )
        self.tally = DropTally()
        self.register_buffer("optimizer_steps", torch.zeros((), dtype=torch.int64))
        keys = token_keys(config.permute_seed) if config.permute_tokens else None
        self.register_buffer("token_keys", keys, persistent=False)
        self.backend, self.takes_packed = "torch", False
        self._steps = 0  # the same number where reading it waits for no device

    @property
    def is_sparse(self) -> bool:
        """Whether the dense warm-up is over."""
        return self._steps >= self.warmup_steps

    def advance_step(self) -> None:
        """An optimizer step is done."""
        self.optimizer_steps += 1
        self._steps += 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = int(self.optimizer_steps)

    @property
    def _counting(self) -> DropTally | None:
        """The tally of this forward, if it counts."""
        return self.tally if self.training and self.tally.active else None

    def forward(self, x_NC: Tensor, delta_NF: Tensor | None = None) -> Tensor:
        if not self.is_sparse:
            hidden_NF = self.activate(x_NC, delta_NF)
            if self._counting is not None:
                self._counting.add_tokens(hidden_NF, None)
            return self.down(hidden_NF)
        device = x_NC.device.type
        dtype = x_NC.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x_NC, up_FC, down_CF = (t.to(dtype) for t in (x_NC, self.up.weight, self.down.weight))
        factor_NF = None if delta_NF is None else delta_factor(delta_NF)
        if self.backend == "triton":
            assert delta_NF is None, "use_backend refuses it"
            return self._by_kernels(x_NC, up_FC, down_CF)
        if not self.training:
            return squared_relu_24_frozen(x_NC, up_FC, down_CF, self.options.method, factor_NF)
        order_N = None if self.token_keys is None else token_order(self.token_keys, len(x_NC))
        return squared_relu_24(
            x_NC, up_FC, down_CF, self.options, order_N, factor_NF, tally=self._counting
        )

    def _by_kernels(self, x_NC: Tensor, up_FC: Tensor, down_CF: Tensor) -> Tensor:
        if not self.training:  # its gradients are exact
            exact = replace(self.options, split_ratio=0.0)
            return squared_relu_24_packed(x_NC, up_FC, down_CF, exact, self.takes_packed)
        order_N = None if self.token_keys is None else token_order(self.token_keys, len(x_NC))
        return squared_relu_24_packed(
            x_NC, up_FC, down_CF, self.options, self.takes_packed, order_N, self._counting
        )


def kernels_cannot(config: ModelConfig) -> str | None:
    """The setting with which our kernels cannot compute :class:`ActSparse24MLP`, and what they
    can; None: they can."""
    act24, deep = config.act24, config.deep_embed
    if act24.activation_sparse_method != "naive":
        method = act24.activation_sparse_method
        return f"model.act24.activation_sparse_method=naive, got {method}"
    if not act24.keep_forward_mask:
        return "model.act24.keep_forward_mask=true, got false"
    if deep.keys and deep.form != "1x":
        return f"a hidden layer that nothing scales, got model.deep_embed.form={deep.form}, not 1x"
    return None


def act24_layers(model: nn.Module) -> list[ActSparse24MLP]:
    """All FFNs with 2:4 activations in ``model``, in its order."""
    return [module for module in model.modules() if isinstance(module, ActSparse24MLP)]


def count_optimizer_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on a step of ``optimizer`` advances the warm-up of ``model``'s 2:4 FFNs by one."""
    layers = act24_layers(model)
    if layers:
        optimizer.register_step_post_hook(lambda *_: [layer.advance_step() for layer in layers])
