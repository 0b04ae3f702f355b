"""Students of exp/k24/teachers.py: what stands between the agents' data and their matrices.

A student is a module with ``forward(x_ABI) -> (weight_AOI or weight_OI, overlap or None)``, the
agents' matrices of this step (none of them sees who asks: an agent chooses its mask alone), and
``masks() -> bool AOI``, which entries each agent keeps when evaluated. Its parameters are
``weight`` and, in ``patterns()``, what chooses masks.

Shapes: A agents, B rows of each, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from teachers_arms import Arm
from teachers_task import Teachers
from torch import Tensor, nn

from tiny_onn.config.schema_24 import K24Config
from tiny_onn.model.k24_parts import K24Parts
from tiny_onn.sparse import k24
from tiny_onn.sparse.mask import topk_mask

Found = tuple[Tensor, "Tensor | None"]


class K24Student(nn.Module):
    """One matrix, a learnt 2:4 mask for every agent: the product's own parts."""

    def __init__(self, config: K24Config, agents: int, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.clone())
        parts = K24Parts(config)
        self.pattern = parts.pattern(agents, *weight_OI.shape, shared=True)
        self.pattern.reset_parameters()
        self.k24 = parts

    @property
    def masked_weights(self) -> list:
        """What K24Control steers, by this name in TinyONN."""
        return [(self.pattern, self.weight)]

    def patterns(self) -> list[nn.Parameter]:
        return list(self.pattern.parameters())

    def forward(self, x_ABI: Tensor) -> Found:
        if self.training:
            agents, rows, _ = x_ABI.shape
            of_agent_NA = torch.eye(agents, dtype=torch.bool).repeat_interleave(rows, dim=0)
            self.pattern.activity.observe(x_ABI.flatten(0, 1), of_agent_NA)
        return self.pattern(self.weight)

    def masks(self) -> Tensor:
        return self.pattern.likeliest(self.weight)


class FixedMasks(nn.Module):
    """One matrix, masks that stay as they are: random ones, or the teachers' own."""

    def __init__(self, weight_OI: Tensor, mask_AOI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.clone())
        self.register_buffer("mask_AOI", mask_AOI)

    def patterns(self) -> list[nn.Parameter]:
        return []

    def forward(self, x_ABI: Tensor) -> Found:
        return k24.masked(self.weight, self.mask_AOI), None

    def masks(self) -> Tensor:
        return self.mask_AOI


class Dense(nn.Module):
    """One dense matrix for all agents, or one for each. Its masks are the two largest entries of
    every group after training, by magnitude."""

    def __init__(self, weight_OI: Tensor, agents: int, shared: bool) -> None:
        super().__init__()
        weight = weight_OI if shared else weight_OI.expand(agents, -1, -1)
        self.weight, self.agents = nn.Parameter(weight.clone()), agents

    def patterns(self) -> list[nn.Parameter]:
        return []

    def forward(self, x_ABI: Tensor) -> Found:
        return self.weight.expand(self.agents, -1, -1), None

    def masks(self) -> Tensor:
        return topk_mask(self.weight.detach().expand(self.agents, -1, -1), k24.TWO_FOUR)


class SoftThreshold(nn.Module):
    """Kaleidoscope's masks (arXiv 2410.08540): W_a = sign(W) relu(|W| - sigmoid(s_a)), with
    s_a = -(5 u + 5), u uniform, at the start. Not 2:4, and here without its own diversity loss."""

    def __init__(self, weight_OI: Tensor, agents: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.clone())
        self.threshold = nn.Parameter(-(5 * torch.rand(agents, *weight_OI.shape) + 5))

    def patterns(self) -> list[nn.Parameter]:
        return [self.threshold]

    def forward(self, x_ABI: Tensor) -> Found:
        kept_AOI = (self.weight.abs() - self.threshold.sigmoid()).relu()
        return self.weight.sign() * kept_AOI, None

    @torch.no_grad()
    def masks(self) -> Tensor:
        return self.weight.abs() > self.threshold.sigmoid()


def build_student(arm: Arm, config: K24Config, teachers: Teachers) -> nn.Module:
    """Draws its start from torch's default generator."""
    agents, outputs, inputs = teachers.mask_AOI.shape
    weight_OI = torch.randn(outputs, inputs) * inputs**-0.5
    if arm.given:
        weight_OI = teachers.matrix_OI
    if arm.student == "k24":
        student = K24Student(config, agents, weight_OI)
    elif arm.student == "random":
        mask_AOI = k24.best_mask(torch.rand(agents, outputs, inputs))
        student = FixedMasks(weight_OI, mask_AOI)
    elif arm.student == "true":
        student = FixedMasks(weight_OI, teachers.mask_AOI)
    elif arm.student == "soft_threshold":
        student = SoftThreshold(weight_OI, agents)
    else:
        student = Dense(weight_OI, agents, shared=arm.student == "shared")
    student.weight.requires_grad_(not arm.given)
    return student
