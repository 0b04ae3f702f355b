"""The alignment terms by hand, and that the teacher of the divergence gets no gradient."""

import pytest
import torch

from tiny_onn.losses.alignment import alignment_terms

LOGITS = [[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 0.0]]
TARGETS = [0, 2, 1, 1, -1]
TRUTH = [True, True, False, False, False]
WEIGHT = [0.0, 2.0, 1.0, 0.5, 0.0]
TWIN = [-1, -1, 1, -1, -1]


def terms(logits=LOGITS, dtype=torch.float64):
    logits_MV = torch.tensor(logits, dtype=dtype, requires_grad=True)
    return logits_MV, alignment_terms(
        logits_MV, *(torch.tensor(given) for given in (TARGETS, TRUTH, WEIGHT, TWIN))
    )


def number(tensor):
    return float(tensor.detach())


def test_terms_are_sums_by_hand():
    logits, found = terms()
    p = logits.detach().softmax(-1)
    assert number(found.truth) == pytest.approx(float(-(p[0, 0].log() + p[1, 2].log())))
    by_hand = -(2 * p[1, 2].log() + p[2, 1].log() + 0.5 * p[3, 1].log())
    assert number(found.excursion) == pytest.approx(float(by_hand))
    expected = float((p[1] * (p[1].log() - p[2].log())).sum())
    assert number(found.divergence) == pytest.approx(expected) and expected > 0.5


def test_each_term_reaches_its_own_rows_only():
    for name, rows in (("truth", [0, 1]), ("excursion", [1, 2, 3]), ("divergence", [2])):
        logits, found = terms()
        getattr(found, name).backward()
        reached = logits.grad.abs().sum(1).nonzero().squeeze(1).tolist()
        assert reached == rows, name


def test_the_divergence_s_gradient_is_the_difference_of_the_probabilities():
    logits, found = terms()
    found.divergence.backward()
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad[2], p[2] - p[1])


def test_it_vanishes_where_both_prefixes_say_the_same():
    _, found = terms([LOGITS[0], LOGITS[2], LOGITS[2], *LOGITS[3:]])
    assert number(found.divergence) == pytest.approx(0, abs=1e-12)


def test_no_excursion_is_no_term():
    logits = torch.randn(4, 3)
    truth_M, none = torch.ones(4, dtype=torch.bool), torch.full((4,), -1)
    found = alignment_terms(logits, torch.tensor([0, 1, 2, 0]), truth_M, torch.zeros(4), none)
    assert found.excursion == 0 and found.divergence == 0 and found.truth > 0


def test_a_row_without_weight_counts_for_nothing_even_where_it_is_infinite():
    logits = [[-torch.inf, 0.0, 0.0], *LOGITS[1:]]
    _, found = terms(logits)
    assert torch.isfinite(found.excursion) and torch.isinf(found.truth)
