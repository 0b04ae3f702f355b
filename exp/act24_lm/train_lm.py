"""One arm trained, measured and written down.

Every arm of a seed begins with the same random weights where shapes allow it and sees the same
windows in the same order.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from arms import ARMS
from char_lm import CharLM
from text import VOCAB_SIZE, Text, windows
from torch import Tensor

from tiny_onn.model.ffn import act24_layers, count_optimizer_steps
from tiny_onn.sparse.activation import ActSparse24

CONTEXT, WINDOWS = 128, 8
PEAK_LR, LR_WARMUP_STEPS = 2e-3, 20
LOG_EVERY = 20

FIDELITY = {
    "naive, 95%": {},
    "naive, 95%, not permuted": {"permute": False},
    "naive, 100%": {"split_ratio": 1.0},
    "naive, 100%, not permuted": {"split_ratio": 1.0, "permute": False},
    "naive, 95%, dense features at random": {"split_by": "random"},
    "naive, 95% by what 2:4 drops": {"split_by": "dropped"},
    "mvue, 95%": {"gradient_method": "mvue"},
    "mvue, 100%": {"gradient_method": "mvue", "split_ratio": 1.0},
    "forward mask not kept, 95%": {"keep_forward_mask": False},
    "dX from the feature-wise operand, 95%": {"dx_direct_sparse": False},
}
"""Ways of the backward whose gradients are held against those of the masked dense network."""


def lr_at(step: int, steps: int) -> float:
    """Linear up over LR_WARMUP_STEPS, then linear down to a tenth at the end."""
    rise = min(1.0, (step + 1) / LR_WARMUP_STEPS)
    return PEAK_LR * rise * (1 - 0.9 * step / steps)


def loss_of(model: CharLM, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean NLL a character, in nats."""
    return F.cross_entropy(model(inputs_BS).flatten(0, 1), targets_BS.flatten())


@torch.no_grad()
def validation_loss(model: CharLM, text: Text) -> float:
    """NLL a character of the whole validation text in windows side by side, in nats."""
    model.eval()
    last = len(text.validation_N) - CONTEXT
    starts = torch.arange(0, last, CONTEXT).split(32)
    losses = [loss_of(model, *windows(text.validation_N, s, CONTEXT)) * len(s) for s in starts]
    model.train()
    return float(sum(losses) / sum(map(len, starts)))


def train(name: str, seed: int, steps: int, text: Text) -> dict[str, Any]:
    """Everything the table is made of."""
    arm = ARMS[name]
    torch.manual_seed(seed)
    model = CharLM(VOCAB_SIZE, arm.ffn, arm.config(steps)).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    count_optimizer_steps(optimizer, model)
    draws = torch.Generator().manual_seed(seed)
    drops, losses, began = [], [], time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps)
        starts = torch.randint(len(text.train_N) - CONTEXT, (WINDOWS,), generator=draws)
        loss = loss_of(model, *windows(text.train_N, starts, CONTEXT))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % LOG_EVERY == 0:
            drops.append({"step": step + 1, **take_drops(model)})
    seconds = time.monotonic() - began
    found = {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ffn_parameters": sum(p.numel() for n, p in model.named_parameters() if ".ffn." in n),
        "seconds": round(seconds, 2),
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "validation_loss": validation_loss(model, text),
        "drops": drops,
    }
    if name == "act24":
        found["fidelity"] = fidelity(model, text, draws)
    return found


def take_drops(model: CharLM) -> dict[str, list[float]]:
    """By layer since the last call: shares of nonzeros and of what was dropped of them."""
    rows = [layer.tally.take() for layer in act24_layers(model)]
    return {
        "nonzero": [a / max(n, 1) for n, a, *_ in rows],
        "dropped": [d / max(a, 1) for _, a, d, *_ in rows],
        "feature_dropped": [lost / max(kept, 1) for *_, kept, lost in rows],
    }


def fidelity(model: CharLM, text: Text, draws: torch.Generator) -> dict[str, dict[str, float]]:
    """Relative error (Frobenius, over all FFNs) of the weight gradients of one batch, and of the
    embedding's gradient, for which dX counts, by each of FIDELITY."""
    starts = torch.randint(len(text.train_N) - CONTEXT, (8 * WINDOWS,), generator=draws)
    batch = windows(text.train_N, starts, CONTEXT)
    layers = act24_layers(model)
    names = ("dU", "dD", "dX")
    parameters = {
        "dU": [layer.up.weight for layer in layers],
        "dD": [layer.down.weight for layer in layers],
        "dX": [model.symbols.weight],
    }
    before = [(layer.options, layer.token_keys) for layer in layers]

    def gradients(permute: bool = True, **options: Any) -> dict[str, list[Tensor]]:
        for layer, (_, keys) in zip(layers, before, strict=True):
            layer.options = ActSparse24(**options)
            layer.token_keys = keys if permute else None
        flat = [p for name in names for p in parameters[name]]
        found = iter(torch.autograd.grad(loss_of(model, *batch), flat))
        return {name: [next(found) for _ in parameters[name]] for name in names}

    exact = gradients(split_ratio=0.0)
    errors: dict[str, dict[str, float]] = {}
    for label, options in FIDELITY.items():
        got = gradients(**options)
        errors[label] = {name: relative_error(got[name], exact[name]) for name in names}
    for layer, (options, keys) in zip(layers, before, strict=True):
        layer.options, layer.token_keys = options, keys
        layer.tally.take()
    return errors


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """|got - want| / |want| over all tensors."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
    return (apart / sum(float(b.square().sum()) for b in want)) ** 0.5
