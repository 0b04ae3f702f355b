"""Parameter groups, and one optimizer object that runs Muon, AdamW and DeepEmbed's rows together.

One object keeps Lightning's automatic optimization, clipping and checkpoints simple.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tiny_onn.config.schema import OptimConfig
from tiny_onn.model.deep_embed_store import DenseRows
from tiny_onn.model.embedding import RowTable
from tiny_onn.model.gate import CosineGate
from tiny_onn.sparse.k24_layer import PatternMask
from tiny_onn.training.distributed import sharded_like
from tiny_onn.training.muon import muon_defaults, muon_group_step
from tiny_onn.training.row_optim import (
    FileRowsOptimizer,
    file_stores,
    new_row_state,
    step_table,
)

BETAS = (0.9, 0.95)
EPS = 1e-8


class MuonAdamW(torch.optim.Optimizer):
    """Each parameter group names its rule in ``kind``: "muon", "adamw" (fused) or "rows".

    Groups also carry ``peak_lr``; the schedule writes ``lr``. ``row_files`` steps tables that
    live in files, at the rate of the group of kind "rows" (which may hold no parameter).

    ``row_scale`` maps a parameter to factors from 0 to 1, one for each of its rows (its first
    dimension), on what a step changes of it: the warm-up of rows that were begun anew.
    """

    def __init__(
        self, groups: list[dict[str, Any]], row_files: FileRowsOptimizer | None = None
    ) -> None:
        for group in groups:
            if group["kind"] not in ("muon", "adamw", "rows"):
                raise ValueError(f"unknown kind '{group['kind']}'; expected muon, adamw or rows")
            group.setdefault("peak_lr", group["lr"])
        super().__init__(groups, {})
        self.row_scale: dict[Tensor, Tensor] = {}
        self.row_files = row_files

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        before = {p: p.detach().clone() for p in self.row_scale}
        for group in self.param_groups:
            if group["kind"] == "muon":
                muon_group_step(group, self.state)
            elif group["kind"] == "rows":
                self._row_group_step(group)
            else:
                self._adamw_group_step(group)
        for p, scale_R in self.row_scale.items():
            scale = scale_R.view(-1, *(1,) * (p.dim() - 1)).to(p)
            p.copy_(before[p].lerp(p, sharded_like(scale, p)))
        return loss

    def _row_group_step(self, group: dict[str, Any]) -> None:
        rule = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        for p in group["params"]:
            if p.grad is None:
                continue
            if "touches" not in self.state[p]:
                self.state[p] = new_row_state(p)
            step_table(p, p.grad, self.state[p], **rule)
        if self.row_files is not None:
            self.row_files.step(**rule)

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the state of the tables in files if there are any."""
        state = super().state_dict()
        if self.row_files is not None:
            state["row_files"] = self.row_files.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.row_files is not None:
            self.row_files.load_state_dict(state_dict["row_files"])

    def _adamw_group_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def set_lr_scale(self, scale: float) -> None:
        """Set every group's learning rate to ``scale`` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale


def split_parameters(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Every parameter in exactly one of the kinds that this returns.

    matrices: 2-D weights of the blocks and their experts' stacks; tables: task and view vectors;
    deep_embed: rows of DeepEmbed's tables in memory; patterns: what chooses 2:4 masks; vectors: 1-D
    and smaller (norms, thresholds of the gates); embeddings: the rest (token embedding, head, bases
    of DeepEmbed, and, vectors that happen to stand below each other, prototypes of the gates and
    NSA's positions in a block).
    """
    owner = {
        id(p): kind
        for cls, kind in (
            (RowTable, "tables"),
            (DenseRows, "deep_embed"),
            (PatternMask, "patterns"),
        )
        for m in model.modules()
        if isinstance(m, cls)
        for p in m.parameters()
    }
    gate_ids = {id(p) for m in model.modules() if isinstance(m, CosineGate) for p in m.parameters()}
    kinds: dict[str, dict[str, Tensor]] = {
        "matrices": {}, "tables": {}, "deep_embed": {}, "patterns": {}, "embeddings": {},
        "vectors": {},
    }  # fmt: skip
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in owner:
            kind = owner[id(p)]
        elif p.dim() < 2:
            kind = "vectors"
        elif "blocks." in name and id(p) not in gate_ids and min(p.shape[-2:]) > 1:
            kind = "matrices"
        else:
            kind = "embeddings"
        kinds[kind][name] = p
    return kinds


def build_optimizer(model: nn.Module, optim: OptimConfig) -> MuonAdamW:
    """Muon (or AdamW) for the matrices of the blocks, AdamW for the rest.

    Norms and other vectors are never decayed. DeepEmbed's rows have a rule of their own
    (row_optim.py).
    """
    kinds = split_parameters(model)

    def adamw_group(name: str, lr: float, weight_decay: float) -> dict[str, Any]:
        return {
            "params": list(kinds[name].values()),
            "name": name,
            "kind": "adamw",
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": BETAS,
            "eps": EPS,
            "fused": True,  # also makes torch restore the step counts to the right device
        }

    if optim.matrices == "muon":
        matrices = {
            "params": list(kinds["matrices"].values()),
            "name": "matrices",
            "kind": "muon",
            **muon_defaults(optim.muon_lr, optim.muon_weight_decay),
        }
    else:
        matrices = adamw_group("matrices", optim.adamw_lr, optim.adamw_weight_decay)
    groups = [
        matrices,
        adamw_group("embeddings", optim.adamw_lr, optim.adamw_weight_decay),
        adamw_group("vectors", optim.adamw_lr, 0.0),
        adamw_group("tables", optim.table_lr, optim.table_weight_decay),
        adamw_group("patterns", optim.pattern_lr, 0.0),
    ]
    groups = [group for group in groups if group["params"]]
    stores = file_stores(model)
    if kinds["deep_embed"] or stores:
        groups.append(
            {
                "params": list(kinds["deep_embed"].values()),
                "name": "deep_embed",
                "kind": "rows",
                "lr": optim.deep_embed_lr,
                "weight_decay": optim.deep_embed_weight_decay,
            }
        )
    return MuonAdamW(groups, FileRowsOptimizer(stores) if stores else None)
