import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.losses.language import output_nll
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.datamodule import prepare
from tiny_onn.training.provenance import code_version, train_flops
from tiny_onn.training.totals import RunTotals
from tiny_onn_kernels.moe import reference


@pytest.mark.parametrize("modulation", ["none", "film"])
@pytest.mark.parametrize("loops", [1, 2])
def test_flops_of_the_weights_are_those_torch_counts(tiny, loops, modulation):
    config = tiny(model={"loops": loops, "layers": 2, "task_modulation": modulation})
    corpus = build_corpus(config.data)
    model = build_model(config.model, len(corpus.task_ids))
    batch = prepare(EpochBatches(corpus, config.data, 0).batch(0, 0), step=0)
    with FlopCounterMode(display=False) as counter:
        logits_MV = model(batch.batch, batch.rows_M).logits_MV
        output_nll(logits_MV, batch.targets_M)[0].backward()
    totals = RunTotals(
        tokens=batch.num_tokens, targets=batch.num_targets, documents=len(batch.batch.task_B)
    )
    counted = counter.get_flop_counts()["Global"]
    assert train_flops(model, config.model, totals) == counted[torch.ops.aten.mm]


def test_visible_pairs_are_those_of_the_mask(tiny):
    config = tiny()
    batch = EpochBatches(build_corpus(config.data), config.data, 0).batch(0, 0)
    layout = batch.layout
    for causal in (False, True):
        expected = 0
        for length, prefix in zip(layout.lengths, layout.prefixes, strict=True):
            see = torch.ones(length, length).tril().bool()
            if not causal:
                see[:prefix, :prefix] = True
            expected += int(see.sum())
        assert prepare(batch, 0, causal).visible_pairs == expected


def test_experts_count_for_the_pairs_that_they_ran_on(tiny, monkeypatch):
    monkeypatch.setattr(reference, "ROUNDING", 1)  # pairs of weight 0 are no work of the model's
    config = tiny(model={"ffn": "dynmoe", "layers": 2})
    corpus = build_corpus(config.data)
    model = build_model(config.model, len(corpus.task_ids), config.moe)
    batch = prepare(EpochBatches(corpus, config.data, 0).batch(0, 0), step=0)
    pairs = sum(int(entry.runs_NE.sum()) for entry in model(batch.batch, batch.rows_M).routing)
    x_NC = torch.randn(50, config.model.width)
    layer = model.expert_layers[0]
    runs_NE = torch.rand(50, config.moe.experts) < 0.3
    with FlopCounterMode(display=False) as counter:
        layer.experts(x_NC.requires_grad_(), runs_NE, torch.rand(runs_NE.shape)).sum().backward()
    flops_a_pair = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / int(runs_NE.sum())
    with_pairs = train_flops(model, config.model, RunTotals(expert_pairs=pairs))
    assert with_pairs == flops_a_pair * pairs


def test_attention_counts_twelve_per_channel_and_visible_pair(tiny):
    config = tiny(model={"layers": 3})
    model = build_model(config.model, 8)
    flops = train_flops(model, config.model, RunTotals(visible_pairs=1000))
    assert flops == 12 * 3 * (2 * 16) * 1000


def test_the_code_version_names_a_commit_in_a_checkout():
    version = code_version()
    if version["commit"] is not None:
        assert len(version["commit"]) == 40 and isinstance(version["dirty"], bool)
