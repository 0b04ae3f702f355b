"""One function, the experts of a mixture, by several programs, on inputs of a stated routing.

Inputs and dense einsums are the CPU benchmark's (moe.py); its routing and its loop are other ones
than here, which cut shares off and index stacked matrices. All take x_NC, mask_NE, weight_NE,
gate_up_EHC, down_ECF, as ``expert_ffn`` of kernels/moe does.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F, P active pairs, K places
for experts of a token.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from gpu_cases import NotAtHand

# isort: split
import torch
import torch.nn.functional as F
from moe import Function, Inputs, all_experts
from moe_gpu_report import RIVALS
from torch import Tensor

from tiny_onn_kernels.moe import kernel, reference


def shares(num_experts: int, active: float, load: str) -> Tensor:
    """(E,) share of the tokens that each expert fires for: their sum is ``active``.

    load: "even"; "zipf", as rank^-1.2, but at most 1 (what is cut off goes to the others); "dead",
    every other expert idle.
    """
    weight_E = torch.ones(num_experts, dtype=torch.float64)
    if load == "zipf":
        weight_E = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -1.2
    elif load == "dead":
        weight_E[1::2] = 0
    assert active <= int((weight_E > 0).sum()), f"{active} of {num_experts} experts, {load}"
    full_E = torch.zeros(num_experts, dtype=torch.bool)
    while True:
        rest_E = torch.where(full_E, 0, weight_E)
        share_E = torch.where(full_E, 1.0, (active - int(full_E.sum())) * rest_E / rest_E.sum())
        if float(share_E.max()) <= 1 + 1e-9:
            return share_E.clamp(max=1)
        full_E = share_E >= 1


def make_inputs(
    tokens: int,
    width: int,
    hidden: int,
    experts: int,
    active: float,
    load: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Inputs:
    """Random numbers of a trained layer's size; a token has about ``active`` experts.

    load: as in :func:`shares`, or "exact": every token has ``active`` of them, all alike.
    Weights: the mean over a token's experts, shaken a little.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    random_NE = torch.rand(tokens, experts, generator=generator, device=device)
    if load == "exact":
        mask_NE = random_NE.argsort(dim=1).argsort(dim=1) < active
    else:
        mask_NE = random_NE < shares(experts, active, load).to(device).float()
    weight_NE = mask_NE / mask_NE.sum(dim=1, keepdim=True).clamp(min=1)
    return Inputs(
        normal(tokens, width),
        weight_NE * (1 + 0.1 * normal(tokens, experts)),
        normal(experts, 2 * hidden, width) * width**-0.5,
        normal(experts, width, hidden) * hidden**-0.5,
        mask_NE,
        normal(tokens, width),
    ).like(dtype)


def with_tokens(inputs: Inputs, tokens: int) -> Inputs:
    """The first ``tokens``, or all and the first ones once more at the end; leaves of its own but
    for the matrices."""

    def cut(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[: max(0, tokens - len(tensor))]])[:tokens]

    x, weight = (cut(t).detach().requires_grad_() for t in inputs.leaves[:2])
    return Inputs(x, weight, inputs.gate_up, inputs.down, cut(inputs.mask), cut(inputs.grad))


def index_add_loop(
    x_NC: Tensor, mask_NE: Tensor, weight_NE: Tensor, gate_up_EHC: Tensor, down_ECF: Tensor
) -> Tensor:
    """Expert after expert; each adds its rows to the output. In float64 the truth for all others.

    Unlike moe.py's it does not index stacked matrices, whose gradients are as large as the stack.
    Waits for the device once an expert.
    """
    out_NC = torch.zeros_like(x_NC)
    experts = zip(
        mask_NE.unbind(1),
        weight_NE.unbind(1),
        gate_up_EHC.unbind(0),
        down_ECF.unbind(0),
        strict=True,
    )
    for mask_N, weight_N, gate_up_HC, down_CF in experts:
        token_P = mask_N.nonzero().squeeze(1)
        gate_PF, up_PF = (x_NC.index_select(0, token_P) @ gate_up_HC.mT).chunk(2, dim=1)
        hidden_PF = F.silu(gate_PF) * up_PF * weight_N.index_select(0, token_P).unsqueeze(1)
        out_NC = out_NC.index_add(0, token_P, hidden_PF @ down_CF.mT)
    return out_NC


def plain_grouped(
    x_NC: Tensor, mask_NE: Tensor, weight_NE: Tensor, gate_up_EHC: Tensor, down_ECF: Tensor
) -> Tensor:
    """grouped_mm as it is commonly written: index_select, activation and index_add of torch.

    The rows of a token are added in any order, so results differ from run to run. Waits for the
    device once, in nonzero.
    """
    expert_P, token_P = mask_NE.T.nonzero().unbind(dim=1)
    ends_E = mask_NE.sum(dim=0).cumsum(dim=0).int()
    rows_PC = x_NC.index_select(0, token_P)
    gate_PF, up_PF = F.grouped_mm(rows_PC, gate_up_EHC.mT, offs=ends_E).chunk(2, dim=1)
    place_P = token_P * mask_NE.shape[1] + expert_P
    weight_P = weight_NE.reshape(-1).index_select(0, place_P)
    hidden_PF = F.silu(gate_PF) * up_PF * weight_P.unsqueeze(1)
    out_PC = F.grouped_mm(hidden_PF, down_ECF.mT, offs=ends_E)
    return torch.zeros_like(x_NC).index_add(0, token_P, out_PC)


def find_scattermoe(folder: Path | None) -> ModuleType:
    """ScatterMoE's ``parallel_experts`` from a clone of github.com/shawntan/scattermoe.

    Its package is entered without running ``__init__``, which reaches into the transformers
    library.

    Args:
        folder: the clone, or one of several clones (as nsa_gpu.py takes it).

    Raises:
        NotAtHand: no clone there.
    """
    if folder is None:
        raise NotAtHand("not at hand: --third-party DIR, a clone of shawntan/scattermoe")
    file = "scattermoe/parallel_experts.py"
    found = [*folder.glob(file), *sorted(folder.glob(f"*/{file}"))]
    if not found:
        raise NotAtHand(f"not at hand: no {file} in {folder} or a folder of it")
    package = ModuleType("scattermoe")
    package.__path__ = [str(found[0].parent)]
    sys.modules.setdefault("scattermoe", package)
    return importlib.import_module("scattermoe.parallel_experts")


def scattermoe(parallel_experts: ModuleType) -> Function:
    """ScatterMoE, which takes a fixed number of experts a token: the largest there is.

    Unused places hold expert E, whose rows its kernels fill with zeros (no bias). Waits for the
    device once, to learn that number.
    """
    linear = parallel_experts.parallel_linear

    def run(
        x_NC: Tensor, mask_NE: Tensor, weight_NE: Tensor, gate_up_EHC: Tensor, down_ECF: Tensor
    ) -> Tensor:
        num_experts = mask_NE.shape[1]
        most = int(mask_NE.sum(dim=1).max())
        is_active_NK, expert_NK = mask_NE.to(x_NC.dtype).topk(most, dim=1)
        weight_NK = weight_NE.gather(1, expert_NK) * is_active_NK
        expert_NK = torch.where(is_active_NK > 0, expert_NK, num_experts)
        sorted_P, order_P = expert_NK.flatten().sort()
        expert_E = torch.arange(num_experts, device=x_NC.device)
        ends_E = torch.searchsorted(sorted_P, expert_E, right=True)
        places = (sorted_P, order_P, ends_E)
        inner_PH = linear(x_NC, gate_up_EHC.mT, most, *places, grouped_out=True)
        gate_PF, up_PF = inner_PH.chunk(2, dim=1)
        hidden_PF = F.silu(gate_PF) * up_PF
        return linear(hidden_PF, down_ECF.mT, 1, *places, gates=weight_NK, grouped_in=True)

    return run


def makers(third_party: Path | None) -> dict[str, Callable[[], Function]]:
    """Every program by name, ours first; making it may raise Unavailable."""
    rivals = (
        lambda: reference.expert_ffn_grouped,
        lambda: plain_grouped,
        lambda: scattermoe(find_scattermoe(third_party)),
        lambda: all_experts,
        lambda: index_add_loop,
    )
    return {"ours": lambda: kernel.expert_ffn, **dict(zip(RIVALS, rivals, strict=True))}
