"""The super-batch: labels by place, twins, and a loss and gradients that a plain loop gives too."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiny_onn.arc.packing import SoftTokens, pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import END, IGNORE, NEWLINE, encode_pair
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, MoeConfig, NsaConfig
from tiny_onn.losses.alignment import alignment_terms
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.alignment_batch import align, labels
from tiny_onn.training.excursions import Excursion, ExcursionSettings, make_excursions

TRUTH = encode_pair(Pair(np.zeros((1, 1), np.uint8), np.array([[1, 2], [3, 4]], np.uint8)), task=0)
"""Output: 1 2 NEWLINE 3 4 NEWLINE END."""
N = NEWLINE


def walk(tokens, ended=True):
    """A free excursion that wrote ``tokens``."""
    places, x, y = [(0, 0)], 0, 0
    for token in tokens:
        x, y = (0, y + 1) if token == N else (x + 1, y)
        places.append((x, y))
    return Excursion(np.array(tokens, dtype=np.int64), None, np.array(places), ended)


@pytest.mark.parametrize(
    ("tokens", "wanted", "places"),
    [
        ([1, 2, N, 3, 4, N], [1, 2, N, 3, 4, N, END], [0, 1, 2, 3, 4, 5, 6]),
        ([9, 9, N, 9, 9, N], [1, 2, N, 3, 4, N, END], [0, 1, 2, 3, 4, 5, 6]),
        ([9, N, 9, N], [1, 2, 3, 4, END], [0, 1, 3, 4, 6]),  # rows too short
        ([9, 9, 9, 9, N, 9], [1, 2, N, N, N, 3, 4], [0, 1, 2, -1, -1, 3, 4]),  # too long
        ([9, 9, N, 9, 9, N, 9, 9], [1, 2, N, 3, 4, N, END, END, END],
         [0, 1, 2, 3, 4, 5, 6, -1, -1]),  # a row too many
        ([9, 9, N], [1, 2, N, 3], [0, 1, 2, 3]),  # a row too few
        ([], [1], [0]),
    ],
    ids=str,
)  # fmt: skip
def test_labels_are_what_the_truth_has_at_that_place(tokens, wanted, places):
    found, place = labels(walk(tokens), TRUTH)
    assert found.tolist() == wanted
    assert place.tolist() == places


def test_rows_targets_and_twins_of_a_super_batch():
    other = encode_pair(
        Pair(np.zeros((2, 2), np.uint8), np.array([[5]], np.uint8)), task=1
    )  # output: 5 NEWLINE END
    first, second = walk([9, N, 9, N]), walk([7, 7, N])
    batch = align([TRUTH, other], [[first], [second, walk([5, N])]])
    # What the third one wrote is the second document's truth: it is not packed again.
    assert [len(batch.batch.layout.lengths), int((~batch.truth_M).sum())] == [4, 5 + 4]
    targets = batch.batch.targets_N[batch.rows_M]
    doc = batch.batch.layout.doc_N[batch.rows_M]
    names = {0: "truth 0", 1: "truth 1", 2: "first", 3: "second"}
    found, weights = {}, {}
    for slot, number in enumerate(batch.batch.order):
        found[names[number]] = targets[doc == slot].tolist()
        weights[names[number]] = set(batch.weight_M[doc == slot].tolist())
    assert weights == {"truth 0": {0.0}, "truth 1": {1.0}, "first": {1.0}, "second": {0.75}}
    assert found == {
        "truth 0": [1, 2, N, 3, 4, N, END],
        "truth 1": [5, N, END],
        "first": [1, 2, 3, 4, END],
        "second": [5, N, N, END],
    }
    for row in range(len(targets)):
        twin = int(batch.twin_M[row])
        if twin == IGNORE:
            continue
        assert not bool(batch.truth_M[row]) and bool(batch.truth_M[twin])
        assert targets[row] == targets[twin]
        task = [int(batch.batch.task_B[int(doc[i])]) for i in (row, twin)]
        assert task[0] == task[1]
    assert int((batch.twin_M != IGNORE).sum()) == 5 + 3  # all but one surplus place


def test_without_excursions_it_is_the_plain_batch():
    plain, batch = pack([TRUTH]), align([TRUTH], [[]])
    assert torch.equal(batch.batch.targets_N, plain.targets_N) and batch.batch.soft is None
    assert batch.truth_M.all() and not batch.weight_M.any() and (batch.twin_M == IGNORE).all()


SHAPES = [((1, 1), (1, 1)), ((3, 2), (2, 5)), ((2, 7), (6, 3))]


def tiny_model(sparse):
    torch.manual_seed(0)
    parts = {}
    if sparse:
        deep = DeepEmbedConfig(keys=["token", "task"], form="1x", task_rank=3)
        parts = {"attention": "nsa", "ffn": "dynmoe", "deep_embed": deep}
    config = ModelConfig(width=32, layers=2, heads=4, head_width=8, ffn_width=48, **parts)
    nsa = NsaConfig(block=6, stride=3, select_block=3, select_count=4, window=7)
    model = build_model(config, 3, MoeConfig(experts=4, expert_width=16), nsa)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def documents():
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in both)) for both in SHAPES]
    return [encode_pair(pair, task=i, view=i) for i, pair in enumerate(pairs)]


def terms_of(model, batch):
    return alignment_terms(
        model(batch.batch, batch.rows_M).logits_MV,
        batch.batch.targets_N[batch.rows_M],
        batch.truth_M,
        batch.weight_M,
        batch.twin_M,
    )


def test_the_truth_packed_twice_says_the_same_twice():
    """In float32, as rows of a matrix product: not bit for bit, but within its rounding."""
    model, docs = tiny_model(True).float(), documents()
    batch = pack([*docs, *docs])
    rows_M = torch.nonzero(batch.targets_N != IGNORE).squeeze(1)
    logits_MV = model(batch, rows_M).logits_MV
    doc_M = batch.layout.doc_N[rows_M]
    slots = {number: slot for slot, number in enumerate(batch.order)}
    for i in range(len(docs)):
        first, second = (logits_MV[doc_M == slots[n]] for n in (i, i + len(docs)))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("feed", "geometry"), [("soft", "truth"), ("soft", "free"), ("sample", "free")]
)
def test_loss_and_gradients_are_those_of_a_loop_that_recomputes_everything(sparse, feed, geometry):
    """Every document and excursion by a forward of its own, every term from its definition."""
    model, docs = tiny_model(sparse), documents()
    given = ExcursionSettings(feed, geometry, 1.0, 1, 60)
    found = make_excursions(model, docs, given, generator=torch.Generator().manual_seed(3))
    batch = align(docs, found)
    terms = terms_of(model, batch)
    total = 0.7 * terms.truth + 0.5 * terms.excursion + 0.3 * terms.divergence
    parameters = list(model.parameters())
    got = torch.autograd.grad(total, parameters, allow_unused=True)

    expected = torch.zeros((), dtype=torch.float64)
    for doc, (own,) in zip(docs, found, strict=True):
        true_logits = logits_of(model, doc, None)
        output = torch.tensor(doc.tokens[doc.prefix_len :])
        expected = expected + 0.7 * F.cross_entropy(true_logits, output, reduction="sum")
        own_logits = logits_of(model, own.document(doc), own.probs)
        width = int((output == NEWLINE).nonzero()[0])
        height = int((output == NEWLINE).sum())
        counts = min(1.0, len(output) / len(own.places))
        for row, (x, y) in zip(own_logits, own.places.tolist(), strict=True):
            twin = y * (width + 1) + x
            label = (int(output[twin]) if x <= width else NEWLINE) if y < height else END
            expected = expected - 0.5 * counts * row.log_softmax(-1)[label]
            if (y < height and x <= width) or (y == height and x == 0):
                wanted = true_logits[twin].detach().log_softmax(-1)
                apart = (wanted.exp() * (wanted - row.log_softmax(-1))).sum()
                expected = expected + 0.3 * counts * apart
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def logits_of(model, doc, probs):
    """Of the rows that predict the output of one document (END taken off), with its mixtures."""
    from dataclasses import replace

    batch = pack([doc])
    if probs is not None and len(probs):
        mixed = torch.tensor(probs.any(axis=1)).nonzero().squeeze(1)
        soft = SoftTokens(doc.prefix_len + mixed, torch.tensor(probs)[mixed])
        batch = replace(batch, soft=soft)
    return model(batch).logits_MV[doc.prefix_len - 1 :]


def test_where_the_model_is_right_both_halves_are_bit_equal():
    """Greedy, at temperature 0, of a model made to be right: its head copies the task's answer.

    Bit-equal by construction: what equals the truth shares its rows, loss and gradient."""
    model, docs = tiny_model(False).float(), documents()
    right = RightModel(model, docs)
    found = make_excursions(right, docs, ExcursionSettings("greedy", "free", 0.0, 1, 200))
    for doc, (own,) in zip(docs, found, strict=True):
        assert own.ended and np.array_equal(own.tokens, doc.tokens[doc.prefix_len : -1])
    batch = align(docs, found)
    terms = terms_of(model, batch)
    assert torch.equal(terms.excursion, terms.truth) and float(terms.divergence.detach()) == 0
    halves = [torch.autograd.grad(t, model.head.weight, retain_graph=True)[0] for t in
              (terms.excursion, terms.truth)]  # fmt: skip
    assert torch.equal(*halves) and halves[0].any()


def test_an_excursion_that_is_the_truth_counts_as_if_it_were_packed_again():
    """Against the same excursion fed as mixtures that are single tokens, which is packed."""
    from dataclasses import replace

    model, docs = tiny_model(True), documents()
    outputs = [d.tokens[d.prefix_len : -1] for d in docs]
    given = ExcursionSettings("greedy")
    same = [
        [replace(own, tokens=tokens)] * 2
        for (own,), tokens in zip(make_excursions(model, docs, given), outputs, strict=True)
    ]
    packed = [
        [replace(own, probs=np.zeros((len(own.tokens), 14), np.float32)) for own in both]
        for both in same
    ]
    found = []
    for excursions in (same, packed):
        batch = align(docs, excursions)
        terms = terms_of(model, batch)
        (gradient,) = torch.autograd.grad(terms.excursion, model.head.weight)
        found.append((len(batch.batch.order), terms.excursion.detach(), gradient))
    assert [count for count, *_ in found] == [3, 9]
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-9, atol=1e-9)


class RightModel(torch.nn.Module):
    """The logits of ``model``, with the true token raised above all others."""

    def __init__(self, model, docs):
        super().__init__()
        self.model, self.docs = model, docs

    def prefill(self, batch, room):
        logits, cache = self.model.prefill(batch, room)
        self.at = {
            row: (self.docs[i], self.docs[i].prefix_len) for row, i in enumerate(batch.order)
        }
        keep = cache.keep

        def keep_both(index_B):
            self.at = {new: self.at[old] for new, old in enumerate(index_B.tolist())}
            keep(index_B)

        cache.keep = keep_both
        return self.raised(logits), cache

    def step(self, tokens_B, positions_B3, cache, soft=None):
        self.at = {row: (doc, place + 1) for row, (doc, place) in self.at.items()}
        return self.raised(self.model.step(tokens_B, positions_B3, cache, soft))

    def raised(self, logits):
        for row, (doc, place) in self.at.items():
            logits[row, int(doc.tokens[min(place, len(doc.tokens) - 1)])] += 1000
        return logits
