from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.config.schema import NsaConfig
from tiny_onn.losses.language import output_nll
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.attention_work import _selected
from tiny_onn.training.datamodule import prepare
from tiny_onn.training.provenance import code_version, train_flops
from tiny_onn.training.totals import RunTotals
from tiny_onn_kernels.moe import reference
from tiny_onn_kernels.nsa.reference import lay_out


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


def test_a_token_of_an_excursion_counts_as_the_forward_part_of_one_trained_on(tiny):
    config = tiny()
    model = build_model(config.model, 3)
    trained = RunTotals(tokens=300, targets=90, documents=6, visible_pairs=5000, full_pairs=5000)
    plain = train_flops(model, config.model, trained)
    assert train_flops(model, config.model, replace(trained, excursion_tokens=150)) == (
        plain + plain // 6
    )


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
        assert prepare(batch, 0, causal).attention == (expected, 0, 0, 0)


SMALL = {"block": 8, "stride": 4, "select_block": 4, "select_count": 3, "window": 9}


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("every", [1, 2])
def test_flops_of_the_weights_of_nsa_are_those_torch_counts(tiny, kv, loops, every):
    """phi above all, whose rows are not tokens."""
    config = tiny(model={"attention": "nsa", "layers": 2, "heads": 4, "loops": loops})
    corpus, settings = build_corpus(config.data), NsaConfig(**SMALL, kv=kv, every=every)
    model = build_model(config.model, len(corpus.task_ids), nsa=settings)
    batch = prepare(EpochBatches(corpus, config.data, 0).batch(0, 0), step=0, nsa=settings)
    with FlopCounterMode(display=False) as counter:
        logits_MV = model(batch.batch, batch.rows_M).logits_MV
        output_nll(logits_MV, batch.targets_M)[0].backward()
    work = batch.attention
    assert 0 < work.compressed_blocks < work.compressed_chunks < batch.num_tokens
    totals = RunTotals(
        tokens=batch.num_tokens,
        targets=batch.num_targets,
        documents=len(batch.batch.task_B),
        compressed_chunks=work.compressed_chunks,
        compressed_blocks=work.compressed_blocks,
    )
    counted = counter.get_flop_counts()["Global"]
    products = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    weights_of_phi = model.blocks[1].attention.compress_key.inner.weight.numel()
    positions = 6 * weights_of_phi * 2 * loops * 2 // every  # a row a batch, of keys and values
    assert train_flops(model, config.model, totals) + positions == products


def test_pairs_of_full_attention_count_in_the_blocks_that_have_it(tiny):
    config = tiny(model={"attention": "nsa", "layers": 3})
    corpus, settings = build_corpus(config.data), NsaConfig(**SMALL, every=2)
    model = build_model(config.model, len(corpus.task_ids), nsa=settings)
    batch = EpochBatches(corpus, config.data, 0).batch(0, 0)
    mixed, full = (prepare(batch, 0, nsa=nsa).attention for nsa in (settings, None))
    assert mixed.full_pairs == full.visible_pairs
    totals = RunTotals(visible_pairs=mixed.visible_pairs, full_pairs=mixed.full_pairs)
    channels = config.model.heads * config.model.head_width
    pairs = 2 * mixed.visible_pairs + full.visible_pairs
    assert train_flops(model, config.model, totals) == 12 * channels * pairs


def pairs_one_by_one(lengths, prefixes, settings, known):
    """By branch; free blocks are chosen from the first on."""
    compressed = selected = window = 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        for t in range(length):
            end = prefix - 1 if t < prefix else t
            blocks = range(0, length - settings.block + 1, settings.stride)
            compressed += sum(first + settings.block - 1 <= end for first in blocks)
            own = t // settings.select_block
            forced = [0, own, max(0, own - 1)]
            order = dict.fromkeys([*forced, *range(end // settings.select_block + 1)])
            chosen = list(order)[: settings.select_count]
            selected += sum(s // settings.select_block in chosen for s in range(end + 1))
            if not (known and length <= settings.window):
                near = sorted(range(end + 1), key=lambda s, t=t: (abs(s - t), s))
                window += len(near[: settings.window])
    return compressed, selected, window


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),  # 3 x 4 tokens cover what a window of 9 does
        ({"kv": "per_branch"}, False),
        ({"window": 30}, False),  # not what one of 30 does
        ({"window": 30, "select_count": 8}, True),
        ({"window": 1000, "select_count": 1000}, True),
    ],
)
def test_pairs_of_nsa_are_counted_by_branch(tiny, causal, changes, known):
    config, settings = tiny(), NsaConfig(**SMALL | changes)
    batch = EpochBatches(build_corpus(config.data), config.data, 0).batch(0, 0)
    lengths, prefixes = batch.layout.lengths, batch.layout.prefixes
    assert min(lengths) < 20 and max(lengths) > 30
    prefixes = [0] * len(lengths) if causal else prefixes
    expected = pairs_one_by_one(lengths, prefixes, settings, known)
    work = prepare(batch, 0, causal, 64, settings).attention
    assert work.visible_pairs == sum(expected)
    assert (expected[2] == 0) == (known and max(lengths) <= settings.window)
    layout = lay_out(
        batch.layout.cu_seqlens,
        block=settings.block,
        stride=settings.stride,
        select_block=settings.select_block,
        window=settings.window,
    )
    assert work.compressed_chunks == len(layout.chunks.blocks.row_ML)
    assert work.compressed_blocks == len(layout.compressed.row_ML)


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_the_model_reads_as_many_selected_keys_as_are_counted(tiny, mask):
    config, settings = tiny(model={"attention": "nsa", "mask": mask}), NsaConfig(**SMALL)
    corpus = build_corpus(config.data)
    batch = EpochBatches(corpus, config.data, 0).batch(0, 0)
    model, chosen = build_model(config.model, len(corpus.task_ids), nsa=settings), []
    model.blocks[0].attention.watch = lambda gates, index_NKn: chosen.append(index_NKn[:, 0])
    plan = model.plan_attention(batch)
    model(batch)
    layout = plan.layout if plan.selected.layout is None else plan.selected.layout
    first_Nn = chosen[0] * settings.select_block
    seen_Nn = (layout.end_N[:, None] + 1 - first_Nn).clamp(0, settings.select_block)
    read = int((seen_Nn * (chosen[0] >= 0)).sum())
    # documents that are covered are read in full elsewhere
    long_N = torch.tensor(batch.layout.lengths)[batch.layout.doc_N]
    long_N = long_N > settings.select_count * settings.select_block
    assert int(long_N.sum()) == len(chosen[0])
    counted_N = _selected(layout.time_N, layout.end_N, settings)
    if mask == "causal":
        assert read == int(counted_N.sum())
    else:
        assert 0 <= int(counted_N.sum()) - read < 0.05 * read


def test_a_branch_that_is_known_already_adds_nothing(tiny):
    config = tiny()
    batch = EpochBatches(build_corpus(config.data), config.data, 0).batch(0, 0)
    full = prepare(batch, 0).attention.visible_pairs
    covered = NsaConfig(block=1000, stride=8, select_block=8, select_count=1000, window=1000)
    assert prepare(batch, 0, nsa=covered).attention == (full, 0, 0, 0)
    apart = NsaConfig(**vars(covered) | {"kv": "per_branch"})
    assert prepare(batch, 0, nsa=apart).attention == (2 * full, 0, 0, 0)


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
