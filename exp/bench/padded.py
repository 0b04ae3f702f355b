"""Our packed training step against the same network on padded batches.

    python exp/bench/padded.py [--quick] [--device cpu|cuda] [--threads N] [key=value ...]

Padded: every document as long as the longest of its batch, attention under a dense mask through
torch's SDPA. Weights, documents, optimizer, autocast and the rows whose logits are computed are
the same; so the gain is that of packing alone. Batches are those of real epochs: track nano, and
all of ARC-AGI-1 (documents up to 1,863 tokens), both with the nano preset's network and
batch_tokens, both eager. Before anything is timed, logits and gradients must agree in fp32.

Shapes: B documents, S longest, N packed tokens, M rows with a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timing import (
    measure,
    optimizer_step,
    parser,
    prepare,
    print_table,
    ratios,
    relative_error,
    require,
    spread,
    text,
    wake,
    write_result,
)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.arc.packing import Batch
from tiny_onn.arc.tokens import IGNORE
from tiny_onn.config.load import load_config
from tiny_onn.config.schema import Config
from tiny_onn.inference.excursion import autocast
from tiny_onn.losses.language import output_nll
from tiny_onn.model.attention import AttentionContext
from tiny_onn.model.tiny_onn import TinyONN, build_model
from tiny_onn.training.hardware import with_precision
from tiny_onn.training.optim import build_optimizer

NANO = ["preset=nano", "network=dense"]
TRACKS = {"nano": [], "arc1": ["data.track=all", "data.max_tokens=1863"]}


@dataclass(frozen=True)
class Padded:
    """A batch as B x S tokens, flattened; rows_M are the rows with a target."""

    tokens: Tensor
    positions: Tensor
    doc: Tensor
    task_B: Tensor
    view_B: Tensor
    visible_B1SS: Tensor
    rows_M: Tensor

    @classmethod
    def of(cls, batch: Batch, causal: bool) -> Padded:
        """Pad a packed batch. Padding stands behind its document, so real tokens never see it."""
        layout, device = batch.layout, batch.tokens_N.device
        count, longest = len(layout.lengths), layout.max_seqlen
        lengths_B = torch.tensor(layout.lengths, device=device)
        column_S = torch.arange(longest, device=device)
        real_BS = column_S < lengths_B[:, None]
        cells_N = real_BS.flatten().nonzero().squeeze(1)

        def spread_out(packed: Tensor) -> Tensor:
            return packed.new_zeros(count * longest, *packed.shape[1:]).index_copy(
                0, cells_N, packed
            )

        in_prefix_BS = column_S < (0 if causal else layout.prefix_lens[:, None])
        visible_BSS = (column_S <= column_S[:, None]) | (
            in_prefix_BS[:, None, :] & in_prefix_BS[:, :, None]
        )
        return cls(
            tokens=spread_out(batch.tokens_N),
            positions=spread_out(batch.positions_N3),
            doc=torch.arange(count, device=device).repeat_interleave(longest),
            task_B=batch.task_B,
            view_B=batch.view_B,
            visible_B1SS=(visible_BSS & real_BS[:, None, :]).unsqueeze(1),
            rows_M=cells_N[batch.targets_N != IGNORE],
        )

    def attend(self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        shape = (len(self.task_B), -1)
        q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q_NHD, k_NKD, v_NKD))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible_B1SS, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1)


def padded_logits(model: TinyONN, padded: Padded) -> Tensor:
    """What ``model(batch, rows_M)`` computes, from the padded batch and the same weights."""
    cos, sin = model.rope(padded.positions)
    context = AttentionContext(cos, sin, attend=padded.attend)
    x, task_BC = model.embedding(padded.tokens, padded.doc, padded.task_B, padded.view_B)
    *earlier, last = list(model.blocks) * model.config.loops
    for block in earlier:
        x = block(x, task_BC, padded.doc, context)
    return model.logits(last(x, task_BC, padded.doc, context, padded.rows_M))


@dataclass(frozen=True)
class Case:
    """A batch in both forms, on the device."""

    batch: Batch
    padded: Padded
    rows_M: Tensor
    targets_M: Tensor

    def packed_loss(self, model: TinyONN) -> tuple[Tensor, Tensor]:
        return self._loss(model(self.batch, self.rows_M).logits_MV)

    def padded_loss(self, model: TinyONN) -> tuple[Tensor, Tensor]:
        return self._loss(padded_logits(model, self.padded))

    def _loss(self, logits_MV: Tensor) -> tuple[Tensor, Tensor]:
        return logits_MV, output_nll(logits_MV, self.targets_M)[0] / len(self.targets_M)


def make_cases(config: Config, count: int, device: torch.device) -> tuple[list[Case], int]:
    """Evenly spaced batches of the first epoch, and the number of tasks."""
    corpus = build_corpus(config.data, config.seed)
    epochs = EpochBatches(corpus, config.data, config.seed)
    cases = []
    for i in range(count):
        batch = epochs.batch(0, i * epochs.num_batches(0) // count).to(device)
        rows_M = (batch.targets_N != IGNORE).nonzero().squeeze(1)
        padded = Padded.of(batch, config.model.mask == "causal")
        cases.append(Case(batch, padded, rows_M, batch.targets_N[rows_M]))
    return cases, len(corpus.task_ids)


def check(model: TinyONN, case: Case) -> dict[str, float]:
    """Largest relative errors of logits and of any parameter's gradient, in fp32."""
    found = []
    for loss_of in (case.packed_loss, case.padded_loss):
        logits_MV, loss = loss_of(model)
        used = [p for p in model.parameters() if p.requires_grad]
        found.append([logits_MV, *torch.autograd.grad(loss, used)])
    errors = [relative_error(a, b) for a, b in zip(*found, strict=True)]
    errors = {"logits": errors[0], "gradients": max(errors[1:])}
    # varlen kernels on CUDA round to bfloat16
    limit = 1e-3 if model.attention_backend in ("sdpa", "reference") else 5e-2
    require(max(errors.values()) <= limit, f"packed and padded differ by {errors}")
    return errors


def epoch_of(
    model: TinyONN, losses: list[Callable], config: Config, device: torch.device
) -> Callable[[], None]:
    """A training step on each batch, in turn."""
    optimizer = build_optimizer(model, config.optim)

    def run() -> None:
        for loss_of in losses:
            with autocast(device, config.trainer.precision):
                _, loss = loss_of(model)
            optimizer_step(model, optimizer, loss, config.optim.clip_norm)

    return run


def bench(config: Config, args: Any, device: torch.device) -> dict[str, Any]:
    cases, num_tasks = make_cases(config, 1 if args.quick else 3, device)
    model = wake(build_model(config.model, num_tasks, config.moe, config.nsa)).to(device).train()
    model.use_backend(config.ops.backend, device)
    errors = check(model, cases[0])
    arms = {
        "packed": epoch_of(model, [case.packed_loss for case in cases], config, device),
        "padded": epoch_of(model, [case.padded_loss for case in cases], config, device),
    }
    warmups = 0 if args.quick else 1
    seconds = measure(arms, device, 1 if args.quick else 5, warmups, limit_s=14)
    tokens = sum(case.batch.num_tokens for case in cases)
    return {
        "batches": len(cases),
        "documents": sum(len(case.batch.order) for case in cases),
        "tokens": tokens,
        "padded_tokens": sum(len(case.padded.tokens) for case in cases),
        "longest": max(case.batch.layout.max_seqlen for case in cases),
        "relative_errors": errors,
        "packed_tokens_per_s": spread([tokens / s for s in seconds["packed"]], digits=1),
        "padded_tokens_per_s": spread([tokens / s for s in seconds["padded"]], digits=1),
        "gain": ratios(seconds["padded"], seconds["packed"]),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("overrides", nargs="*", help="key=value for the configuration")
    args = arguments.parse_args()
    device = prepare(args)
    small = ["data.batch_tokens=1863", "model.layers=1"] if args.quick else []
    results, rows = {}, []
    for name, track in TRACKS.items():
        config = with_precision(load_config([*NANO, *track, *small, *args.overrides]))
        found = results[name] = bench(config, args, device)
        rows.append(
            [
                name,
                f"{found['padded_tokens'] / found['tokens']:.2f}",
                text(found["packed_tokens_per_s"], 0),
                text(found["padded_tokens_per_s"], 0),
                text(found["gain"]),
            ]
        )
    print_table(
        ["batches", "padded/real tokens", "packed tokens/s", "padded tokens/s", "gain"], rows
    )
    settings = {"precision": config.trainer.precision, "compile": False}
    settings |= {"batch_tokens": config.data.batch_tokens, "model": vars(config.model)}
    write_result("padded", args, device, **settings, overrides=args.overrides, tracks=results)


if __name__ == "__main__":
    main()
