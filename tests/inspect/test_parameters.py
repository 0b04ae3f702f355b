from dataclasses import replace

import pytest

from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, MoeConfig, NsaConfig
from tiny_onn.inspect.parameters import active_parameters, total_parameters
from tiny_onn.model.convert import convert
from tiny_onn.model.tiny_onn import build_model


def total(model):
    return sum(p.numel() for p in model.parameters())


def test_a_dense_network_has_all_parameters_active_but_the_other_rows_of_its_tables():
    model = build_model(ModelConfig(width=16, layers=2, heads=2, kv_heads=2, head_width=8), 7)
    idle = (7 - 1) * 16 + (8 - 1) * 16 + (14 - 1) * 16  # tasks, views, tokens
    assert active_parameters(model, {}) == pytest.approx(total(model) - idle)


def sparse_model(store="dense"):
    deep = DeepEmbedConfig(keys=["token", "task"], form="1x", store=store, task_rank=3)
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8}
    config = ModelConfig(**sizes, attention="nsa", ffn="dynmoe", deep_embed=deep)
    return build_model(config, 7, MoeConfig(experts=4, expert_width=5, every=2), NsaConfig())


def test_experts_count_by_how_many_run_and_gates_and_bases_whole():
    """Experts are in the last of two blocks; tokens have 14 rows of 2 layers x 16 numbers, tasks
    7 rows of 2 x 3 and a basis."""
    model = sparse_model()
    expert = 2 * 5 * 16 + 16 * 5
    idle_rows = (7 - 1) * 16 + (8 - 1) * 16 + (14 - 1) * 16  # tasks, views, tokens
    idle_rows += (14 - 1) * 2 * 16 + (7 - 1) * 2 * 3
    assert total_parameters(model) == total(model)
    expected = total(model) - idle_rows - (4 - 1.5) * expert
    assert active_parameters(model, {1: 1.5}) == pytest.approx(expected)


def test_tables_in_files_count_as_those_in_memory():
    dense, in_files = sparse_model(), sparse_model("memmap")
    assert total(in_files) == total(dense) - 14 * 2 * 16
    assert total_parameters(in_files) == total_parameters(dense)
    assert active_parameters(in_files, {1: 2.0}) == pytest.approx(
        active_parameters(dense, {1: 2.0})
    )


@pytest.mark.parametrize("ffn", ["dense", "dynmoe"])
@pytest.mark.parametrize("expert_weights", ["separate", "shared_k24"])
def test_packed_weights_count_as_they_were_trained_without_what_chose_their_masks(
    ffn, expert_weights
):
    moe = MoeConfig(experts=4, expert_width=8, every=2, expert_weights="separate")
    if ffn == "dynmoe":
        moe = replace(moe, expert_weights=expert_weights)
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8}
    model = build_model(ModelConfig(**sizes, ffn=ffn, weights="k24", ffn_width=24), 7, moe)
    masks = sum(p.numel() for pattern, _ in model.masked_weights for p in pattern.parameters())
    total_before, active_before = total_parameters(model), active_parameters(model, {1: 1.5})
    convert(model, "reference")
    assert total_parameters(model) == total_before - masks
    assert active_parameters(model, {1: 1.5}) == pytest.approx(active_before)
