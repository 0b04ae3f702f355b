"""Exposure: perfect, broken and real models, against a count by hand."""

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import NUM_COLORS, Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.config.schema import ModelConfig
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.exposure import _with_error, measure_exposure


def documents(count=12, seed=0):
    """Outputs of 1 to 9 cells; equal for equal inputs."""
    rng = np.random.default_rng(seed)
    docs = []
    for n in range(count):
        grid = rng.integers(0, 10, (1 + n % 3, 1 + n % 2)).astype(np.uint8)
        docs.append(encode_pair(Pair(grid, grid[::-1]), task=0))
    return docs


def trained(docs, steps, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(width=48, layers=2, heads=2, kv_heads=2, head_width=16, ffn_width=96)
    model = build_model(config, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = pack(docs)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(
            model(batch).logits_MV, batch.targets_N, ignore_index=-1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_model_that_knows_the_documents_by_heart_has_no_gap():
    docs = documents()
    found = measure_exposure(trained(docs, 150), docs)
    assert found.exact_forced == found.exact_free == 1 and found.gap == 0
    assert found.nll_own == pytest.approx(found.nll_forced) and found.nll_forced < 0.1
    assert found.num_outputs == 12 and found.num_injected == 10  # two outputs have one cell


def test_an_untrained_model_by_hand():
    docs = documents()
    model = trained(docs, 6)
    found = measure_exposure(model, docs, seed=4)
    forced = free = colors = colors_forced = colors_own = 0
    nll_forced = nll_own = tokens = 0.0
    recovered = cells = cells_right = injected = 0
    rng = np.random.default_rng(4)
    errors = [_with_error(doc, rng) for doc in docs]
    for doc, error in zip(docs, errors, strict=True):
        first, output = doc.prefix_len, doc.tokens[doc.prefix_len :]
        logits = model(pack([doc])).logits_MV[first - 1 :].double()
        color = output < NUM_COLORS
        right = (logits[:, :NUM_COLORS].argmax(-1).numpy() == output)[color]
        forced += bool(right.all())
        colors, colors_forced = colors + len(right), colors_forced + right.sum()
        nll_forced += nll(logits, output)
        own = written(model, doc, doc.tokens.copy(), first)
        right = (own == doc.tokens)[first:][color]
        free += bool(right.all())
        colors_own += right.sum()
        nll_own += nll(logits_of(model, doc, own)[first - 1 :], output)
        tokens += len(output)
        if error is not None:
            begun = doc.tokens.copy()
            begun[first : first + len(error)] = error
            own = written(model, doc, begun, first + len(error))
            later = slice(first + len(error), len(doc.tokens) - 1)
            right = (own == doc.tokens)[later][doc.tokens[later] < NUM_COLORS]
            recovered, injected = recovered + bool(right.all()), injected + 1
            cells, cells_right = cells + len(right), cells_right + right.sum()
    assert found.recovery == pytest.approx(recovered / injected) and found.num_injected == injected
    assert found.recovery_cells == pytest.approx(cells_right / cells) and 0 < cells_right < cells
    assert found.exact_forced == forced / 12 and found.exact_free == free / 12
    assert found.exact_forced == found.exact_free  # as for every model
    assert found.colors_forced == pytest.approx(colors_forced / colors)
    assert found.colors_own == pytest.approx(colors_own / colors)
    assert found.gap == pytest.approx((colors_forced - colors_own) / colors)
    assert colors_forced != colors_own
    assert found.nll_forced == pytest.approx(nll_forced / tokens, rel=1e-4)
    assert found.nll_own == pytest.approx(nll_own / tokens, rel=1e-4)


def written(model, doc, tokens, first):
    """``tokens`` with the colours from ``first`` on as the model likes them best, after what it
    wrote before: greedy, without a cache."""
    for at in range(first, len(tokens) - 1):
        if doc.tokens[at] < NUM_COLORS:
            tokens[at] = int(logits_of(model, doc, tokens)[at - 1, :NUM_COLORS].argmax())
    return tokens


def logits_of(model, doc, tokens):
    from dataclasses import replace

    with torch.no_grad():
        return model(pack([replace(doc, tokens=tokens)])).logits_MV.double()


def nll(logits, output):
    return float(-logits.log_softmax(-1)[range(len(output)), output.tolist()].sum().detach())


def test_errors_are_wrong_colours_of_the_first_half_and_the_same_for_every_model():
    docs = documents(60)
    a, b = (
        [_with_error(d, rng) for d in docs]
        for rng in (np.random.default_rng(1), np.random.default_rng(1))
    )
    for doc, begun, again in zip(docs, a, b, strict=True):
        output = doc.tokens[doc.prefix_len : -1]
        cells = np.flatnonzero(output < NUM_COLORS)
        if len(cells) < 2:
            assert begun is None
            continue
        assert np.array_equal(begun, again)
        at = len(begun) - 1
        assert begun[at] != output[at] and 0 <= begun[at] < NUM_COLORS
        assert np.array_equal(begun[:at], output[:at])
        assert at in cells[: max(1, len(cells) // 2)]
