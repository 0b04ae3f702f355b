"""The optimizer of DeepEmbed's tables: only rows that took part in a step change.

Row by row (and layer by layer), with mean square s and count c of the steps that touched it:

    c <- c + 1        s <- s + (mean(g^2) - s) / min(c, HORIZON)
    delta <- delta - lr (g / (sqrt(s) + EPS) + weight_decay * delta)

which is Adam (Kingma and Ba, arXiv 1412.6980) without momentum, with one second moment a row (as
the row-wise Adagrad of recommender tables, Naumov et al., arXiv 1906.00091, has one sum a row)
and its bias correction as a running mean. A row is touched where its gradient is not zero; all
others keep every bit, are not decayed and keep their state. Decay pulls delta to 0: the row to
the identity.

Shapes: R rows of a table, U rows touched, L layers, X numbers a row and layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tiny_onn.model.deep_embed_store import FileRows, PendingRows

HORIZON = 20
"""Touches over which the mean square looks back: Adam with beta2 = 0.95."""

EPS = 1e-8


def _local(tensor: Tensor) -> Tensor:
    """This process's own rows of a sharded tensor, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def new_row_state(rows: Tensor) -> dict[str, Tensor]:
    """State of a table (R, L, X): ``mean_square`` and ``touches``, float32 (R, L, 1)."""
    zeros = torch.zeros_like(rows[..., :1], dtype=torch.float32)
    return {"mean_square": zeros, "touches": zeros.clone()}


@torch.no_grad()
def update_rows(
    rows_ULX: Tensor,
    gradient_ULX: Tensor,
    mean_square_UL1: Tensor,
    touches_UL1: Tensor,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of the rule above, in place. A gradient that is not finite spoils its row for all
    to see (finite.py ends the run), as it does every other parameter."""
    square_UL1 = gradient_ULX.square().mean(dim=-1, keepdim=True)
    touched_UL1 = square_UL1 != 0  # NaN too
    touches_UL1.add_(touched_UL1)
    change_UL1 = (square_UL1 - mean_square_UL1) / touches_UL1.clamp(1, HORIZON)
    mean_square_UL1.add_(change_UL1 * touched_UL1)
    step_ULX = gradient_ULX / (mean_square_UL1.sqrt() + EPS)
    stepped_ULX = rows_ULX - lr * (step_ULX + weight_decay * rows_ULX)
    rows_ULX.copy_(torch.where(touched_UL1, stepped_ULX, rows_ULX))


@torch.no_grad()
def step_table(rows: Tensor, gradient: Tensor, state: dict[str, Tensor], **rule: float) -> None:
    """One step of a whole table in memory (R, L, X), sharded by rows or not."""
    tensors = [_local(rows), *map(_local, (state["mean_square"], state["touches"]))]
    gradient = _local(gradient)
    if gradient.device.type != "cpu":  # where finding the touched rows would wait for the device
        update_rows(tensors[0], gradient, *tensors[1:], **rule)
        return
    touched_U = gradient.flatten(1).any(dim=1).nonzero().squeeze(1)
    if not len(touched_U):
        return
    picked = [t.index_select(0, touched_U) for t in tensors]
    update_rows(picked[0], gradient.index_select(0, touched_U), *picked[1:], **rule)
    for whole, part in zip(tensors, picked, strict=True):
        whole.index_copy_(0, touched_U, part)


def merge_pending(pending: list[PendingRows]) -> tuple[Tensor, Tensor, Tensor] | None:
    """(ids_U, rows_ULX, gradient_ULX) of the forwards that got a gradient; None if none did.

    Rows that several forwards took appear once, with the sum of their gradients.
    """
    used = [(p.ids_U, p.leaf.detach(), p.leaf.grad) for p in pending if p.leaf.grad is not None]
    if not used:
        return None
    if len(used) == 1:
        return used[0]
    ids_U, place = torch.unique(torch.cat([ids for ids, _, _ in used]), return_inverse=True)
    shape = (len(ids_U), *used[0][1].shape[1:])
    place = place.to(used[0][1].device)
    rows = used[0][1].new_empty(shape).index_copy_(0, place, torch.cat([r for _, r, _ in used]))
    gradient = rows.new_zeros(shape).index_add_(0, place, torch.cat([g for _, _, g in used]))
    return ids_U, rows, gradient


def round_stochastically(values: Tensor) -> Tensor:
    """bfloat16 at random one of the two neighbours of each float32, right in the mean.

    Steps far below bfloat16's spacing of 1/256 would be lost by rounding to nearest. A value that
    is a bfloat16 already stays. Random numbers are torch's own (of the step, see step_seed.py).
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint_like(bits, 0, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class FileRowsOptimizer:
    """Steps the tables that live in files, from the gradients their last forward left.

    State is in memory: two numbers a row and layer, on the CPU.

    Args:
        stores: key -> its store.
    """

    def __init__(self, stores: Mapping[str, FileRows]) -> None:
        self.stores = dict(stores)
        self._state = {
            name: new_row_state(torch.empty(*store.shape[:2], 1))
            for name, store in self.stores.items()
        }

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        """Update the rows taken since the last step and write them back.

        Raises:
            ValueError: a table without a file that is open for writing.
            OSError: no space left.
        """
        for name, store in self.stores.items():
            file = store.file
            if file is None or not file.writable:
                raise ValueError(f"DeepEmbed table '{name}' has no file open for training")
            merged = merge_pending(store.take_pending())
            if merged is None:
                continue
            ids_U, rows, gradient = merged[0], merged[1].cpu(), merged[2].cpu()
            state = [t.index_select(0, ids_U) for t in self._state[name].values()]
            update_rows(rows, gradient, *state, lr=lr, weight_decay=weight_decay)
            for whole, part in zip(self._state[name].values(), state, strict=True):
                whole.index_copy_(0, ids_U, part)
            touched_U = gradient.flatten(1).any(dim=1).nonzero().squeeze(1)
            rows = rows.index_select(0, touched_U).float()
            stored = round_stochastically(rows) if store.dtype == torch.bfloat16 else rows
            file.write(ids_U[touched_U], stored)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Key -> mean_square and touches, (R, L, 1)."""
        return {name: dict(state) for name, state in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state.keys() == self._state.keys(), (sorted(state), sorted(self._state))
        for name, tensors in self._state.items():
            for part, tensor in tensors.items():
                tensor.copy_(state[name][part])


def file_stores(model: nn.Module) -> dict[str, FileRows]:
    """Every table of ``model`` that lives in a file, by its module's name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FileRows)}


def pending_leaves(model: nn.Module) -> list[Tensor]:
    """Rows of the tables in files that the last forward took: parameters for one step."""
    return [p.leaf for store in file_stores(model).values() for p in store.pending]
