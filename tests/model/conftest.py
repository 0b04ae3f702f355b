"""What tests of decoding share: documents cut short, steps held against one parallel forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import pack


def _cut(doc, length):
    return replace(
        doc,
        tokens=doc.tokens[:length],
        positions=doc.positions[:length],
        prefix_len=min(doc.prefix_len, length),
    )


@pytest.fixture(scope="session")
def cut():
    """(document, length) -> its first tokens."""
    return _cut


@pytest.fixture(scope="session")
def decode_from():
    """(model, documents, cuts) -> (document, position, logits) of every step after prompts of
    ``cuts`` tokens, fed with the documents' own tokens; rows leave when they are done."""

    def run(model, docs, cuts):
        batch = pack([_cut(doc, n) for doc, n in zip(docs, cuts, strict=True)])
        logits, cache = model.prefill(batch, max_new_tokens=max(len(d.tokens) for d in docs))
        alive = [(i, cuts[i]) for i in batch.order]
        while alive:
            yield from ((i, at - 1, row) for (i, at), row in zip(alive, logits, strict=True))
            rows = [r for r, (i, at) in enumerate(alive) if at < len(docs[i].tokens) - 1]
            if len(rows) < len(alive):
                cache.keep(torch.tensor(rows, dtype=torch.long))
                alive = [alive[r] for r in rows]
            if not alive:
                return
            tokens = torch.tensor([int(docs[i].tokens[at]) for i, at in alive])
            positions = torch.tensor(np.stack([docs[i].positions[at] for i, at in alive]))
            logits = model.step(tokens, positions, cache)
            alive = [(i, at + 1) for i, at in alive]

    return run


@pytest.fixture(scope="session")
def assert_decoding_is_parallel(decode_from):
    """Asserts that every step's logits are those of the whole document's forward."""

    def check(model, docs, cuts):
        with torch.no_grad():
            parallel = [model(pack([doc])).logits_MV for doc in docs]
        steps = 0
        for i, position, logits in decode_from(model, docs, cuts):
            torch.testing.assert_close(logits, parallel[i][position], rtol=1e-8, atol=1e-8)
            steps += 1
        assert steps == sum(len(d.tokens) - n for d, n in zip(docs, cuts, strict=True))

    return check
