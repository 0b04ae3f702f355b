import pytest
import torch
from torch import nn

from tiny_onn.config.schema import ModelConfig
from tiny_onn.inspect.parameters import active_parameters
from tiny_onn.model.tiny_onn import build_model


def total(model):
    return sum(p.numel() for p in model.parameters())


def test_a_dense_network_has_all_parameters_active_but_the_other_rows_of_its_tables():
    model = build_model(ModelConfig(width=16, layers=2, heads=2, kv_heads=2, head_width=8), 7)
    idle = (7 - 1) * 16 + (8 - 1) * 16 + (14 - 1) * 16  # tasks, views, tokens
    assert active_parameters(model, {}) == pytest.approx(total(model) - idle)


def test_experts_count_by_how_many_are_active_and_gates_whole():
    ffn = nn.Module()
    ffn.experts, ffn.gate = nn.Module(), nn.Module()
    ffn.experts.down = nn.Parameter(torch.zeros(4, 3, 5))
    ffn.gate.prototypes = nn.Parameter(torch.zeros(4, 3))
    block, model = nn.Module(), nn.Module()
    block.ffn = ffn
    model.blocks = nn.ModuleList([nn.Module(), block])
    assert active_parameters(model, {1: 1.5}) == pytest.approx(1.5 * 15 + 12)


def test_a_deep_embed_table_counts_one_row_and_its_basis_whole():
    model = nn.Module()
    model.deep_embed = nn.Module()
    model.deep_embed.tables = nn.ModuleDict({"token": nn.Module()})
    table = model.deep_embed.tables["token"]
    table.rows = nn.Module()
    table.rows.weight = nn.Parameter(torch.zeros(14, 2, 6))
    table.basis = nn.Parameter(torch.zeros(2, 6, 24))
    assert active_parameters(model, {}) == pytest.approx(12 + 2 * 6 * 24)
