"""The alignment loss of EAVI over a super-batch of true and self-fed prefixes.

Context c (task and query input), truth y of T tokens, model p. Take what the model writes itself
for a latent trajectory yhat, drawn from q(yhat | c) = prod_t p(yhat_t | c, yhat_<t), from which
every true token is given in turn: p(y | c, yhat) = prod_t p(y_t | c, yhat_<t). Then, by Jensen,

    log p~(y | c) = log E_q[ prod_t p(y_t | c, yhat_<t) ]
                 >= E_q[ sum_t log p(y_t | c, yhat_<t) ]  -  KL(q || q),

an evidence bound with the frozen model as posterior and prior alike, so that its KL is zero. The
excursion term is the negative bound by Monte-Carlo: exactly so for eavi.feed=sample at temperature
1 with geometry=truth, whose q is over colours at the true grid's places. feed=soft and greedy put
one mean or likeliest trajectory in the place of the expectation; geometry=free has rows of its own
for what is missing or surplus, and its long excursions count less. p~ is not the p that decodes;
they share all weights, and are the same where q is sure of y.

The truth term is teacher forcing. The divergence pulls what the model says on its own prefix to
what it says on the true one.

Shapes: M rows with a target, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.losses.language import IGNORE


@dataclass(frozen=True)
class AlignmentTerms:
    """Sums in nats: excursion, NLL of the truth on self-fed prefixes; truth, on true prefixes;
    divergence, KL(p on the true prefix, without gradient || p on the self-fed prefix)."""

    excursion: Tensor
    truth: Tensor
    divergence: Tensor


def alignment_terms(
    logits_MV: Tensor, targets_M: Tensor, truth_M: Tensor, weight_M: Tensor, twin_M: Tensor
) -> AlignmentTerms:
    """The terms of one super-batch.

    Args:
        logits_MV: (M, V) float; targets_M: int64 (M,), IGNORE counts for nothing.
        truth_M: bool (M,), rows of true prefixes.
        weight_M: float (M,), how much a row counts in excursion and divergence; rows of the truth
            have one too where an excursion wrote the truth (alignment_batch.py).
        twin_M: int64 (M,), for a row of a self-fed prefix the row of the true prefix that predicts
            the same place; IGNORE for none and elsewhere.
    """
    nll_M = F.cross_entropy(logits_MV, targets_M, reduction="none", ignore_index=IGNORE)
    truth = nll_M.masked_fill(~truth_M, 0).sum()
    excursion = (nll_M.masked_fill(weight_M == 0, 0) * weight_M.to(nll_M.dtype)).sum()
    own_M = torch.nonzero(twin_M != IGNORE).squeeze(1)
    logp_MV = logits_MV[own_M].log_softmax(dim=-1)
    wanted_MV = logits_MV.detach()[twin_M[own_M]].log_softmax(dim=-1)
    divergence_M = F.kl_div(logp_MV, wanted_MV, reduction="none", log_target=True).sum(dim=-1)
    divergence = (divergence_M * weight_M[own_M].to(divergence_M.dtype)).sum()
    return AlignmentTerms(excursion, truth, divergence)
