"""What 2:4 activations drop in the steps that are logged, by layer.

Counting passes over the hidden layer two to four times more, so other steps do without.
"""

from __future__ import annotations

from torch import nn

from tiny_onn.model.ffn import act24_layers
from tiny_onn.sparse.activation import DropTally
from tiny_onn.training.distributed import StepChannel


def count_drops(model: nn.Module, counting: bool) -> None:
    """Whether the coming training forwards count what they drop."""
    for layer in act24_layers(model):
        layer.tally.active = counting


def take_drops(model: nn.Module, channel: StepChannel) -> dict[str, float]:
    """Metrics of all processes, of what was counted since the last call; {} without such layers.
    A collective call.

    By layer (of those with 2:4 activations, from 0): ``nonzero``, the share of the activations
    that were not zero; ``dropped``, of these the share that 2:4 along the features dropped (in the
    dense warm-up: would have); ``feature_dropped``, the same of what weight gradients were taken
    of, along the tokens, features that stay dense included. ``sparse``: whether the warm-up is
    over. Rows that fill up a packed batch are counted with the others.
    """
    layers = act24_layers(model)
    if not layers:
        return {}
    width = len(DropTally.NAMES)
    counts = [count for layer in layers for count in layer.tally.take()]
    sums = channel.gather(*counts).sum(dim=0).tolist()
    metrics = {"act24/sparse": float(layers[0].is_sparse)}
    for row in range(len(layers)):
        numbers, nonzeros, dropped, operands, lost = sums[row * width : (row + 1) * width]
        metrics |= {
            f"act24/nonzero_{row}": nonzeros / max(numbers, 1),
            f"act24/dropped_{row}": dropped / max(nonzeros, 1),
            f"act24/feature_dropped_{row}": lost / max(operands, 1),
        }
    return metrics
