"""DeepEmbed in the network: what it computes, that it starts as nothing, that decoding agrees."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import fill, pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_demos, encode_pair
from tiny_onn.config.schema import Config, DeepEmbedConfig, ModelConfig, MoeConfig, NsaConfig
from tiny_onn.errors import UserError
from tiny_onn.losses.language import output_nll
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.deep_embed import InputMix, factor, fold, scale
from tiny_onn.model.ffn import SwiGLU
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.datamodule import prepare

SHAPES = [((1, 1), (1, 1)), ((3, 2), (2, 5)), ((4, 4), (4, 4)), ((2, 7), (6, 1))]
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


def documents(seed=0, demos=False):
    rng = np.random.default_rng(seed)
    pairs = [
        Pair(*(rng.integers(0, 10, shape).astype(np.uint8) for shape in shapes))
        for shapes in SHAPES
    ]
    docs = [encode_pair(pair, task=i, view=i % 8) for i, pair in enumerate(pairs)]
    return [*docs, encode_demos(pairs[1:3], pairs[0], task=4)] if demos else docs


def prompt_of(doc):
    n = doc.prefix_len
    return replace(doc, tokens=doc.tokens[:n], positions=doc.positions[:n])


def with_files(model, folder, seed=1):
    """Tables on disk filled with random rows."""
    model.deep_embed.create_files(folder)
    for store in model.deep_embed.files.values():
        rows = torch.randn(store.shape, generator=torch.manual_seed(seed)) * 0.3
        store.file.write(torch.arange(store.shape[0]), rows.to(store.dtype))
    return model


# Oracle 1: the identity.


@pytest.mark.parametrize(
    ("form", "parts"), [("1x", {}), ("4x", {}), ("v7a", {}), ("1x", SPARSE)], ids=str
)
@pytest.mark.parametrize("store", ["dense", "memmap"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_new_model_is_the_one_without_bit_for_bit(form, parts, store, precision):
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


def test_with_experts_the_delta_scales_their_output():
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
def test_a_folded_table_gives_the_logits_of_its_codes_and_basis(form):
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


# Oracles 6, 7: on disk as in memory.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_tables_on_disk_give_the_logits_and_gradients_of_tables_in_memory(tmp_path, dtype, rank):
    deep = {"store": "memmap", "dtype": dtype, "rank": rank}
    filed = with_files(tiny_model(deep=deep), tmp_path)
    dense = tiny_model(deep={"rank": rank})
    dense.load_state_dict(filed.state_dict(), strict=False)
    for name, store in filed.deep_embed.files.items():
        rows = store.file.read(torch.arange(store.shape[0]))
        with torch.no_grad():
            dense.deep_embed.tables[name].rows.weight.copy_(rows)
    batch = pack(documents())
    found = []
    for prefetch in (True, False):
        for store in filed.deep_embed.files.values():
            store.prefetch = prefetch
        found.append(filed(batch).logits_MV)
    found.append(dense(batch).logits_MV)
    assert torch.equal(found[0], found[1])  # prefetch changes nothing
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=1e-12)
    for logits in found[1:]:
        logits.logsumexp(-1).sum().backward()
    for name, store in filed.deep_embed.files.items():
        pending = [p for p in store.take_pending() if p.leaf.grad is not None]
        assert len(pending) == 1
        gradient = dense.deep_embed.tables[name].rows.weight.grad
        torch.testing.assert_close(
            pending[0].leaf.grad, gradient[pending[0].ids_U], rtol=1e-9, atol=1e-9
        )
        gradient[pending[0].ids_U] = 0
        assert not gradient.any()


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
def test_no_logit_sees_a_later_output_token(mask, patch, parts):
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
def test_step_logits_equal_the_parallel_forward(keys, deep, changes):
    check_steps(tiny_model(keys, deep, **changes))


def test_step_logits_equal_the_parallel_forward_from_disk(tmp_path):
    check_steps(with_files(tiny_model(deep={"store": "memmap"}), tmp_path))


def check_steps(model):
    docs = documents(demos=True)
    with torch.no_grad():
        parallel = [model(pack([doc])).logits_MV for doc in docs]
    batch = pack([prompt_of(doc) for doc in docs])
    order = list(batch.order)
    logits, cache = model.prefill(batch, max_new_tokens=64)
    cursor = [docs[i].prefix_len for i in order]
    alive = list(range(len(order)))
    while alive:
        for row, slot in enumerate(alive):
            want = parallel[order[slot]][cursor[slot] - 1]
            torch.testing.assert_close(logits[row], want, rtol=1e-9, atol=1e-9)
        keep = [r for r, s in enumerate(alive) if cursor[s] < len(docs[order[s]].tokens) - 1]
        cache.keep(torch.tensor(keep, dtype=torch.long))
        alive = [alive[r] for r in keep]
        if not alive:
            break
        tokens = torch.tensor([int(docs[order[s]].tokens[cursor[s]]) for s in alive])
        positions = torch.tensor(np.stack([docs[order[s]].positions[cursor[s]] for s in alive]))
        logits = model.step(tokens, positions, cache)
        for s in alive:
            cursor[s] += 1


@pytest.mark.parametrize(("form", "parts"), [("4x", {}), ("1x", SPARSE)], ids=str)
def test_packed_equals_one_document_at_a_time(form, parts):
    deep = {"patch": "prefix", "form": form}
    model, docs = tiny_model(deep=deep, **parts), documents(demos=True)
    batch = pack(docs)
    together, start = model(batch).logits_MV, 0
    for slot, i in enumerate(batch.order):
        alone, length = model(pack([docs[i]])).logits_MV, batch.layout.lengths[slot]
        torch.testing.assert_close(together[start : start + length], alone, rtol=1e-9, atol=1e-9)
        start += length


def test_filler_rows_change_no_logit_and_no_gradient():
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
def test_every_part_gets_a_gradient(form):
    model = tiny_model(deep={"form": form, "rank": 2})
    model(pack(documents())).logits_MV.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("form", ["1x", "4x"])
def test_keys_add_up(form):
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
def test_an_unknown_task_gives_the_task_free_model_bit_for_bit(form):
    model = tiny_model(("token", "task"), {"form": form})
    free = tiny_model(("token",), {"form": form})
    free.load_state_dict({k: v for k, v in model.state_dict().items() if ".task." not in k
                          or k.startswith("embedding")})  # fmt: skip
    docs = [replace(doc, task=-1) for doc in documents()]
    assert torch.equal(model(pack(docs)).logits_MV, free(pack(docs)).logits_MV)
    known = pack(documents())
    assert not torch.allclose(model(known).logits_MV, free(known).logits_MV)


def test_only_the_batch_s_tasks_get_a_gradient():
    model = tiny_model(("task",))
    docs = [replace(d, task=t) for d, t in zip(documents(), [-1, 2, -1, 2], strict=True)]
    model(pack(docs)).logits_MV.logsumexp(-1).sum().backward()
    gradient = model.deep_embed.tables["task"].rows.weight.grad
    assert gradient.abs().sum(dim=(1, 2)).gt(0).tolist() == [False, False, True, False, False]


# Checkpoints.


@pytest.mark.parametrize("deep", [{}, {"store": "memmap"}, {"store": "memmap", "dtype": "bf16"}])
def test_a_checkpoint_gives_back_every_table(tmp_path, deep):
    (tmp_path / "work").mkdir()
    config = replace(Config(), out="runs/x", model=tiny_config(deep=deep))
    torch.manual_seed(0)
    model = with_files(build_model(config.model, 5), tmp_path / "work").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(tmp_path / "run", model, config, tuple("abcde"), {})
    loaded = load_model(tmp_path / "run").model
    assert {n: s.file.path.parent for n, s in loaded.deep_embed.files.items()} == {
        name: tmp_path / "run" for name in model.deep_embed.files
    }
    batch = pack(documents())
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits_MV, model(batch).logits_MV)


def test_a_checkpoint_whose_table_is_gone_or_of_another_form_is_refused(tmp_path):
    config = replace(Config(), out="runs/x", model=tiny_config(("token",), {"store": "memmap"}))
    path = tmp_path / "run" / "deep_embed.token.safetensors"
    save_checkpoint(tmp_path / "run", build_model(config.model, 1), config, ("a",), {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="deep_embed.token.safetensors' is cut short"):
        load_model(tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match="deep_embed.token.safetensors' cannot be opened"):
        load_model(tmp_path / "run")
    other = replace(
        Config(), out="runs/x", model=tiny_config(("token",), {"store": "memmap", "form": "1x"})
    )
    save_checkpoint(tmp_path / "other", build_model(other.model, 1), other, ("a",), {})
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    with pytest.raises(UserError, match=r"\[14, 2, 32\]; expected F32 of shape \[14, 2, 48\]"):
        load_model(tmp_path / "run")


# Settings.

IMPOSSIBLE = [
    (("tokens",), {}, {}, r"model.deep_embed.keys=\[tokens\].*mend tokens"),
    (("token", "token"), {}, {}, "different ones of token, ngram, patch, task"),
    (("ngram",), {"ngram": 5}, {}, "model.deep_embed.ngram=5; expected a number from 2 to 4"),
    (("task",), {"store": "memmap"}, {}, "store=memmap with keys=.task.; expected token, ngram"),
    ((), {"store": "memmap"}, {}, "use store=dense"),
    (("patch",), {"patch": "prefix"}, {"mask": "causal"}, "patch=prefix with model.mask=causal"),
    (("token",), {"rank": 49}, {}, "rank=49; expected at most 48"),
    (("task",), {"form": "1x", "task_rank": 33}, {}, "task_rank=33; expected at most 32"),
    (("token",), {"rank": -1}, {}, "model.deep_embed.rank=-1; expected a number at least 0"),
]


@pytest.mark.parametrize(("keys", "deep", "changes", "message"), IMPOSSIBLE, ids=str)
def test_impossible_settings_are_one_line_that_names_them(keys, deep, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build_model(tiny_config(keys, deep, **changes), 1)
    assert "\n" not in str(caught.value)
