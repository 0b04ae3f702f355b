"""NSA in the network: decoding equals the parallel forward, dispatch, padding, settings (property
18 and 19 of NSA's list, and the module around the rest)."""

from dataclasses import replace

import pytest
import torch

from tiny_onn.arc.packing import fill, pack
from tiny_onn.config.load import load_config
from tiny_onn.config.schema import Config, ModelConfig, NsaConfig, OptimConfig
from tiny_onn.errors import UserError
from tiny_onn.losses.language import output_nll
from tiny_onn.model import tiny_onn
from tiny_onn.model.attention_plan import document_spans, plan_documents
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.nsa_plan import NsaPlan, Split, plan_nsa
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.datamodule import prepare
from tiny_onn.training.optim import build_optimizer
from tiny_onn_kernels.nsa import select

VARIANTS = [
    ({}, {}),
    ({"mask": "causal"}, {}),
    ({"kv_heads": 2}, {"kv": "per_branch"}),
    ({"kv_heads": 1, "loops": 2}, {"window": 1}),
    ({"qk_norm": False}, {"block": 4, "stride": 4, "select_block": 8, "select_count": 3}),
    ({}, {"window": 100}),
    ({"mask": "causal", "kv_heads": 2}, {"kv": "per_branch", "select_count": 40}),
]


@pytest.mark.parametrize(("changes", "nsa"), VARIANTS, ids=str)
def test_decoding_equals_the_parallel_forward(
    nsa_model, documents, changes, nsa, assert_decoding_is_parallel
):
    docs = documents()
    assert_decoding_is_parallel(nsa_model(changes, nsa), docs, [d.prefix_len for d in docs])


@pytest.mark.parametrize(("changes", "nsa"), VARIANTS, ids=str)
def test_packed_equals_one_document_at_a_time(nsa_model, documents, changes, nsa):
    model, docs = nsa_model(changes, nsa), documents()
    batch = pack(docs)
    together = model(batch).logits_MV
    start = 0
    for i, length in zip(batch.order, batch.layout.lengths, strict=True):
        alone = model(pack([docs[i]])).logits_MV
        torch.testing.assert_close(together[start : start + length], alone)
        start += length


def loss_and_gradients(model, batch):
    train = prepare(batch, step=0, multiple=1)
    loss, _ = output_nll(model(train.batch, train.rows_M).logits_MV, train.targets_M)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(("changes", "nsa"), VARIANTS[:4], ids=str)
def test_filler_rows_change_no_loss_and_no_gradient(nsa_model, documents, changes, nsa):
    plain = pack(documents())
    found = []
    for batch in (plain, fill(plain, 64)):
        model = nsa_model(changes, nsa)
        train = prepare(batch, step=0, multiple=1 if batch is plain else 64)
        loss, _ = output_nll(model(train.batch, train.rows_M).logits_MV, train.targets_M)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    assert len(fill(plain, 64).tokens_N) > len(plain.tokens_N)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def attention_inputs(model, batch, seed=0):
    """What the first block's attention takes: projected random states, and the context."""
    generator = torch.Generator().manual_seed(seed)
    cos, sin = model.rope(batch.positions_N3)
    x_NC = torch.randn(batch.num_tokens, 32, generator=generator, dtype=torch.float64)
    attention = model.blocks[0].attention
    context = tiny_onn.AttentionContext(cos, sin, attend=model.plan_attention(batch))
    return attention, attention.project(x_NC, cos, sin), context


def test_whatever_stands_in_padding_rows_is_never_read(nsa_model, documents):
    model, plain = nsa_model({"kv_heads": 2}, {"kv": "per_branch"}), pack(documents())
    attention, projected, context = attention_inputs(model, plain)
    want = attention.attend(*projected, context)
    padded = fill(plain, 64)
    rows = len(padded.tokens_N) - len(plain.tokens_N)
    poisoned = [
        torch.cat([t, t.new_full((rows, *t.shape[1:]), torch.nan)]).detach().requires_grad_()
        for t in projected
    ]
    context.attend = model.plan_attention(padded)
    got = attention.attend(*poisoned, context)
    torch.testing.assert_close(got[:-rows], want)
    assert (got[-rows:] == 0).all()
    got.square().sum().backward()
    for tensor in poisoned:
        assert tensor.grad.isfinite().all() and (tensor.grad[-rows:] == 0).all()


# Documents of 6, 23, 42 and 42 tokens: the settings stand just below, at and above some of them.
@pytest.mark.parametrize("mask", ["prefix", "causal"])
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize(
    "nsa",
    [
        {},
        {"select_count": 40, "window": 100},
        {"select_count": 8, "window": 22},
        {"select_count": 7, "window": 23},
        {"select_count": 14, "window": 41},
        {"select_count": 13, "window": 42},
    ],
    ids=str,
)
def test_dense_dispatch_changes_no_value_and_no_gradient(nsa_model, documents, mask, kv, nsa):
    settings = nsa | {"kv": kv}
    model, batch = nsa_model({"mask": mask, "kv_heads": 2}, settings), pack(documents())
    assert sorted(batch.layout.lengths) == [6, 23, 42, 42]
    found = []
    for dense in (True, False):
        attention, projected, context = attention_inputs(model, batch)
        if not dense:
            layout = context.attend.layout
            context.attend = NsaPlan(layout, 0, Split(layout), Split(layout), False)
        leaves = [t.detach().requires_grad_() for t in projected]
        out = attention.attend(*leaves, context)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("nsa", "planned_limits", "selected_above", "window_above"),
    [
        ({}, [12], 12, 7),  # what the window reads in full, n l' = 12 tokens cover too
        ({"kv": "per_branch"}, [12, 7], 12, 7),
        ({"window": 33}, [12, 33], 12, 33),
        ({"select_count": 99}, [99], None, 7),
        ({"select_count": 99, "window": 99}, [99], None, None),
    ],
    ids=str,
)
def test_a_branch_reads_the_documents_that_it_covers_in_full_and_only_those(
    small_nsa, nsa_model, documents, nsa, planned_limits, selected_above, window_above
):
    model, batch = nsa_model(), pack(documents())
    lengths = batch.layout.lengths
    planned = []

    def plan_full(spans):
        planned.append(spans.lengths)
        return plan_documents(spans, model.attention_backend)

    plan = plan_nsa(document_spans(batch.layout, "prefix"), replace(small_nsa, **nsa), plan_full)
    assert planned == [tuple(n for n in lengths if n <= limit) for limit in planned_limits]
    for split, limit in ((plan.selected, selected_above), (plan.window, window_above)):
        if limit is None:
            assert split.layout is None
        else:
            assert split.layout.lengths == tuple(n for n in lengths if n > limit)


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_separate_keys_and_values_feed_their_own_branch_only(nsa_model, documents, branch):
    model, batch = nsa_model({}, {"kv": "per_branch"}), pack(documents()[1:])
    attention, (q, raw, whole, values, gate), context = attention_inputs(model, batch)
    leaves = [t.detach().requires_grad_() for t in (raw, whole, values)]
    hot = torch.zeros_like(gate)
    hot[..., branch] = 1
    out = attention.attend(q, *leaves, hot, context)
    raw_grad, whole_grad, value_grad = torch.autograd.grad(out.square().sum(), leaves)
    keys = [raw_grad.abs().sum(), *whole_grad.abs().sum((0, 2, 3))]
    assert [bool(k > 0) for k in keys] == [branch == b for b in range(3)]
    assert (value_grad.abs().sum((0, 2, 3)) > 0).tolist() == [branch == b for b in range(3)]


def test_gates_start_at_one_half_and_phi_as_the_mean(small_nsa):
    model = build_model(ModelConfig(attention="nsa", width=32, layers=1), 1, nsa=small_nsa)
    attention = model.blocks[0].attention
    cos, sin = torch.ones(5, 1, 16), torch.zeros(5, 1, 16)
    assert (attention.project(torch.randn(5, 32), cos, sin)[4] == 0.5).all()
    blocks = torch.randn(3, 6, 4, 32)
    position = attention.compress_key.position.mean(0)
    torch.testing.assert_close(attention.compress_key(blocks), blocks.mean(1) + position)


def test_gates_and_choices_can_be_watched(nsa_model, documents):
    model, batch = nsa_model(), pack(documents())
    seen = []
    model.blocks[1].attention.watch = lambda gate, index: seen.append((gate, index))
    model(batch)
    ((gate, index),) = seen
    assert gate.shape == (batch.num_tokens, 4, 3) and index.shape == (batch.num_tokens, 4, 4)
    assert not gate.requires_grad


def test_every_parameter_learns_even_from_documents_shorter_than_a_block(nsa_model, documents):
    for docs, settings in ((documents(), {}), (documents()[:1], {"block": 30})):
        model = nsa_model({"kv_heads": 2}, settings).float()
        optimizer = build_optimizer(model, OptimConfig())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss_and_gradients(model, pack(docs))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        phi = [n for n in before if ".compress_" in n and "block" in n]
        assert phi
        if not settings:
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            assert set(phi) <= set(moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_and_decoding_agree_with_float32(nsa_model, documents, dtype, decode_from):
    model = nsa_model({"kv_heads": 2}).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith("blocks."):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    docs = documents()
    batch = pack(docs)
    want = model(batch).logits_MV
    with torch.autocast("cpu", dtype):
        got = model(batch).logits_MV
        steps = list(decode_from(model, docs, [d.prefix_len for d in docs]))
    assert (got - want).abs().mean() < 0.1 * want.std()
    assert all(row.isfinite().all() for _, _, row in steps)


def test_the_parts_before_and_after_attention_are_traced_whole(nsa_model, documents):
    model, batch = nsa_model(), pack(documents())
    want = model(batch).logits_MV
    for block in model.blocks:
        for part in ("enter", "leave"):
            whole = torch.compile(
                getattr(block, part), dynamic=True, backend="eager", fullgraph=True
            )
            setattr(block, part, whole)
    torch.testing.assert_close(model(batch).logits_MV, want)


def test_a_checkpoint_keeps_the_settings(small_nsa, documents, tmp_path):
    config = Config(
        out="x",
        model=ModelConfig(width=32, layers=1, heads=2, kv_heads=1, attention="nsa"),
        nsa=replace(small_nsa, kv="per_branch"),
    )
    model = build_model(config.model, 1, nsa=config.nsa)
    save_checkpoint(tmp_path / "c", model, config, ("a",), {})
    loaded = load_model(tmp_path / "c")
    assert loaded.model.nsa == config.nsa
    batch = pack([replace(documents()[1], task=0)])
    torch.testing.assert_close(loaded.model(batch).logits_MV, model.eval()(batch).logits_MV)


def test_the_switch_and_its_settings_are_read_from_the_command_line():
    words = ["nsa.kv=per_branch", "nsa.window=64", "nsa.every=2"]
    config = load_config(["model.attention=nsa", *words])
    assert config.model.attention == "nsa"
    assert config.nsa == NsaConfig(kv="per_branch", window=64, every=2)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("nsa.stride=12", r"nsa.block=32 with nsa.stride=12; expected a multiple.*nsa.block=36"),
        ("nsa.select_block=24", r"nsa.select_block=24 with nsa.stride=16.*nsa.select_block=32"),
        ("nsa.select_count=2", r"nsa.select_count=2; expected at least 3"),
        ("nsa.window=0", r"nsa.window=0; expected a number at least 1"),
        ("nsa.kv=both", r"nsa.kv=both.*shared, per_branch"),
        ("nsa.blok=32", r"unknown key 'nsa.blok'; did you mean nsa.block"),
    ],
)
def test_impossible_settings_are_named_in_one_line(argument, words):
    with pytest.raises(UserError, match=words) as caught:
        load_config(["model.attention=nsa", argument])
    assert "\n" not in str(caught.value)


def test_the_library_refuses_impossible_settings_too(small_nsa):
    with pytest.raises(UserError, match="nsa.stride=5"):
        build_model(ModelConfig(attention="nsa"), 1, nsa=replace(small_nsa, stride=5))


def test_the_forced_blocks_are_as_many_as_the_settings_ask_room_for():
    from tiny_onn.config.check_network import NUM_FORCED_BLOCKS

    assert NUM_FORCED_BLOCKS == select.NUM_FORCED
