"""The same attention one token, one head and one key at a time: what the reference is held to.

Written from the definitions, not from the reference: block scores by counting shared tokens, the
window by sorting distances, choices by sorting scores. Only for tests, at some dozens of tokens.

Shapes: T tokens of one document, C its compressed blocks, H query heads in K groups of G, D head
width, E value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NaiveBranches:
    """Outputs (T, H, E) of the branches, scores[t][h] of the blocks, choices[t][h] as sets."""

    compressed: Tensor
    selected: Tensor
    window: Tensor
    scores: list[list[dict[int, float]]]
    choices: list[list[set[int]]]


def _attend(q_D: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    weights = (torch.stack(keys) @ q_D * len(q_D) ** -0.5).softmax(dim=0)
    return weights @ torch.stack(values), weights


def naive_branches(
    q_THD: Tensor,
    k_compressed_CKD: Tensor,
    v_compressed_CKE: Tensor,
    k_selected_TKD: Tensor,
    v_selected_TKE: Tensor,
    k_window_TKD: Tensor,
    v_window_TKE: Tensor,
    *,
    prefix: int,
    block: int,
    stride: int,
    select_block: int,
    count: int,
    window: int,
    choices: list[list[set[int]]] | None = None,
) -> NaiveBranches:
    """All branches of one document; ``choices`` overrides the selection."""
    (num_tokens, num_heads), kv_heads = q_THD.shape[:2], k_window_TKD.shape[1]
    groups = num_heads // kv_heads
    shape = (num_tokens, num_heads, v_window_TKE.shape[-1])
    found = NaiveBranches(*(q_THD.new_zeros(shape) for _ in range(3)), [], [])
    for t in range(num_tokens):
        end = prefix - 1 if t < prefix else t
        visible = range(end + 1)
        whole = [i for i in range(len(k_compressed_CKD)) if i * stride + block - 1 <= end]
        near = sorted(visible, key=lambda s, t=t: (abs(s - t), s))[:window]
        found.scores.append([])
        found.choices.append([])
        for h in range(kv_heads):
            score = dict.fromkeys((s // select_block for s in visible), 0.0)
            for g in range(h * groups, (h + 1) * groups):
                if not whole:
                    continue
                found.compressed[t, g], weights = _attend(
                    q_THD[t, g],
                    [k_compressed_CKD[i, h] for i in whole],
                    [v_compressed_CKE[i, h] for i in whole],
                )
                for i, weight in zip(whole, weights.tolist(), strict=True):
                    for s in range(i * stride, i * stride + block):
                        score[s // select_block] += weight / stride
            own = t // select_block
            chosen = {0, own, max(own - 1, 0)}
            free = sorted((-score[j], j) for j in score if j not in chosen)
            chosen |= {j for _, j in free[: count - len(chosen)]}
            if choices is not None:
                chosen = choices[t][h]
            found.scores[t].append(score)
            found.choices[t].append(chosen)
            read = [s for s in visible if s // select_block in chosen]
            for g in range(h * groups, (h + 1) * groups):
                for out, seen, keys, values in (
                    (found.selected, read, k_selected_TKD, v_selected_TKE),
                    (found.window, near, k_window_TKD, v_window_TKE),
                ):
                    if seen:
                        out[t, g], _ = _attend(
                            q_THD[t, g], [keys[s, h] for s in seen], [values[s, h] for s in seen]
                        )
    return found
