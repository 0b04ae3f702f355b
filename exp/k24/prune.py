"""2:4 after training: the dense arm's FFN matrices under masks of magnitude, or Wanda's.

Wanda (Sun et al., arXiv 2306.11695) keeps of every group the two largest |W_oi| ||x_i||, the norm
taken over the rows that the matrix meets. They are those of learnt pairs alone, as they are given
(identity view); the hold-out is looked at only to be measured.

Shapes: O rows, I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.tokens import Document
from tiny_onn.inference.holdout import evaluate_holdout, teacher_forced
from tiny_onn.model.checkpoint import Loaded
from tiny_onn.sparse.mask import apply_mask, topk_mask
from tiny_onn.sweep.facts import encode_all


def ffn_matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks' dense FFNs by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".ffn." in name
    }


@torch.no_grad()
def input_norms(model: nn.Module, documents: Sequence[Document]) -> dict[str, Tensor]:
    """float64 (I,) by matrix: the L2 norm of every input column over all documents' rows."""
    squares: dict[str, Tensor] = {}

    def watch(name: str):
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = inputs[0].detach().double().square().sum(dim=0)
            squares[name] = squares[name] + found if name in squares else found

        return note

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in ffn_matrices(model).items()]
    try:
        teacher_forced(model, documents)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@torch.no_grad()
def prune(model: nn.Module, norms: Mapping[str, Tensor] | None = None) -> None:
    """Leave the two largest of every four in each row of the FFN matrices, in place.

    ``norms``: of the inputs, where they count too (Wanda); None: magnitude.
    """
    for name, module in ffn_matrices(model).items():
        value = module.weight.double().abs()
        if norms is not None:
            value = value * norms[name]
        module.weight.copy_(apply_mask(module.weight, topk_mask(value)))


def measure_pruned(loaded: Loaded, method: str) -> dict[str, Any]:
    """The hold-out's metrics after pruning ``loaded.model`` by ``method``."""
    config = loaded.config
    corpus = build_corpus(config.data, config.seed)
    norms = None
    if method == "wanda":
        norms = input_norms(loaded.model, encode_all(corpus, corpus.examples, config))
    prune(loaded.model, norms)
    return evaluate_holdout(loaded.model, corpus, config)
