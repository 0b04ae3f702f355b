"""NSA's steps: what they read and compute, and that a fault in them alone is noticed."""

import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.model import nsa as nsa_module
from tiny_onn_kernels.nsa import decode


@pytest.mark.parametrize("first", [1, 2, 3, 5, 6, 7, 8, 12, 13])
def test_a_prompt_may_end_anywhere_between_blocks_strides_and_windows(
    nsa_model, documents, first, assert_decoding_is_parallel
):
    model = nsa_model({"mask": "causal", "layers": 1})
    docs = [documents()[3]] * 3
    assert_decoding_is_parallel(model, docs, [first, first + 1, first + 20])


def test_a_step_reads_compressed_chosen_and_window_keys_only(
    nsa_model, documents, monkeypatch, decode_from
):
    model, doc = nsa_model({"mask": "causal"}), documents([((9, 9), (9, 9))])[0]
    cut_at, reads, nsa = 100, [], model.nsa

    def counting(q, k, v, visible, want_share=False):
        reads.append(k.shape[-2])
        return right(q, k, v, visible, want_share)

    right = decode.tile_attention
    monkeypatch.setattr(decode, "tile_attention", counting)
    steps = list(decode_from(model, [doc], [cut_at]))
    assert len(steps) > 50
    for step in range(1, len(steps)):
        per_layer = reads[6 * (step - 1) : 6 * (step - 1) + 3]
        compressed = (cut_at + step - nsa.block) // nsa.stride + 1
        assert per_layer == [compressed, nsa.select_count * nsa.select_block, nsa.window]


def test_a_step_does_not_look_at_keys_outside_its_choice(nsa_model, documents, cut):
    model, doc = nsa_model({"mask": "causal", "layers": 1}), documents([((9, 9), (9, 9))])[0]
    with torch.no_grad():
        logits = []
        for poison in (False, True):
            _, cache = model.prefill(pack([cut(doc, 100)]), 4)
            if poison:  # blocks of old tokens that this step did not choose
                chosen = recorded_choice(model, pack([cut(doc, 100)]), doc)
                for block in set(range(30)) - chosen:
                    for store in (cache.keys, cache.values):
                        store[0][:, :, block * 3 : block * 3 + 3] = torch.nan
            token = torch.tensor([int(doc.tokens[100])])
            logits.append(model.step(token, torch.tensor(doc.positions[100:101]), cache))
    torch.testing.assert_close(*logits)


def recorded_choice(model, prompt, doc):
    """Blocks that a step from a copy of this prompt chooses."""
    chosen = set()
    right = nsa_module.nsa.choose_blocks

    def record(*args):
        index = right(*args)
        chosen.update(index.flatten().tolist())
        return index

    nsa_module.nsa.choose_blocks = record
    try:
        _, other = model.prefill(prompt, 4)
        chosen.clear()
        token = torch.tensor([int(doc.tokens[100])])
        model.step(token, torch.tensor(doc.positions[100:101]), other)
    finally:
        nsa_module.nsa.choose_blocks = right
    return chosen


def test_compressed_keys_are_computed_once_by_the_step_that_completes_a_block(
    nsa_model, documents, monkeypatch, cut
):
    model = nsa_model({"layers": 1})
    docs = documents()[2:]
    blocks = []
    right = nsa_module.BlockCompressor.forward

    def counting(self, blocks_MLKD):
        blocks.append(len(blocks_MLKD))
        return right(self, blocks_MLKD)

    monkeypatch.setattr(nsa_module.BlockCompressor, "forward", counting)
    batch = pack([cut(d, d.prefix_len) for d in docs])
    _, cache = model.prefill(batch, 9)
    blocks.clear()
    for _ in range(9):
        done = sum((n + 1 - 6) % 3 == 0 and n + 1 >= 6 for n in cache.lengths)
        model.step(torch.tensor([3, 4]), torch.tensor([[0, 0, 3], [1, 0, 3]]), cache)
        assert blocks == ([done, done] if done else [])  # keys, values
        blocks.clear()


@pytest.mark.parametrize("fault", ["window", "blocks", "compressed", "scores"])
def test_a_fault_in_the_step_alone_is_noticed(
    nsa_model, documents, fault, monkeypatch, assert_decoding_is_parallel
):
    if fault == "window":
        right = decode.window_bounds
        monkeypatch.setattr(
            decode,
            "window_bounds",
            lambda t, p, w: ((right(t, p, w)[0] - 1).clamp(min=0), right(t, p, w)[1]),
        )
    elif fault == "blocks":
        monkeypatch.setattr(decode, "token_visible", lambda end, time: time < end)
    elif fault == "compressed":
        step = nsa_module.nsa.decode_compressed
        monkeypatch.setattr(
            nsa_module.nsa, "decode_compressed", lambda q, k, v, n: step(q, k, v, n - 1)
        )
    else:
        scores = nsa_module.nsa.block_scores

        def shifted(share, *sizes):
            found = scores(share, *sizes)
            return found.roll(1, -1) if len(share) == 1 else found  # one row: a step

        monkeypatch.setattr(nsa_module.nsa, "block_scores", shifted)
    model = nsa_model({"mask": "causal", "layers": 1})
    with pytest.raises(AssertionError):
        assert_decoding_is_parallel(model, [documents()[3]], [20])
