"""Linear layers whose weight is 2:4 sparse without learning a mask: S-STE, and a fixed random mask.

Both have no parameter but the weight, which is trained whole (S-STE) or where the mask keeps it.

Shapes: N rows, O rows of the matrix, I columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import TWO_FOUR, topk_mask
from tiny_onn.sparse.pattern import patterns
from tiny_onn.sparse.soft_threshold import beta, soft_threshold_ste


class MaskedLinear(nn.Linear):
    """nn.Linear without bias that multiplies with :meth:`sparse_weight`, 2:4 along its columns.

    Raises:
        UserError: columns that 4 does not divide.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        if in_features % 4:
            raise UserError(
                f"got a matrix of {in_features} columns for 2:4 weights; expected a multiple of 4; "
                f"use {in_features + -in_features % 4}"
            )
        super().__init__(in_features, out_features, bias=False)
        self._cached: tuple[tuple, Tensor] | None = None

    def prepare(self) -> None:
        """What is decided once, when the weights have got their first values."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """bool (O, I): what is kept."""
        raise NotImplementedError

    def sparse_weight(self) -> Tensor:
        """(O, I), differentiable."""
        raise NotImplementedError

    def forward(self, x_NI: Tensor) -> Tensor:
        """(N, O)."""
        return F.linear(x_NI, self._current())

    def _current(self) -> Tensor:
        """The sparse weight; kept until weights or mode change where nothing is learnt."""
        if self.training or torch.is_grad_enabled():
            self._cached = None  # excursions leave the mode by themselves
            return self.sparse_weight()
        tensors = (self.weight, *self.buffers())
        about = tuple((id(t), t._version, t.device, t.dtype) for t in tensors)
        if self._cached is None or self._cached[0] != about:
            self._cached = about, self.sparse_weight()
        return self._cached[1]

    def train(self, mode: bool = True) -> MaskedLinear:
        self._cached = None  # sharded weights change without a new version
        return super().train(mode)


class SoftThresholdLinear(MaskedLinear):
    """S-STE (Hu et al., arXiv 2409.09099): multiplies with beta S(W), W gets the whole gradient.

    beta is computed once, of the initial weights, and frozen: the buffer ``scale``. The paper also
    makes dW sparse by an unbiased draw (MVUE), which only speeds hardware up: not done here.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def prepare(self) -> None:
        self.scale.fill_(beta(self.weight))

    @torch.no_grad()
    def mask(self) -> Tensor:
        return topk_mask(self.weight, TWO_FOUR, check=False)

    def sparse_weight(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            return soft_threshold_ste(self.weight, TWO_FOUR, self.scale, check=False)


class RandomMaskLinear(MaskedLinear):
    """A control: one of the six patterns a group, drawn once with equal chances and kept (the
    buffer ``kept``). Weights that it leaves out get no gradient; Muon's orthogonal updates move
    them all the same, which nothing reads."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        kept = torch.zeros(out_features, in_features, dtype=torch.bool)
        self.register_buffer("kept", kept)

    @torch.no_grad()
    def prepare(self) -> None:
        """Draws from torch's own generator."""
        pattern_K4 = patterns(TWO_FOUR.n, TWO_FOUR.m)
        drawn_OG = torch.randint(len(pattern_K4), (self.out_features, self.in_features // 4))
        self.kept.copy_(pattern_K4[drawn_OG].flatten(1))

    def mask(self) -> Tensor:
        return self.kept

    def sparse_weight(self) -> Tensor:
        return self.weight * self.kept
