"""What a run has done: the counts that a resumed run goes on from and provenance reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunTotals:
    """What a run has done so far, over all processes; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    visible_pairs: int = 0
    """Query-key pairs that one layer's attention looked at, over all its branches."""
    full_pairs: int = 0
    """The same of a layer without NSA, in a network that has both."""
    compressed_chunks: int = 0
    """Runs of d tokens that NSA's phi took in, for one head of one layer."""
    compressed_blocks: int = 0
    """Blocks that it gave, likewise."""
    documents: int = 0
    expert_pairs: int = 0
    """Active pairs (token, expert), fallbacks included, summed over the layers with experts."""
    sparse_tokens: int = 0
    """Of ``tokens``, those of steps with 2:4 activations: after the dense warm-up."""
    sparse_targets: int = 0
    """The same of ``targets``."""
    excursion_tokens: int = 0
    """Tokens that passed the network without gradient, in excursions: prompts and fed ones."""
    seconds: float = 0.0
    next_holdout: int = 1
    """Number of the next hold-out measurement, in units of trainer.holdout_share."""
