"""DeepEmbed in the network: what it computes, that it starts as nothing, that decoding agrees."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tiny_onn.arc.packing import fill, pack
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, MoeConfig, NsaConfig
from tiny_onn.losses.language import output_nll
from tiny_onn.model.deep_embed import InputMix, factor, fold, scale
from tiny_onn.model.ffn import SwiGLU
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.datamodule import prepare

SMALL = {"ngram": 2, "task_rank": 3, "mix_rank": 4}
EVERY = ("token", "ngram", "patch", "task")
MOE = MoeConfig(experts=4, expert_width=16, target_active=1.5)
NSA = NsaConfig(block=4, stride=2, select_block=4, select_count=3, window=5)
SPARSE = {"attention": "nsa", "ffn": "dynmoe"}


def tiny_config(keys=EVERY, deep=None, **model):
    return ModelConfig(
        **{"width": 32, "layers": 2, "heads": 4, "head_width": 8, "ffn_width": 48} | model,
        deep_embed=DeepEmbedConfig(keys=list(keys), **SMALL | (deep or {})),
    )


def wake(model):
    """No zero weights left, in float64."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def tiny_model(keys=EVERY, deep=None, **model):
    torch.manual_seed(0)
    return wake(build_model(tiny_config(keys, deep, **model), 5, MOE, NSA))


# Oracle 1: the identity.


@pytest.mark.parametrize(
    ("form", "parts"), [("1x", {}), ("4x", {}), ("v7a", {}), ("1x", SPARSE)], ids=str
)
@pytest.mark.parametrize("store", ["dense", "memmap"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_new_model_is_the_one_without_bit_for_bit(documents, form, parts, store, precision):
    torch.manual_seed(0)
    plain = build_model(tiny_config([], **parts), 5, MOE, NSA)
    torch.manual_seed(0)
    deep = build_model(tiny_config(deep={"form": form, "store": store}, **parts), 5, MOE, NSA)
    if form == "v7a":  # whose mixes are drawn between the blocks' weights
        deep.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(plain.head.weight)
    deep.head.load_state_dict(plain.head.state_dict())
    batch = pack(documents())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        assert torch.equal(deep(batch).logits_MV, plain(batch).logits_MV)


# Oracle 2 and the forms' own equations, by loops.


def loop_ffn(ffn, x_C, scale_F):
    """silu(x W_gate) * (x W_up) * scale, then W_down, of one token."""
    gate_F, up_F = (ffn.gate_up.weight @ x_C).chunk(2)
    hidden = [g * torch.sigmoid(g) * u * s for g, u, s in zip(gate_F, up_F, scale_F, strict=True)]
    return ffn.down.weight @ torch.stack(hidden)


def test_4x_and_1x_outputs_and_gradients_are_those_of_a_loop_over_tokens():
    torch.manual_seed(0)
    ffn = SwiGLU(5, 7).double()
    x_NC = torch.randn(6, 5, dtype=torch.float64)
    ids = [2, 0, 2, 2, 1, 0]
    weights_NC = torch.randn(6, 5, dtype=torch.float64)
    for form, width in (("4x", 7), ("1x", 5)):
        found = []
        for looped in (False, True):
            table = torch.randn(3, width, dtype=torch.float64, generator=torch.manual_seed(1))
            table.requires_grad_()
            ffn.zero_grad()
            if looped and form == "4x":
                outputs = [loop_ffn(ffn, x, 1 + table[i]) for x, i in zip(x_NC, ids, strict=True)]
            elif looped:
                ones = torch.ones(7, dtype=torch.float64)
                outputs = [
                    loop_ffn(ffn, x, ones) * (1 + table[i]) for x, i in zip(x_NC, ids, strict=True)
                ]
            elif form == "4x":
                outputs = ffn(x_NC, table[ids])
            else:
                outputs = scale(ffn(x_NC), table[ids])
            out_NC = torch.stack(list(outputs))
            (out_NC * weights_NC).sum().backward()
            found.append((out_NC, table.grad, ffn.gate_up.weight.grad.clone()))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_with_experts_the_delta_scales_their_output(documents):
    model = tiny_model(("token",), {"form": "1x"}, layers=1, **SPARSE)
    batch, block = pack(documents()), model.blocks[0]
    seen = {}
    block.ffn.register_forward_hook(lambda module, given, output: seen.update(update=output))
    model.norm.register_forward_pre_hook(lambda module, given: seen.update(out=given[0]))
    scaled = model(batch).logits_MV, seen["out"], seen["update"]
    rows_RX = model.deep_embed.tables["token"].rows.weight[:, 0].detach().clone()
    with torch.no_grad():
        model.deep_embed.tables["token"].rows.weight.zero_()
    model(batch)
    assert torch.equal(scaled[2], seen["update"]) and scaled[2].any()
    delta_NX = rows_RX[batch.tokens_N]
    torch.testing.assert_close(scaled[1] - seen["out"], seen["update"] * delta_NX)


def test_4x_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    ffn = SwiGLU(3, 4).double()
    x_NC = torch.randn(5, 3, dtype=torch.float64)
    table = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 2, 0])  # row 1 is never taken
    assert torch.autograd.gradcheck(lambda t: ffn(x_NC, t[index]), (table,))


# Oracle 3: v7a.


def test_v7a_follows_its_equation_and_is_plain_while_b_is_zero_and_one():
    torch.manual_seed(0)
    mix, ffn = InputMix(5, 3, 7).double(), SwiGLU(5, 7).double()
    x_NC = torch.randn(4, 5, dtype=torch.float64)
    rows_NX = torch.randn(4, 9, dtype=torch.float64)
    assert torch.equal(ffn(x_NC, mix(x_NC, rows_NX)), ffn(x_NC))
    torch.nn.init.normal_(mix.up.weight)
    torch.nn.init.normal_(mix.up.bias)
    s1, s2, s0 = mix.down.weight.T, mix.up.weight.T, 1 + mix.up.bias
    for x_C, row_X, delta_F in zip(x_NC, rows_NX, mix(x_NC, rows_NX), strict=True):
        matrix = torch.eye(3, dtype=torch.float64) + row_X.view(3, 3)
        torch.testing.assert_close(1 + delta_F, (x_C @ s1) @ matrix @ s2 + s0)


# Oracles 4 and 5: low rank.


@pytest.mark.parametrize("form", ["1x", "4x", "v7a"])
def test_a_folded_table_gives_the_logits_of_its_codes_and_basis(documents, form):
    keys = ("token", "ngram", "patch")
    low = tiny_model(keys, {"form": form, "rank": 2})
    full = tiny_model(keys, {"form": form})
    full.load_state_dict(
        {k: v for k, v in low.state_dict().items() if not k.startswith("deep_embed")}, strict=False
    )
    for name, table in low.deep_embed.tables.items():
        rows = fold(table.rows.weight.detach(), table.basis.detach())
        with torch.no_grad():
            full.deep_embed.tables[name].rows.weight.copy_(rows)
    batch = pack(documents())
    torch.testing.assert_close(full(batch).logits_MV, low(batch).logits_MV, rtol=1e-9, atol=1e-9)


def test_factoring_at_the_rank_of_the_rows_gives_them_back():
    torch.manual_seed(0)
    rows = fold(
        torch.randn(9, 2, 3, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    )
    for rank in (3, 5):
        torch.testing.assert_close(fold(*factor(rows, rank)), rows)
    best = fold(*factor(rows, 2))
    for layer in range(2):
        spectrum = torch.linalg.svdvals(rows[:, layer])
        torch.testing.assert_close((best - rows)[:, layer].norm(), spectrum[2])
    with pytest.raises(ValueError, match="got rank=7; expected 1 to 6"):
        factor(rows, 7)


# Oracle 9 in the network: nothing leaks through the keys.


@pytest.mark.parametrize(
    ("mask", "patch", "parts"),
    [
        ("causal", "causal", {}),
        ("prefix", "causal", {}),
        ("prefix", "prefix", {}),
        ("prefix", "prefix", SPARSE),
    ],
    ids=str,
)
def test_no_logit_sees_a_later_output_token(documents, mask, patch, parts):
    model = tiny_model(mask=mask, deep={"patch": patch, "form": "1x" if parts else "4x"}, **parts)
    for doc in documents(demos=True):
        before = model(pack([doc])).logits_MV
        for late in range(1, len(doc.tokens) - 1, 2):
            if doc.tokens[late] >= 10 or (mask == "prefix" and late < doc.prefix_len):
                continue
            tokens = doc.tokens.copy()
            tokens[late] = (tokens[late] + 1) % 10
            after = model(pack([replace(doc, tokens=tokens)])).logits_MV
            changed = (before - after).abs().amax(1) > 1e-12
            assert not changed[:late].any() and changed[late]


# Oracle 10: decoding.

VARIANTS = [
    (keys, {"form": form}, {})
    for keys, form in product([("token",), ("ngram",), ("patch",), ("task",), EVERY], ["1x", "4x"])
] + [
    (EVERY, {"form": "v7a"}, {}),
    (EVERY, {"patch": "prefix"}, {"loops": 2}),
    (EVERY, {"rank": 2, "ngram": 4}, {"mask": "causal", "task_modulation": "film"}),
    (EVERY, {"form": "1x"}, SPARSE),
    (("token", "task"), {"form": "1x"}, SPARSE | {"loops": 2}),
]


@pytest.mark.parametrize(("keys", "deep", "changes"), VARIANTS, ids=str)
def test_step_logits_equal_the_parallel_forward(
    documents, assert_decoding_is_parallel, keys, deep, changes
):
    docs = documents(demos=True)
    model = tiny_model(keys, deep, **changes)
    assert_decoding_is_parallel(model, docs, [d.prefix_len for d in docs])


@pytest.mark.parametrize(("form", "parts"), [("4x", {}), ("1x", SPARSE)], ids=str)
def test_packed_equals_one_document_at_a_time(documents, form, parts):
    deep = {"patch": "prefix", "form": form}
    model, docs = tiny_model(deep=deep, **parts), documents(demos=True)
    batch = pack(docs)
    together, start = model(batch).logits_MV, 0
    for slot, i in enumerate(batch.order):
        alone, length = model(pack([docs[i]])).logits_MV, batch.layout.lengths[slot]
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-9, atol=1e-9)
        start += length


def test_filler_rows_change_no_logit_and_no_gradient(documents):
    plain, found = pack(documents()), []
    for batch in (plain, fill(plain, 64)):
        model = tiny_model()
        train = prepare(batch, step=0, multiple=1 if batch is plain else 64)
        logits = model(train.batch, train.rows_M).logits_MV
        output_nll(logits, train.targets_M)[0].backward()
        found.append((logits[: train.num_targets], *(p.grad for p in model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["1x", "4x", "v7a"])
def test_every_part_gets_a_gradient(documents, form):
    model = tiny_model(deep={"form": form, "rank": 2})
    model(pack(documents())).logits_MV.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("form", ["1x", "4x"])
def test_keys_add_up(documents, form):
    both = tiny_model(("token", "patch"), {"form": form})
    tokens_N = torch.arange(4)
    deltas = {}
    for keys in (("token", "patch"), ("token",), ("patch",)):
        model = tiny_model(keys, {"form": form})
        model.load_state_dict(
            {k: v for k, v in both.state_dict().items() if k in model.state_dict()}
        )
        batch = pack(documents())
        delta_of = model._deltas(batch, None)[1]
        deltas[keys] = delta_of(None)
        torch.testing.assert_close(delta_of(tokens_N), deltas[keys][tokens_N])
    torch.testing.assert_close(
        deltas["token", "patch"], deltas[("token",)] + deltas[("patch",)], rtol=1e-12, atol=1e-12
    )


# Oracle 14: the task.


@pytest.mark.parametrize("form", ["1x", "4x", "v7a"])
def test_an_unknown_task_gives_the_task_free_model_bit_for_bit(documents, form):
    model = tiny_model(("token", "task"), {"form": form})
    free = tiny_model(("token",), {"form": form})
    free.load_state_dict({k: v for k, v in model.state_dict().items() if ".task." not in k
                          or k.startswith("embedding")})  # fmt: skip
    docs = [replace(doc, task=-1) for doc in documents()]
    assert torch.equal(model(pack(docs)).logits_MV, free(pack(docs)).logits_MV)
    known = pack(documents())
    assert not torch.allclose(model(known).logits_MV, free(known).logits_MV)


def test_only_the_batch_s_tasks_get_a_gradient(documents):
    model = tiny_model(("task",))
    docs = [replace(d, task=t) for d, t in zip(documents(), [-1, 2, -1, 2], strict=True)]
    model(pack(docs)).logits_MV.logsumexp(-1).sum().backward()
    gradient = model.deep_embed.tables["task"].rows.weight.grad
    assert gradient.abs().sum(dim=(1, 2)).gt(0).tolist() == [False, False, True, False, False]
