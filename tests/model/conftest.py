"""What tests of models share: documents, networks, steps held against one parallel forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_demos, encode_pair
from tiny_onn.config.schema import ModelConfig, NsaConfig
from tiny_onn.model.tiny_onn import build_model

SHAPES = (((1, 1), (1, 1)), ((3, 2), (2, 5)), ((4, 4), (4, 4)), ((2, 7), (6, 3)))
SMALL_NSA = NsaConfig(block=6, stride=3, select_block=3, select_count=4, window=7)


@pytest.fixture(scope="session")
def documents():
    """(shapes of inputs and outputs) -> a random pair of each, task and view its number; with
    ``demos`` also one of demonstrations and a query."""

    def build(shapes=SHAPES, seed=0, demos=False):
        rng = np.random.default_rng(seed)
        pairs = [Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in both)) for both in shapes]
        docs = [encode_pair(pair, task=i, view=i % 8) for i, pair in enumerate(pairs)]
        return [*docs, encode_demos(pairs[1:3], pairs[0], task=len(docs))] if demos else docs

    return build


@pytest.fixture(scope="session")
def small_nsa():
    """Blocks and a window that documents of 40 tokens outgrow."""
    return SMALL_NSA


@pytest.fixture(scope="session")
def nsa_model():
    """(changes of the model, of NSA) -> a network with NSA in float64, none of its weights zero."""

    def build(changes=None, nsa=None):
        torch.manual_seed(0)
        sizes = {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "ffn_width": 48}
        config = ModelConfig(**(sizes | {"attention": "nsa"} | (changes or {})))
        model = build_model(config, 5, nsa=replace(SMALL_NSA, **(nsa or {}))).double().eval()
        for parameter in model.parameters():  # what starts at zero must take part too
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build


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


@pytest.fixture
def dense_varlen():
    """A stand-in for flash-attn's function, bottom-right aligned when causal."""

    def call(q, k, v, cu_q, cu_k, max_q, max_k, causal, window=None):
        pieces = []
        for d in range(len(cu_q) - 1):
            qd, kd, vd = (t[cu[d] : cu[d + 1]] for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
            assert len(qd) <= max_q and len(kd) <= max_k
            kd, vd = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (kd, vd))
            scores = torch.einsum("ihd,jhd->hij", qd, kd) * q.shape[-1] ** -0.5
            last = torch.arange(len(qd))[:, None] + len(kd) - len(qd)
            key = torch.arange(len(kd))[None]
            if causal:
                scores = scores.masked_fill(key > last, float("-inf"))
            if window is not None:
                scores = scores.masked_fill(key <= last - window, float("-inf"))
            pieces.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vd))
        return torch.cat(pieces)

    return call


@pytest.fixture(scope="session")
def packable():
    """Networks of 2:4 weights to pack: KINDS by name, build, save and logits of them."""
    from types import SimpleNamespace

    from tiny_onn.config.schema import Config, ModelConfig, MoeConfig
    from tiny_onn.config.schema_24 import K24Config
    from tiny_onn.model.checkpoint import save_checkpoint
    from tiny_onn.model.tiny_onn import build_model
    from tiny_onn.sparse.masked_linear import MaskedLinear

    MODEL = ModelConfig(
        width=32, layers=2, heads=2, kv_heads=2, head_width=16, ffn_width=48, weights="k24"
    )
    MOE = MoeConfig(experts=3, expert_width=8, target_active=1.5)
    EXPERTS = replace(MODEL, ffn="dynmoe")
    SHARED = replace(MOE, expert_weights="shared_k24")
    KINDS = {
        "dense": (MODEL, MOE, K24Config()),
        "odd": (replace(MODEL, width=36, ffn_width=12), MOE, K24Config()),
        "relu2": (replace(MODEL, ffn="relu2"), MOE, K24Config(alpha_rank=2)),
        "free": (MODEL, MOE, K24Config(logits="free", alpha_init_std=1.0)),
        "s_ste": (replace(MODEL, weights="s_ste"), MOE, K24Config()),
        "random24": (replace(MODEL, weights="random24", ffn="relu2"), MOE, K24Config()),
        "separate": (EXPERTS, MOE, K24Config()),
        "shared": (EXPERTS, SHARED, K24Config()),
        "both": (EXPERTS, replace(SHARED, every=2), K24Config()),
    }

    def build(kind="dense", seed=0, **changes):
        """A network as if it were trained: masks that the inputs' sizes have a say in."""
        config, moe, k24 = KINDS[kind]
        torch.manual_seed(seed)
        model = build_model(replace(config, **changes), 3, moe, k24=k24)
        torch.nn.init.normal_(model.head.weight, std=0.1)
        for pattern, _ in model.masked_weights:
            pattern.activity.total_AI.uniform_()
            pattern.activity.weight_A.fill_(1)
        return model.eval()

    @torch.no_grad()
    def logits(model, batch):
        return model(batch).logits_MV

    def save(model, folder, kind="dense"):
        config, moe, k24 = KINDS[kind]
        whole = Config(out="runs/x", model=config, moe=moe, k24=k24)
        save_checkpoint(folder, model, whole, ("a", "b", "c"), {})

    def masked(model):
        """The masked weights, by the names that they have in a dense network."""
        names = {id(p): name for name, p in model.named_parameters()}
        layers = [m for m in model.modules() if isinstance(m, MaskedLinear)]
        with torch.no_grad():
            found = {names[id(w)]: (w, p(w)[0]) for p, w in model.masked_weights}
            found |= {names[id(m.weight)]: (m.weight, m.sparse_weight()[None]) for m in layers}
        return {n: m[0] if n.endswith(".weight") else m for n, (_, m) in found.items()}

    return SimpleNamespace(KINDS=KINDS, build=build, save=save, logits=logits, masked=masked)


@pytest.fixture(scope="session")
def packed_batch(documents):
    """Three of them in one batch."""
    from tiny_onn.arc.packing import pack

    return pack(documents()[:3])
