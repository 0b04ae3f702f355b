"""Hold-out metrics: right by hand, and without a trace in the model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_onn.arc.corpus import Example
from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import IGNORE, encode_pair
from tiny_onn.inference.excursion import excursion
from tiny_onn.inference.generate import generate
from tiny_onn.inference.holdout import measure, output_nll, teacher_forced
from tiny_onn.inference.prompt import encode_query


def examples(make_task, count=4, seed=0):
    tasks, kept = [], []
    for n in range(count):
        task = make_task([((2, 2), (2, 2)), ((3, 2), (3, 2))], [(2, 2)], seed + n, f"t{n}")
        rng = np.random.default_rng(100 + n)
        pair = Pair(*(rng.integers(0, 10, (2 + n, 3)).astype(np.uint8) for _ in range(2)))
        tasks.append(task)
        kept.append(Example(n, pair, f"t{n}/test/0"))
    return tasks, kept


def by_hand(model, document):
    """NLL, tokens and hits of one document from its own forward."""
    batch = pack([document])
    with torch.no_grad():
        logits = model(batch).logits_MV
    nll, hits, count = 0.0, 0, 0
    for row, target in enumerate(batch.targets_N.tolist()):
        if target != IGNORE:
            nll -= float(logits[row].log_softmax(-1)[target])
            hits += int(logits[row].argmax()) == target
            count += 1
    return nll, count, hits


@pytest.mark.parametrize("batch_tokens", [1, 60, 10000])
def test_teacher_forcing_equals_each_document_by_hand(tiny_model, make_task, batch_tokens):
    model = tiny_model()
    _, kept = examples(make_task)
    documents = [encode_pair(e.pair, e.task) for e in kept][::-1]
    nll, tokens, hits = teacher_forced(model, documents, batch_tokens)
    for n, document in enumerate(documents):
        expected = by_hand(model, document)
        assert nll[n] == pytest.approx(expected[0], rel=1e-10)
        assert (tokens[n], hits[n]) == expected[1:]
        assert tokens[n] == kept[::-1][n].pair.output.size + len(kept[::-1][n].pair.output) + 1


def test_metrics_are_means_over_output_tokens(tiny_model, make_task):
    model = tiny_model()
    tasks, kept = examples(make_task)
    expected = np.array([by_hand(model, encode_pair(e.pair, e.task)) for e in kept])
    made = measure(model, kept, tasks, max_decoded=2)
    total = expected.sum(axis=0)
    assert made.nll_per_token == pytest.approx(total[0] / total[1])
    assert made.token_accuracy == pytest.approx(total[2] / total[1])
    assert (made.num_outputs, made.num_decoded, made.num_tokens) == (4, 2, total[1])
    assert output_nll(model, [(e.task, e.pair) for e in kept]) == pytest.approx(
        (total[0], total[1])
    )


def test_exact_match_is_the_share_that_free_running_decoding_gets_right(tiny_model, make_task):
    model = tiny_model()
    tasks, kept = examples(make_task)
    prompts = [encode_query(tasks[e.task], e.pair.input, row=e.task) for e in kept]
    decoded = [g.grid for g in generate(model, prompts)]
    right = [
        replace(e, pair=Pair(e.pair.input, decoded[n])) if n != 1 else e for n, e in enumerate(kept)
    ]
    assert measure(model, right, tasks).exact_match == 0.75
    assert measure(model, kept, tasks).exact_match == 0.0
    assert math.isnan(measure(model, kept, tasks, max_decoded=0).exact_match)


def test_a_held_out_demonstration_is_not_shown_to_itself(make_task):
    task = make_task([((2, 2), (2, 2)), ((3, 2), (3, 2))], [(2, 2)])
    document = encode_query(task, task.demos[1], row=0, context="demos")
    shown = encode_pair(task.demos[0]).tokens
    np.testing.assert_array_equal(document.tokens[: len(shown)], shown)
    np.testing.assert_array_equal(document.tokens[len(shown) :], encode_pair(task.demos[1]).tokens)


def test_measuring_leaves_mode_random_state_and_weights_as_they_were(tiny_model, make_task):
    model = tiny_model(dropout=0.5).train()
    model.blocks[0].eval()  # a frozen part stays frozen, the rest stays in training
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tasks, kept = examples(make_task)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    first, second = measure(model, kept, tasks), measure(model, kept, tasks)
    assert first == second  # dropout is off while measuring
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_an_error_inside_an_excursion_restores_everything_too(tiny_model):
    model = tiny_model().train()
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"), excursion(model):
        torch.rand(3)
        assert not model.training
        raise RuntimeError("boom")
    assert model.training and torch.equal(torch.random.get_rng_state(), before)
