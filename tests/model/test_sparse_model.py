"""NSA, DynMoE and DeepEmbed in one network: the future, other documents and the cache."""

from dataclasses import replace

import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.config.schema import Config, DeepEmbedConfig, ModelConfig, MoeConfig, NsaConfig
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model

NSA = NsaConfig(block=6, stride=3, select_block=3, select_count=4, window=7)
MOE = MoeConfig(experts=5, expert_width=8)
MODEL = ModelConfig(
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    ffn_width=48,
    attention="nsa",
    ffn="dynmoe",
    deep_embed=DeepEmbedConfig(keys=["task", "token"], form="1x", task_rank=3),
)
THRESHOLDS = (0.4, 0.2, 0.05, 0.0, -0.05)
"""So that tokens of the small models below have from none to four active experts."""

VARIANTS = [
    ({}, {}, {}),
    ({"mask": "causal"}, {}, {}),
    ({"kv_heads": 1, "loops": 2}, {"kv": "per_branch"}, {"none_active": "top1"}),
    ({"mask": "causal", "task_modulation": "film"}, {"window": 1}, {"combine": "gated"}),
    ({"layers": 3, "qk_norm": False}, {"select_count": 40, "window": 9}, {"every": 2}),
    ({"layers": 3, "loops": 2}, {"every": 2}, {}),
    ({"mask": "causal", "layers": 2}, {"every": 2, "kv": "per_branch"}, {}),
]


def tiny_model(model=None, nsa=None, moe=None):
    torch.manual_seed(0)
    built = build_model(
        replace(MODEL, **(model or {})), 6, replace(MOE, **(moe or {})), replace(NSA, **(nsa or {}))
    )
    for parameter in built.parameters():  # what starts at zero must take part too
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in built.expert_layers:
        layer.gate.thresholds.data.copy_(torch.tensor(THRESHOLDS))
    return built.double().eval()


@pytest.fixture
def docs(documents):
    """Pairs of 5 to 150 tokens, and demonstrations with a query."""
    shapes = [((1, 1), (1, 1)), ((3, 2), (2, 5)), ((4, 4), (4, 4)), ((2, 7), (6, 3))]
    return documents([*shapes, ((8, 8), (8, 8))], demos=True)


def logits_of(model, docs):
    """Logits of each document of a packed batch, in the order of ``docs``."""
    batch = pack(docs)
    parts = model(batch).logits_MV.split(batch.layout.lengths)
    return [parts[batch.order.index(i)] for i in range(len(docs))]


def with_token(doc, position, token):
    tokens = doc.tokens.copy()
    tokens[position] = token
    return replace(doc, tokens=tokens)


def test_the_small_models_choose_blocks_and_run_from_no_expert_to_several(docs):
    model, chosen = tiny_model(), []
    model.blocks[0].attention.watch = lambda _, index_NKn: chosen.append(index_NKn)
    output = model(pack(docs))
    counts = {int(n) for entry in output.routing for n in entry.runs_NE.sum(1)}
    assert {0, 1, 2, 3} <= counts
    assert chosen[0].max() >= 10  # of documents that four blocks of three do not cover
    assert all(delta.abs().min() > 0 for delta in model.deep_embed.parameters())


@pytest.mark.parametrize(("model", "nsa", "moe"), VARIANTS, ids=str)
def test_decoding_equals_the_parallel_forward(docs, model, nsa, moe, assert_decoding_is_parallel):
    prompts = [doc.prefix_len for doc in docs]
    assert_decoding_is_parallel(tiny_model(model, nsa, moe), docs, prompts)


@pytest.mark.parametrize("first", [1, 5, 6, 12, 13])
def test_prompts_may_end_anywhere(docs, first, assert_decoding_is_parallel):
    docs = docs[3:]
    cuts = [first, first + 60, first + 20]
    assert_decoding_is_parallel(tiny_model({"mask": "causal"}), docs, cuts)


@pytest.mark.parametrize(("model", "nsa", "moe"), VARIANTS, ids=str)
def test_packed_equals_one_document_at_a_time_with_gradients(docs, model, nsa, moe):
    model = tiny_model(model, nsa, moe)
    parameters = list(model.parameters())
    together = logits_of(model, docs)
    grads = torch.autograd.grad(sum(part.square().sum() for part in together), parameters)
    want = [torch.zeros_like(p) for p in parameters]
    for doc, part in zip(docs, together, strict=True):
        (alone,) = logits_of(model, [doc])
        torch.testing.assert_close(part, alone, rtol=1e-8, atol=1e-8)
        for total, grad in zip(
            want, torch.autograd.grad(alone.square().sum(), parameters), strict=True
        ):
            total += grad
    for grad, total in zip(grads, want, strict=True):
        torch.testing.assert_close(grad, total, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("model", "nsa", "moe"), VARIANTS, ids=str)
def test_a_changed_token_moves_nothing_before_it_and_no_other_document(docs, model, nsa, moe):
    model = tiny_model(model, nsa, moe)
    with torch.no_grad():
        before = logits_of(model, docs)
        for changed in (3, 4, 5):
            doc = docs[changed]
            first = 1 if model.config.mask == "causal" else doc.prefix_len
            last = len(before[changed]) - 1
            for position in {first, first + 1, min(first + 7, last), last}:
                other = with_token(doc, position, (int(doc.tokens[position]) + 1) % 10)
                after = logits_of(model, [*docs[:changed], other, *docs[changed + 1 :]])
                for i, (a, b) in enumerate(zip(after, before, strict=True)):
                    same = position if i == changed else len(b)
                    torch.testing.assert_close(a[:same], b[:same], rtol=1e-9, atol=1e-9)
                assert (after[changed][position] - before[changed][position]).abs().max() > 1e-3


def test_in_a_prefix_every_token_may_move_every_logit_of_its_document_only(docs):
    model = tiny_model()
    doc = docs[4]
    with torch.no_grad():
        before = logits_of(model, docs)
        other = with_token(doc, doc.prefix_len - 2, (int(doc.tokens[doc.prefix_len - 2]) + 1) % 10)
        after = logits_of(model, [*docs[:4], other, docs[5]])
    assert ((after[4] - before[4]).abs().amax(1)[: doc.prefix_len] > 0).all()
    for i in (0, 1, 2, 3, 5):
        torch.testing.assert_close(after[i], before[i], rtol=1e-9, atol=1e-9)


def test_a_checkpoint_brings_all_three_back(docs, tmp_path):
    config = Config(out="x", model=MODEL, moe=MOE, nsa=NSA)
    model = tiny_model().float()
    save_checkpoint(tmp_path / "c", model, config, tuple("abcdef"), {})
    loaded = load_model(tmp_path / "c").model
    batch = pack(docs)
    assert torch.equal(loaded(batch).logits_MV, model(batch).logits_MV)
