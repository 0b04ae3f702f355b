import pytest
import torch

from tiny_onn.config.schema import ModelConfig, MoeConfig, OptimConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.muon import BatchedMuon
from tiny_onn.training.optim import MuonAdamW, build_optimizer, split_parameters

TINY = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_width": 16,
    "ffn_width": 48,
}


def tiny_model(**options):
    torch.manual_seed(0)
    return build_model(ModelConfig(**TINY, **options), num_tasks=5)


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("ffn", ["dense", "dynmoe"])
@pytest.mark.parametrize("modulation", ["none", "film"])
def test_every_parameter_is_in_exactly_one_group(matrices, modulation, ffn):
    model = tiny_model(task_modulation=modulation, ffn=ffn)
    optimizer = build_optimizer(model, OptimConfig(matrices=matrices))
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


def test_groups_hold_what_their_names_say():
    kinds = split_parameters(tiny_model())
    assert set(kinds["tables"]) == {"embedding.task.weight", "embedding.view.weight"}
    assert set(kinds["embeddings"]) == {"embedding.token.weight", "head.weight"}
    assert all(".blocks." in "." + n and p.dim() == 2 for n, p in kinds["matrices"].items())
    assert "blocks.1.ffn.down.weight" in kinds["matrices"]
    assert all(p.dim() == 1 for p in kinds["vectors"].values())


def test_positions_in_a_block_are_embeddings_and_not_matrices_of_one_row():
    kinds = split_parameters(tiny_model(attention="nsa"))
    names = {
        kind: {n.rpartition(".compress_key.")[2] for n in p if ".compress_key." in n}
        for kind, p in kinds.items()
    }
    assert names["embeddings"] == {"position"}
    assert names["matrices"] == {"inner.weight", "outer.weight"}


def test_experts_are_matrices_prototypes_are_embeddings_and_thresholds_are_never_decayed():
    model = tiny_model(ffn="dynmoe")
    kinds = split_parameters(model)
    ffn = {kind: {n.rpartition("ffn.")[2] for n in p if ".ffn." in n} for kind, p in kinds.items()}
    assert ffn == {
        "matrices": {"experts.gate_up", "experts.down"},
        "embeddings": {"gate.prototypes"},
        "vectors": {"gate.thresholds"},
        "deep_embed": set(),
        "tables": set(),
        "patterns": set(),
    }
    optimizer = build_optimizer(model, OptimConfig())
    thresholds = model.expert_layers[0].gate.thresholds
    (group,) = (g for g in optimizer.param_groups if any(p is thresholds for p in g["params"]))
    assert (group["kind"], group["weight_decay"]) == ("adamw", 0.0)


@pytest.mark.parametrize("expert_weights", ["separate", "shared_k24"])
@pytest.mark.parametrize("logits", ["additive", "free"])
def test_what_chooses_masks_is_in_a_group_of_its_own_without_decay(logits, expert_weights):
    config = ModelConfig(**TINY, ffn="dynmoe", weights="k24")
    moe = MoeConfig(expert_weights=expert_weights, expert_width=16, every=2)
    model = build_model(config, 5, moe, k24=K24Config(logits=logits))
    optimizer = build_optimizer(model, OptimConfig())
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    (group,) = (g for g in optimizer.param_groups if g["name"] == "patterns")
    assert (group["kind"], group["weight_decay"]) == ("adamw", 0.0)
    own = [p for pattern, _ in model.masked_weights for p in pattern.parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in own] and len(own) == 4
    matrices = set(split_parameters(model)["matrices"])
    assert {"blocks.1.ffn.experts.gate_up", "blocks.0.ffn.down.weight"} <= matrices


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_row_scales_shorten_the_steps_of_their_rows_alone(matrices):
    models = [tiny_model(ffn="dynmoe") for _ in range(2)]
    optimizers = [build_optimizer(m, OptimConfig(matrices=matrices)) for m in models]
    start = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    scale_E = torch.ones(8)
    scale_E[2], scale_E[5] = 0.25, 0.0
    layer = models[1].expert_layers[1]
    optimizers[1].row_scale = {p: scale_E for p in layer.parameters()}
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(3)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    scaled = {id(p) for p in layer.parameters()}
    for (name, plain), p in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if id(p) not in scaled:
            assert torch.equal(plain, p)
            continue
        moved = (plain - start[name]).detach()
        factor = scale_E.view(-1, *(1,) * (p.dim() - 1))
        torch.testing.assert_close((p - start[name]).detach(), moved * factor, rtol=1e-3, atol=1e-7)
        assert torch.equal(p[3], plain[3]) and torch.equal(p[5], start[name][5])


def test_groups_have_their_own_rates_and_decays():
    optim = OptimConfig(
        muon_lr=0.1, adamw_lr=0.2, table_lr=0.3, muon_weight_decay=0.4, adamw_weight_decay=0.5,
        table_weight_decay=0.6,
    )  # fmt: skip
    groups = {g["name"]: g for g in build_optimizer(tiny_model(), optim).param_groups}
    got = {name: (g["kind"], g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert got == {
        "matrices": ("muon", 0.1, 0.4),
        "embeddings": ("adamw", 0.2, 0.5),
        "vectors": ("adamw", 0.2, 0.0),
        "tables": ("adamw", 0.3, 0.6),
    }


def test_both_rules_equal_their_own_optimizers():
    torch.manual_seed(0)
    matrix, vector = torch.randn(6, 4), torch.randn(4)
    ours = [torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(vector.clone())]
    theirs = [torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(vector.clone())]
    both = MuonAdamW(
        [
            {"params": [ours[0]], "kind": "muon", "lr": 0.1, "weight_decay": 0.1, "momentum": 0.95,
             "ns_steps": 5, "ns_dtype": "bfloat16", "adjust": "original"},
            {"params": [ours[1]], "kind": "adamw", "lr": 0.01, "weight_decay": 0.1,
             "betas": (0.9, 0.95), "eps": 1e-8},
        ]
    )  # fmt: skip
    muon = BatchedMuon([theirs[0]], lr=0.1, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs[1]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (both, muon, adamw):
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-7)


def test_lr_scale_multiplies_every_peak():
    optimizer = build_optimizer(tiny_model(), OptimConfig())
    optimizer.set_lr_scale(0.5)
    optimizer.set_lr_scale(0.25)
    assert all(g["lr"] == g["peak_lr"] * 0.25 for g in optimizer.param_groups)


def test_state_round_trip_continues_bit_for_bit(tmp_path):
    models = [tiny_model(), tiny_model()]
    optimizers = [build_optimizer(m, OptimConfig()) for m in models]

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(models[0], optimizers[0], 1)
    torch.save((models[0].state_dict(), optimizers[0].state_dict()), tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    models[1].load_state_dict(weights)
    optimizers[1].load_state_dict(state)
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 2)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
