"""What the gates did in a training step, over all processes: for SDL, the log and expert resets.

Counts stay on the device; the processes add theirs up once a step. Filler rows do not count, and
only the training step makes these, so evaluation and generation cannot change them.

Shapes: L layers with experts, E experts, N tokens, S sampled tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tiny_onn.losses.sdl import SDLTerms, sdl_terms
from tiny_onn.model.dyn_moe import Routing


@dataclass(frozen=True)
class StepRouting:
    """One step's routing. Counts are int64 and of all processes; a looped block counts all rounds.

    layers: numbers of the blocks. active_LE: tokens that each expert fired for, before any
    fallback. tokens_L: tokens that the layer saw; none_L: of these, those that no expert fired
    for; pairs_L: executed pairs (token, expert). thresholds_LE: float, without gradient.
    mean_active_L, gram_LEE: differentiable, for SDL. samples_LSC: float32, gate inputs of this
    process, evenly spaced over its tokens; None unless asked for.
    """

    layers: tuple[int, ...]
    active_LE: Tensor
    tokens_L: Tensor
    none_L: Tensor
    pairs_L: Tensor
    thresholds_LE: Tensor
    mean_active_L: Tensor
    gram_LEE: Tensor
    samples_LSC: Tensor | None

    def sdl(self, target: float) -> SDLTerms:
        """SDL's terms of this step (:mod:`tiny_onn.losses.sdl`)."""
        return sdl_terms(self.mean_active_L, self.gram_LEE, self.active_LE > 0, target)

    def detached(self) -> StepRouting:
        """The same without the graph behind it."""
        mean_active_L, gram_LEE = self.mean_active_L.detach(), self.gram_LEE.detach()
        return replace(self, mean_active_L=mean_active_L, gram_LEE=gram_LEE)


def gather_routing(routing: Sequence[Routing], samples: int = 0) -> StepRouting:
    """One step's routing over all processes; a collective call where there are several.

    Args:
        routing: what the model returned, of at least one layer.
        samples: S, tokens of every layer to keep; 0 keeps none.
    """
    rounds: dict[int, list[Routing]] = {}
    for entry in routing:
        rounds.setdefault(entry.layer, []).append(entry)
    firsts = [entries[0] for entries in rounds.values()]
    world = dist.get_world_size() if dist.is_initialized() else 1

    with torch.no_grad():
        counts_LX = torch.stack([_count(entries) for entries in rounds.values()])
        if world > 1:
            dist.all_reduce(counts_LX)
        active_LE = counts_LX[:, :-3]
        tokens_L, none_L, pairs_L = counts_LX[:, -3:].unbind(dim=1)
        mean_L = active_LE.sum(dim=1) / tokens_L.clamp(min=1)

    # Of this process: gradients are averaged over the processes, hence the factor. The value is
    # then replaced by that of all processes, on which the loss depends.
    fired_L = torch.stack([sum(_real(e.fires_NE, e).sum() for e in es) for es in rounds.values()])
    share_L = fired_L * (world / tokens_L.clamp(min=1))
    return StepRouting(
        layers=tuple(rounds),
        active_LE=active_LE,
        tokens_L=tokens_L,
        none_L=none_L,
        pairs_L=pairs_L,
        thresholds_LE=torch.stack([entry.thresholds_E for entry in firsts]),
        mean_active_L=share_L + (mean_L.to(share_L.dtype) - share_L).detach(),
        gram_LEE=torch.stack([entry.gram_EE for entry in firsts]),
        samples_LSC=torch.stack([_sample(e, samples) for e in firsts]) if samples else None,
    )


def _real(rows: Tensor, entry: Routing) -> Tensor:
    return rows[: entry.num_rows]


def _count(rounds: list[Routing]) -> Tensor:
    """(E + 3,) int64: tokens that each expert fired for; tokens; tokens without; pairs run."""
    fires_NE = torch.cat([_real(entry.fires_NE, entry) > 0 for entry in rounds])
    runs_NE = torch.cat([_real(entry.runs_NE, entry) for entry in rounds])
    tokens = torch.full((), len(fires_NE), device=fires_NE.device)
    none = tokens - fires_NE.any(dim=1).sum()
    return torch.cat([fires_NE.sum(dim=0), torch.stack([tokens, none, runs_NE.sum()])])


def _sample(entry: Routing, samples: int) -> Tensor:
    """(S, C): evenly spaced rows, some of them twice where there are fewer."""
    assert entry.num_rows > 0, "a training step needs tokens"
    place_S = torch.arange(samples, device=entry.inputs_NC.device) * entry.num_rows // samples
    return entry.inputs_NC[place_S].float()
