"""The assembled network: decoding equals the parallel forward, packing equals one by one."""

from dataclasses import replace

import pytest
import torch

from tiny_onn.arc.packing import fill, pack
from tiny_onn.arc.tokens import IGNORE
from tiny_onn.config.schema import ModelConfig
from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.losses import language
from tiny_onn.losses.language import output_nll
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.datamodule import prepare


def tiny_model(**changes):
    torch.manual_seed(0)
    config = ModelConfig(width=32, layers=2, heads=4, head_width=8, ffn_width=48, **changes)
    model = build_model(config, num_tasks=5).double().eval()
    for parameter in model.parameters():  # zero-initialised parts must take part too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


VARIANTS = [
    {},
    {"mask": "causal"},
    {"kv_heads": 2},
    {"loops": 2},
    {"task_modulation": "film"},
    {"qk_norm": False},
    {"ffn": "dynmoe", "loops": 2},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_step_logits_equal_the_parallel_forward(documents, changes, assert_decoding_is_parallel):
    docs = documents()
    assert_decoding_is_parallel(tiny_model(**changes), docs, [d.prefix_len for d in docs])


def prompt_of(doc):
    n = doc.prefix_len
    return replace(doc, tokens=doc.tokens[:n], positions=doc.positions[:n])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_packed_equals_one_document_at_a_time(documents, changes):
    model = tiny_model(**changes)
    docs = documents()
    batch = pack(docs)
    together = model(batch).logits_MV
    start = 0
    for slot, i in enumerate(batch.order):
        alone = model(pack([docs[i]])).logits_MV
        length = batch.layout.lengths[slot]
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-9, atol=1e-9)
        start += length


def test_reference_and_sdpa_backends_agree_in_loss_gradients(documents):
    batch = pack(documents())
    gradients = []
    for backend in ("reference", "sdpa"):
        model = tiny_model().use_backend(backend, "cpu")
        model(batch).logits_MV.logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_filler_rows_change_no_logit_and_no_gradient(documents, changes, backend):
    plain = pack(documents())
    found = []
    for batch in (plain, fill(plain, 64)):
        model = tiny_model(**changes).use_backend(backend, "cpu")
        train = prepare(batch, step=0, multiple=1 if batch is plain else 64)
        logits = model(train.batch, train.rows_M).logits_MV
        loss, correct = output_nll(logits, train.targets_M)
        loss.backward()
        found.append(
            (loss, correct, logits[: train.num_targets], *(p.grad for p in model.parameters()))
        )
    assert len(fill(plain, 64).tokens_N) > len(plain.tokens_N)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_losses_and_tokens_agree_on_what_has_no_target():
    assert language.IGNORE == IGNORE


def test_rows_pick_the_same_logits_with_less_work(documents):
    model, batch = tiny_model(), pack(documents())
    rows = torch.tensor([0, 5, 9, 30])
    torch.testing.assert_close(model(batch, rows).logits_MV, model(batch).logits_MV[rows])


@pytest.mark.parametrize("modulation", ["none", "film"])
def test_an_unknown_task_is_the_zero_vector(documents, modulation):
    model = tiny_model(task_modulation=modulation)
    doc = documents()[1]
    unknown = model(pack([encode_like(doc, task=-1)])).logits_MV
    with torch.no_grad():
        model.embedding.task.weight.zero_()
    torch.testing.assert_close(unknown, model(pack([doc])).logits_MV)


def encode_like(doc, **changes):
    return replace(doc, **changes)


def test_an_unknown_task_row_gets_no_gradient(documents):
    model = tiny_model()
    docs = [encode_like(d, task=t) for d, t in zip(documents(), [-1, 2, -1, 2], strict=True)]
    model(pack(docs)).logits_MV.logsumexp(-1).sum().backward()
    touched = model.embedding.task.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False, False]


def test_output_tokens_do_not_see_the_future_and_the_input_does(documents):
    model = tiny_model()
    doc = documents()[2]
    before = model(pack([doc])).logits_MV
    tokens = doc.tokens.copy()
    late = doc.prefix_len + 4
    tokens[late] = (tokens[late] + 1) % 10
    after = model(pack([encode_like(doc, tokens=tokens)])).logits_MV
    changed = (before - after).abs().amax(1) > 1e-12
    assert not changed[:late].any() and changed[late:].any()
    tokens = doc.tokens.copy()
    tokens[doc.prefix_len - 3] = (tokens[doc.prefix_len - 3] + 1) % 10
    after = model(pack([encode_like(doc, tokens=tokens)])).logits_MV
    assert ((before - after).abs().amax(1) > 1e-12)[0]  # prefix-LM: even START sees the input


def test_a_full_cache_refuses_another_token(documents):
    model = tiny_model()
    batch = pack([prompt_of(documents()[0])])
    _, cache = model.prefill(batch, max_new_tokens=1)
    token, position = torch.tensor([3]), torch.tensor([[0, 0, 3]])
    model.step(token, position, cache)
    with pytest.raises(IndexError, match="max_new_tokens"):
        model.step(token, position, cache)


def test_backends_that_cannot_run_say_so():
    with pytest.raises(BackendUnavailable, match="needs a CUDA device.*ops.backend=auto"):
        tiny_model().use_backend("flash", "cpu")
    with pytest.raises(BackendUnavailable, match="half precision.*ops.backend=auto or sdpa"):
        tiny_model().use_backend("varlen", "cuda", "fp32")
    assert tiny_model().use_backend("auto", "cuda", "fp32").attention_backend == "sdpa"
    assert tiny_model().use_backend("auto", "cuda", "bf16").attention_backend != "sdpa"
    assert tiny_model().use_backend("auto", "cpu").attention_backend == "sdpa"


def test_impossible_widths_are_named():
    with pytest.raises(UserError, match="model.kv_heads=3 does not divide model.heads=4"):
        build_model(ModelConfig(heads=4, kv_heads=3), 1)
    with pytest.raises(UserError, match="model.head_width=7"):
        build_model(ModelConfig(head_width=7), 1)
