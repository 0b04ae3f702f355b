"""DeepEmbed's optimizer: the rule, which rows it leaves alone, and files like parameters."""

import pytest
import torch
from torch.nn.functional import embedding

from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, OptimConfig
from tiny_onn.model.deep_embed_store import FileRows, PendingRows
from tiny_onn.model.row_file import RowFile
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.optim import build_optimizer, split_parameters
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.row_optim import (
    EPS,
    HORIZON,
    FileRowsOptimizer,
    merge_pending,
    new_row_state,
    pending_leaves,
    round_stochastically,
    step_table,
)

SHAPE = (12, 2, 5)
RULE = {"lr": 0.1, "weight_decay": 0.3}


def gradients(steps, touched, seed=0):
    """One gradient a step, zero but in the rows that the step touches."""
    generator = torch.manual_seed(seed)
    for step in range(steps):
        gradient = torch.zeros(SHAPE)
        rows = touched(step)
        gradient[rows] = torch.randn(len(rows), *SHAPE[1:], generator=generator)
        yield gradient


def loop_rule(rows, all_gradients, lr, weight_decay):
    """The rule of the module's docstring, row by row and layer by layer."""
    rows = rows.clone().double()
    for number in range(SHAPE[0]):
        for layer in range(SHAPE[1]):
            square, count = 0.0, 0
            for gradient in all_gradients:
                g = gradient[number, layer].double()
                if not g.any():
                    continue
                count += 1
                square += (float(g.square().mean()) - square) / min(count, HORIZON)
                update = g / (square**0.5 + EPS) + weight_decay * rows[number, layer]
                rows[number, layer] -= lr * update
    return rows.float()


def touched(step):
    return [0, 1 + step % 3, 5] if step % 2 else [0, 7]


def test_the_rule_is_that_of_its_docstring():
    start = torch.randn(SHAPE, generator=torch.manual_seed(9))
    steps = list(gradients(HORIZON + 10, touched))
    for gradient in steps[::4]:
        gradient[0, 1] = 0  # a row that only one layer used
    rows, state = start.clone(), new_row_state(start)
    for gradient in steps:
        step_table(rows, gradient, state, **RULE)
    torch.testing.assert_close(rows, loop_rule(start, steps, **RULE), rtol=1e-4, atol=1e-5)
    assert state["touches"][0, 0] == len(steps) and state["touches"][11, 0] == 0


def test_untouched_rows_keep_every_bit_and_their_state():
    rows = torch.randn(SHAPE, generator=torch.manual_seed(9))
    state = new_row_state(rows)
    for gradient in gradients(3, lambda step: list(range(12))):
        step_table(rows, gradient, state, **RULE)
    before = rows.clone(), {name: t.clone() for name, t in state.items()}
    for gradient in gradients(4, touched):
        gradient[5, 0] = 0
        step_table(rows, gradient, state, **RULE)
    rest = [4, 6, 8, 9, 10, 11]
    assert torch.equal(rows[rest], before[0][rest]) and torch.equal(rows[5, 0], before[0][5, 0])
    assert not torch.equal(rows[5, 1], before[0][5, 1])
    for name, tensor in state.items():
        assert torch.equal(tensor[rest], before[1][name][rest])


def test_decay_pulls_a_touched_row_to_the_identity_and_leaves_the_others():
    rows = torch.ones(SHAPE)
    state = new_row_state(rows)
    for step in range(300):
        gradient = torch.zeros(SHAPE)
        gradient[3] = 1e-12 * torch.randn(SHAPE[1:], generator=torch.manual_seed(step))
        step_table(rows, gradient, state, lr=0.02, weight_decay=1.0)
    assert rows[3].abs().max() < 0.1 and torch.equal(rows[:3], torch.ones(3, *SHAPE[1:]))


def test_the_first_step_of_a_row_has_the_size_of_the_rate_whatever_its_gradient():
    rows = torch.zeros(4, 1, 1)
    step_table(rows, torch.tensor([[[3.0]], [[-1e-4]], [[0.0]], [[7.0]]]), new_row_state(rows),
               lr=0.1, weight_decay=0.0)  # fmt: skip
    torch.testing.assert_close(rows.flatten(), torch.tensor([-0.1, 0.1, 0.0, -0.1]), atol=1e-4,
                               rtol=0)  # fmt: skip


def test_a_gradient_that_is_not_finite_is_not_passed_over():
    rows = torch.ones(3, 1, 2)
    gradient = torch.zeros(3, 1, 2)
    gradient[1, 0, 1], gradient[2, 0, 0] = float("nan"), float("inf")
    step_table(rows, gradient, new_row_state(rows), **RULE)
    assert torch.equal(rows[0], torch.ones(1, 2))
    assert rows.isnan().any(dim=2).flatten().tolist() == [False, True, True]


def test_torchs_sparse_adam_is_adam_for_rows_always_touched_only():
    """Why tables have a rule of their own: Adam moves rows that no step touches."""
    start = torch.randn(6, 3, generator=torch.manual_seed(0))
    found = []
    for sparse in (False, True):
        table = torch.nn.Parameter(start.clone())
        make = torch.optim.SparseAdam if sparse else torch.optim.Adam
        optimizer = make([table], lr=0.1)
        for step in range(4):
            index = torch.tensor([0, 1, 1, 5] if step == 0 else [0, 1])
            optimizer.zero_grad()
            weights = torch.randn(len(index), 3, generator=torch.manual_seed(step))
            (embedding(index, table, sparse=sparse) * weights).sum().backward()
            optimizer.step()
        found.append(table.detach())
    torch.testing.assert_close(found[0][:2], found[1][:2])
    assert not torch.allclose(found[0][5], found[1][5])  # touched once: dense Adam drifts on


def make_store(folder, dtype=torch.float32, start=None):
    store = FileRows(*SHAPE, dtype)
    store.create(folder / f"rows.{len(list(folder.iterdir()))}")
    if start is not None:
        store.file.write(torch.arange(SHAPE[0]), start.to(dtype))
    return store


@pytest.mark.parametrize("forwards", [1, 2])
def test_rows_in_a_file_are_stepped_like_a_parameter(tmp_path, forwards):
    start = torch.randn(SHAPE, generator=torch.manual_seed(3))
    store, table = make_store(tmp_path, start=start), torch.nn.Parameter(start.clone())
    optimizer, state = FileRowsOptimizer({"x": store}), new_row_state(start)
    generator = torch.manual_seed(4)
    for _ in range(5):
        table.grad = None
        for _ in range(forwards):
            index_N = torch.randint(-1, 9, (7,), generator=generator)
            weights = torch.randn(7, 5, generator=generator)
            known = (index_N >= 0).unsqueeze(1)
            rows = store.fetch(index_N)()
            for layers, index in ((rows.layers, rows.index_N), (table.unbind(1), index_N)):
                for layer in layers:
                    taken = embedding(index.clamp(min=0), layer) * known
                    (taken.tanh() * weights).sum().backward(retain_graph=True)
        optimizer.step(**RULE)
        step_table(table.data, table.grad, state, **RULE)
        assert store.pending == []
        torch.testing.assert_close(
            store.file.read(torch.arange(12)), table.detach(), rtol=1e-5, atol=1e-6
        )
    assert torch.equal(store.file.read(torch.tensor([9, 10, 11])), start[9:])
    for name, tensor in optimizer.state_dict()["x"].items():
        torch.testing.assert_close(tensor, state[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untouched_rows_of_a_file_keep_every_byte(tmp_path, dtype):
    start = torch.randn(SHAPE, generator=torch.manual_seed(3))
    store = make_store(tmp_path, dtype, start)
    optimizer = FileRowsOptimizer({"x": store})
    before = store.file.read(torch.arange(12))
    rows = store.fetch(torch.tensor([2, 7, 8]))()
    (rows.layers[1][:2].square()).sum().backward()  # layer 0 and row 8 are fetched, not used
    optimizer.step(**RULE)
    after = store.file.read(torch.arange(12))
    changed = (after != before).any(dim=2)
    assert changed.nonzero().tolist() == [[2, 1], [7, 1]]


def test_gradients_of_rows_that_several_forwards_took_are_summed():
    pending = []
    for ids, value in (([1, 4], 1.0), ([4, 6], 10.0), ([0], None)):
        leaf = torch.full((len(ids), 2, 5), float(ids[0]), requires_grad=True)
        if value is not None:
            leaf.grad = torch.full_like(leaf, value)
        pending.append(PendingRows(torch.tensor(ids), leaf))
    ids_U, rows, gradient = merge_pending(pending)
    assert ids_U.tolist() == [1, 4, 6]
    assert gradient[:, 0, 0].tolist() == [1.0, 11.0, 10.0]
    assert rows.shape == (3, 2, 5) and rows[2, 0, 0] == 4.0
    assert merge_pending(pending[2:]) is None


def test_stochastic_rounding_keeps_bfloat16_values_and_is_right_in_the_mean():
    torch.manual_seed(0)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float()), exact)
    for value in (1.001, -0.3333, 3e-5):
        many = round_stochastically(torch.full((20_000,), value)).double()
        spacing = many.max() - many.min()
        assert many.unique().numel() == 2
        assert abs(many.mean() - value) < 0.02 * spacing


def test_a_table_without_a_writable_file_is_not_trained_silently(tmp_path):
    store = FileRows(*SHAPE, torch.float32)
    with pytest.raises(ValueError, match="'x' has no file open for training"):
        FileRowsOptimizer({"x": store}).step(**RULE)
    RowFile.create(tmp_path / "x", SHAPE, torch.float32)
    store.open(tmp_path / "x")
    with pytest.raises(ValueError, match="'x' has no file open for training"):
        FileRowsOptimizer({"x": store}).step(**RULE)


def tiny_model(**deep):
    deep = {"keys": ["token", "task"], "task_rank": 3, **deep}
    sizes = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 16}
    torch.manual_seed(0)
    return build_model(
        ModelConfig(**sizes, ffn_width=48, deep_embed=DeepEmbedConfig(**deep)), num_tasks=5
    )


def test_clipping_counts_and_scales_the_rows_of_files(tmp_path):
    model = tiny_model(store="memmap")
    model.deep_embed.create_files(tmp_path)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for layer in model.deep_embed.files["token"].fetch(torch.tensor([1, 3]))().layers:
        (layer * 100).sum().backward()
    module = Pretrain(model, OptimConfig(clip_norm=0.5))
    module.configure_gradient_clipping(None)
    gradients = [t.grad for t in (*model.parameters(), *pending_leaves(model))]
    assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(0.5, rel=1e-4)
    assert float(module.grad_norm) > 100 * (2 * 2 * 48) ** 0.5


@pytest.mark.parametrize("form", ["1x", "4x", "v7a"])
def test_tables_are_a_group_of_their_own_and_bases_are_not(form):
    model = tiny_model(form=form, mix_rank=4)
    kinds = split_parameters(model)
    assert set(kinds["deep_embed"]) == {
        "deep_embed.tables.token.rows.weight", "deep_embed.tables.task.rows.weight"
    }  # fmt: skip
    assert "deep_embed.tables.task.basis" in kinds["embeddings"]
    optim = OptimConfig(deep_embed_lr=0.7, deep_embed_weight_decay=0.2)
    optimizer = build_optimizer(model, optim)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    group = next(g for g in optimizer.param_groups if g["name"] == "deep_embed")
    assert (group["kind"], group["lr"], group["weight_decay"]) == ("rows", 0.7, 0.2)


def test_state_round_trip_continues_bit_for_bit(tmp_path):
    models = [tiny_model(store="memmap") for _ in range(2)]
    optimizers = [build_optimizer(m, OptimConfig()) for m in models]
    for number, model in enumerate(models):
        (tmp_path / str(number)).mkdir()
        model.deep_embed.create_files(tmp_path / str(number))

    def step(model, optimizer, seed):
        generator = torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        rows = model.deep_embed.files["token"].fetch(torch.tensor([seed, 3]))()
        for layer in rows.layers:
            (layer * torch.randn(layer.shape, generator=generator)).sum().backward()
        assert len(pending_leaves(model)) == 1
        optimizer.step()
        assert pending_leaves(model) == []

    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 1)  # both tables on disk are equal from here on
    optimizers[1] = build_optimizer(models[1], OptimConfig())
    torch.save((models[0].state_dict(), optimizers[0].state_dict()), tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    models[1].load_state_dict(weights)
    optimizers[1].load_state_dict(state)
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 2)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    stores = [m.deep_embed.files["token"] for m in models]
    tables = [s.file.read(torch.arange(s.shape[0])) for s in stores]
    assert torch.equal(*tables) and tables[0].any()
