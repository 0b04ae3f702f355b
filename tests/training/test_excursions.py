"""Excursions: the model on what it wrote itself, without a trace; cached equals parallel."""

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import pack, unpack
from tiny_onn.arc.task import NUM_COLORS, Pair
from tiny_onn.arc.tokens import NEWLINE, decode_grid, encode_demos, encode_pair
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, MoeConfig, NsaConfig
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.alignment_batch import align
from tiny_onn.training.excursion_paths import ASK_EVERY, FreePath
from tiny_onn.training.excursions import ExcursionSettings, make_excursions, prompt_of

SHAPES = [((1, 1), (1, 1)), ((3, 2), (2, 5)), ((4, 4), (4, 4)), ((2, 7), (6, 3))]
NSA = NsaConfig(block=6, stride=3, select_block=3, select_count=4, window=7)
SPARSE = {
    "attention": "nsa",
    "ffn": "dynmoe",
    "deep_embed": DeepEmbedConfig(keys=["token", "task", "patch"], form="1x", task_rank=3),
}
FEEDS = ["soft", "sample", "greedy"]


def tiny_model(**changes):
    torch.manual_seed(0)
    config = ModelConfig(width=32, layers=2, heads=4, head_width=8, ffn_width=48, **changes)
    model = build_model(config, 6, MoeConfig(experts=4, expert_width=16), NSA)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def documents(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in both)) for both in shapes]
    return [encode_pair(pair, task=i, view=i % 8) for i, pair in enumerate(pairs)]


def settings(**changes):
    return ExcursionSettings(**({"max_tokens": 90} | changes))


def random_numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def watched(model, docs, given, seed=0):
    """Excursions, and the logits by which each was written: (rows of T + 1) of every one."""
    seen = []
    prefill, step = model.prefill, model.step
    model.prefill = lambda *a: record(prefill(*a))
    model.step = lambda *a: record((step(*a), None))[0]

    def record(result):
        seen.append(result[0])
        return result

    try:
        found = make_excursions(model, docs, given, generator=random_numbers(seed))
    finally:
        del model.prefill, model.step
    return found, seen


@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("geometry", ["truth", "free"])
@pytest.mark.parametrize("feed", FEEDS)
def test_written_logits_equal_the_parallel_forward_of_what_was_fed(changes, geometry, feed):
    """One document at a time, so that the logits of its steps need no bookkeeping."""
    model = tiny_model(**changes)
    for doc in [*documents(), long_query()]:
        ((own,),), steps = watched(model, [doc], settings(feed=feed, geometry=geometry))
        batch = align([doc], [[own]])
        own_M = batch.truth_M if batch.truth_M.all() else ~batch.truth_M  # it may be the truth
        logits_MV = model(batch.batch, batch.rows_M).logits_MV[own_M]
        assert len(steps) == len(logits_MV) == len(own.tokens) + 1
        torch.testing.assert_close(torch.cat(steps), logits_MV, rtol=1e-9, atol=1e-9)
        if feed == "soft" and len(doc.tokens) > 20:
            assert own.probs.max(axis=1).min() < 0.9  # a mixture, not a token


def long_query():
    """Demonstrations before the query."""
    rng = np.random.default_rng(5)
    grids = [rng.integers(0, 10, (3, 3)).astype(np.uint8) for _ in range(6)]
    pairs = [Pair(a, b) for a, b in zip(grids[::2], grids[1::2], strict=True)]
    return encode_demos(pairs[:2], pairs[2], task=5)


@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("geometry", ["truth", "free"])
@pytest.mark.parametrize("feed", ["soft", "greedy"])
def test_together_as_alone(changes, geometry, feed):
    model, docs = tiny_model(**changes), [*documents(), long_query()]
    given = settings(feed=feed, geometry=geometry)
    for doc, (together,) in zip(docs, make_excursions(model, docs, given), strict=True):
        ((alone,),) = make_excursions(model, [doc], given)
        assert np.array_equal(together.tokens, alone.tokens)
        assert np.array_equal(together.places, alone.places)
        assert together.ended == alone.ended
        if feed == "soft":
            np.testing.assert_allclose(together.probs, alone.probs, atol=1e-6)


@pytest.mark.parametrize("feed", FEEDS)
def test_true_geometry_keeps_places_and_newlines_and_colours_are_the_model_s(feed):
    model, docs = tiny_model(), documents()
    for doc, (own,) in zip(
        docs,
        make_excursions(model, docs, settings(feed=feed), generator=random_numbers()),
        strict=True,
    ):
        output, positions = doc.tokens[doc.prefix_len :], doc.positions[doc.prefix_len :]
        assert own.ended and len(own.tokens) == len(output) - 1
        assert np.array_equal(own.places[:-1], positions[:-1, :2])
        assert own.places[-1].tolist() == [0, int((output == NEWLINE).sum())]
        assert np.array_equal(own.tokens == NEWLINE, output[:-1] == NEWLINE)
        assert (own.tokens[own.tokens != NEWLINE] < NUM_COLORS).all()
    assert not np.array_equal(own.tokens, output[:-1])


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("max_tokens", [90, 40])
def test_a_free_excursion_spells_a_grid_or_is_cut_and_says_so(feed, max_tokens):
    """Cut at twice the true output, or where the document is as long as one may be."""
    model = tiny_model()
    docs = documents() * 8
    given = settings(feed=feed, geometry="free", max_tokens=max_tokens)
    found = make_excursions(model, docs, given, generator=random_numbers())
    ended = 0
    for doc, (own,) in zip(docs, found, strict=True):
        if own.ended:
            decode_grid(np.append(own.tokens, 13))
            ended += 1
        else:
            most = min(max_tokens - doc.prefix_len, 2 * (len(doc.tokens) - doc.prefix_len))
            assert len(own.tokens) == most - 1
    if feed == "sample":
        assert 0 < ended < len(docs)
    bound = [max_tokens - d.prefix_len < 2 * (len(d.tokens) - d.prefix_len) for d in docs]
    assert any(bound) == (max_tokens == 40)


def test_asking_rarely_which_have_ended_changes_nothing(monkeypatch):
    """As an accelerator is asked, which has to be waited for."""
    model, docs = tiny_model(), documents()
    asked = []
    original = FreePath.going_on

    def going_on(self, open_B):
        asked.append(self.step)
        return None if self.step % ASK_EVERY else original(self, open_B)

    for feed in FEEDS:
        given = settings(feed=feed, geometry="free")
        often = [make_excursions(model, [doc], given, generator=random_numbers()) for doc in docs]
        with monkeypatch.context() as patch:
            patch.setattr(FreePath, "going_on", going_on)
            rarely = [
                make_excursions(model, [doc], given, generator=random_numbers()) for doc in docs
            ]
        for ((a,),), ((b,),) in zip(often, rarely, strict=True):
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.places, b.places)
            assert a.ended == b.ended
            if feed == "soft":
                assert np.array_equal(a.probs, b.probs)
    assert max(asked) > ASK_EVERY


def test_greedy_and_temperature_zero_are_the_same():
    model, docs = tiny_model(), documents()
    for geometry in ("truth", "free"):
        want = make_excursions(model, docs, settings(feed="greedy", geometry=geometry))
        for feed in ("soft", "sample"):
            cold = settings(feed=feed, geometry=geometry, temperature=0.0)
            for (a,), (b,) in zip(want, make_excursions(model, docs, cold), strict=True):
                assert np.array_equal(a.tokens, b.tokens) and b.probs is None


def test_soft_probabilities_sharpen_with_the_temperature_and_are_over_colours():
    model, docs = tiny_model(), documents()[1:]
    sharpest = []
    for temperature in (4.0, 1.0, 0.1):
        first = [
            own.probs[0]
            for (own,) in make_excursions(model, docs, settings(temperature=temperature))
        ]
        for probs in first:
            assert probs.sum() == pytest.approx(1) and not probs[NUM_COLORS:].any()
        sharpest.append(np.mean([p.max() for p in first]))
    assert sharpest[0] < sharpest[1] < sharpest[2]


def test_samples_follow_q_and_the_generator():
    model, (doc,) = tiny_model(), documents()[:1]
    many = settings(feed="sample", per_document=4000)
    (found,) = make_excursions(model, [doc], many, generator=random_numbers())
    counts = np.bincount([int(own.tokens[0]) for own in found], minlength=NUM_COLORS)
    logits, _ = model.prefill(pack([prompt_of(doc)]), 4)
    q = logits[0, :NUM_COLORS].softmax(-1).numpy()
    np.testing.assert_allclose(counts / 4000, q, atol=0.03)
    again = make_excursions(model, [doc], many, generator=random_numbers())[0]
    assert [e.tokens.tolist() for e in again] == [e.tokens.tolist() for e in found]
    other = make_excursions(model, [doc], many, generator=random_numbers(1))[0]
    assert [e.tokens.tolist() for e in other] != [e.tokens.tolist() for e in found]


def test_several_of_a_document_share_one_prefill():
    model, docs = tiny_model(**SPARSE), documents()
    prompts = []
    prefill = model.prefill
    model.prefill = lambda batch, room: prompts.append(batch.num_tokens) or prefill(batch, room)
    found = make_excursions(
        model, docs, settings(feed="sample", per_document=3), generator=random_numbers()
    )
    assert prompts == [sum(d.prefix_len for d in docs)]
    assert [len(own) for own in found] == [3] * len(docs)
    assert len({own.tokens.tobytes() for own in found[3]}) == 3


@pytest.mark.parametrize("feed", [*FEEDS, "single"])
def test_excursions_leave_no_trace(feed):
    model = tiny_model(**SPARSE, dropout=0.2).train()
    model.blocks[1].eval()
    flags = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    (own,), *_ = make_excursions(
        model, documents(), settings(feed=feed), generator=random_numbers()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    again = make_excursions(model.eval(), documents(), settings(feed=feed),
                            generator=random_numbers())  # fmt: skip
    assert np.array_equal(again[0][0].tokens, own.tokens)  # dropout was off


@pytest.mark.parametrize("feed", [*FEEDS, "single"])
def test_no_graph_is_built(feed):
    """The head runs in prefill, in steps and in a plain forward."""
    model, graphs = tiny_model(), []
    model.head.register_forward_hook(lambda *a: graphs.append(torch.is_grad_enabled()))
    make_excursions(model, documents(), settings(feed=feed), generator=random_numbers())
    assert graphs and not any(graphs)


@pytest.mark.parametrize("geometry", ["truth", "free"])
@pytest.mark.parametrize("shape", [(1, 1), (30, 30)])
def test_the_smallest_and_the_largest_grid(shape, geometry):
    model = tiny_model()
    doc = encode_pair(Pair(np.zeros((1, 1), np.uint8), np.full(shape, 3, np.uint8)), task=0)
    ((own,),) = make_excursions(model, [doc], settings(geometry=geometry, max_tokens=1863))
    batch = align([doc], [[own]])
    assert len(batch.rows_M) == len(doc.tokens) - doc.prefix_len + len(own.tokens) + 1
    assert model(batch.batch, batch.rows_M).logits_MV.isfinite().all()


def test_unpack_is_the_inverse_of_pack():
    docs = [*documents(), long_query()]
    batch = pack(docs)
    for i, got in zip(batch.order, unpack(batch), strict=True):
        want = docs[i]
        assert np.array_equal(got.tokens, want.tokens)
        assert np.array_equal(got.positions, want.positions)
        assert (got.prefix_len, got.task, got.view) == (want.prefix_len, want.task, want.view)


def test_single_draws_replace_a_share_of_the_true_colours_and_nothing_else():
    model, docs = tiny_model(**SPARSE), [*documents(), long_query()]
    for share in (0.0, 0.5, 1.0):
        given = settings(feed="single", single_share=share, per_document=40)
        found = make_excursions(model, docs, given, generator=random_numbers())
        changed = colours = 0
        for doc, own in zip(docs, found, strict=True):
            output, positions = doc.tokens[doc.prefix_len :], doc.positions[doc.prefix_len :]
            for excursion in own:
                assert np.array_equal(excursion.places[:-1], positions[:-1, :2])
                assert excursion.places[-1].tolist() == [0, int((output == NEWLINE).sum())]
                differ = excursion.tokens != output[:-1]
                assert not (differ & (output[:-1] == NEWLINE)).any()
                changed, colours = changed + differ.sum(), colours + (output[:-1] < 10).sum()
        drawn_right = expected_right(model, docs)
        assert changed / colours == pytest.approx(share * (1 - drawn_right), abs=0.03)


def expected_right(model, docs):
    """Mean probability, among colours, of the true one after true tokens."""
    batch = pack(docs)
    kept = (batch.targets_N >= 0) & (batch.targets_N < NUM_COLORS)
    q = model(batch).logits_MV[kept][:, :NUM_COLORS].softmax(-1)
    return float(q.gather(1, batch.targets_N[kept, None]).mean().detach())


def test_what_is_begun_with_is_fed_first():
    model, docs = tiny_model(), documents()[1:]
    begun = [np.array([9]), np.array([1, 2, 3]), np.array([5, 5, 5, NEWLINE, 5])]
    for feed in FEEDS:
        found = make_excursions(
            model, docs, settings(feed=feed), generator=random_numbers(), begin_with=begun
        )
        for (own,), first in zip(found, begun, strict=True):
            assert own.tokens[: len(first)].tolist() == first.tolist()
            if feed == "soft":
                rows = own.probs[: len(first)]
                one_hot = np.zeros_like(rows)
                colors = first < NUM_COLORS
                one_hot[np.flatnonzero(colors), first[colors]] = 1
                assert np.array_equal(rows, one_hot)
    plain = make_excursions(model, docs, settings(feed="greedy"))
    assert found[0][0].tokens.tolist() != plain[0][0].tokens.tolist()
