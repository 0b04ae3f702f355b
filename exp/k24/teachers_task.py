"""Four linear teachers, each a 2:4 mask of one matrix, and what a student can reach.

Teacher a of A answers y = T_a x with T_a = W* masked by M_a. A row (x, y, a) belongs to agent a
with probability p_a = 1 / A; x has mean 0, independent features and E x_i^2 = s_i^2. Nothing is
added to y, so a student with the right masks and matrix has loss 0.

One dense matrix W for all agents, which does not know a, has the loss (a mean over outputs)

    L(W) = 1/O sum_a p_a E |(W - T_a) x|^2 = 1/O sum_a p_a tr((W - T_a) S_a (W - T_a)^T)

with S_a = E[x x^T | a]. Its gradient is zero where W sum_a p_a S_a = sum_a p_a T_a S_a, so

    W = (sum_a p_a T_a S_a) (sum_a p_a S_a)^-1;   here S_a = diag(s^2) for all a:   W = mean_a T_a
    irreducible error = L(W) = 1/O sum_i s_i^2 sum_o var_a T_a[o, i]

(var: over the agents, divided by A). Masks that are independent and uniform keep an entry with
probability 1/2; with A = 4 that is 3/8 of the targets' power E|y|^2. Everything is of second order
in x, so losses of any student are exact, no sample of rows is needed to validate it.

Shapes: A agents, B rows of each, O outputs, I inputs, G = I / 4 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.sparse import k24

Draw = Literal["independent", "distinct"]
SCALES = (0.5, 2.0)
"""Of the features: log-uniform between these."""
RARE = 0.25
"""How often a rare feature is not zero."""


@dataclass(frozen=True)
class Teachers:
    """matrix_OI: W*. mask_AOI: bool. scale_I: s. rate_I: how often a feature is not zero; where it
    is not, it is Gaussian, and so large that its mean square is s^2 whatever its rate."""

    matrix_OI: Tensor
    mask_AOI: Tensor
    scale_I: Tensor
    rate_I: Tensor

    @property
    def weight_AOI(self) -> Tensor:
        return self.matrix_OI * self.mask_AOI

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x (A, B, I) and y (A, B, O), ``rows`` rows of every agent."""
        shape = (len(self.mask_AOI), rows, len(self.scale_I))
        x_ABI = torch.randn(shape, generator=generator) * (self.scale_I / self.rate_I.sqrt())
        if bool((self.rate_I < 1).any()):
            x_ABI = x_ABI * (torch.rand(shape, generator=generator) < self.rate_I)
        return x_ABI, torch.bmm(x_ABI, self.weight_AOI.transpose(1, 2))

    def loss(self, weight_AOI: Tensor) -> float:
        """Expected squared error an output of a student with these matrices, or with one (O, I)."""
        error_AOI = (weight_AOI.detach() - self.weight_AOI).double()
        return float((error_AOI * self.scale_I).square().sum(dim=2).mean())

    def best_shared(self) -> Tensor:
        """(O, I): the best matrix for all agents alike."""
        return self.weight_AOI.mean(dim=0)

    def irreducible(self) -> float:
        """Its loss."""
        return self.loss(self.best_shared())

    def power(self) -> float:
        """E y^2: the loss of a student that answers 0."""
        return self.loss(torch.zeros_like(self.matrix_OI))


def make_teachers(
    seed: int,
    outputs: int = 64,
    inputs: int = 64,
    agents: int = 4,
    draw: Draw = "independent",
    rare: bool = False,
) -> Teachers:
    """Random ones; the matrix is Gaussian, so it does not tell which entries a teacher keeps.

    Args:
        draw: "independent", uniform in every group; "distinct", no two agents of a group have the
            same pattern (at most six agents).
        rare: every other feature, at random, is zero in 3 of 4 rows; its mean square is the same.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // 4
    matrix_OI = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    if draw == "independent":
        choice_AOG = torch.randint(6, (agents, outputs, groups), generator=generator)
    else:
        order_6OG = torch.rand(6, outputs, groups, generator=generator).argsort(dim=0)
        choice_AOG = order_6OG[:agents]
    pattern_KAOG = F.one_hot(choice_AOG, 6).movedim(-1, 0)
    low, high = (torch.tensor(scale).log() for scale in SCALES)
    scale_I = (low + (high - low) * torch.rand(inputs, generator=generator)).exp()
    rate_I = torch.ones(inputs)
    if rare:
        rate_I[torch.rand(inputs, generator=generator).argsort()[: inputs // 2]] = RARE
    return Teachers(matrix_OI, k24.by_column(k24.kept(pattern_KAOG)) > 0, scale_I, rate_I)


def recovery(mask_AOI: Tensor, true_AOI: Tensor) -> tuple[float, float]:
    """Shares of the entries and of the groups of four whose mask is the teacher's.

    By chance 1/2 and 1/6.
    """
    same_AOI = mask_AOI == true_AOI
    groups_AOG = same_AOI.unflatten(-1, (-1, 4)).all(dim=-1)
    return float(same_AOI.float().mean()), float(groups_AOG.float().mean())
