"""DeepEmbed's tables on disk and in checkpoints, and the settings that it refuses."""

from dataclasses import replace

import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.config.schema import Config, DeepEmbedConfig, ModelConfig
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model

EVERY = ("token", "ngram", "patch", "task")


def tiny_config(keys=EVERY, deep=None, **model):
    return ModelConfig(
        **{"width": 32, "layers": 2, "heads": 4, "head_width": 8, "ffn_width": 48} | model,
        deep_embed=DeepEmbedConfig(
            keys=list(keys), **{"ngram": 2, "task_rank": 3, "mix_rank": 4} | (deep or {})
        ),
    )


def wake(model):
    """No zero weights left, in float64."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def tiny_model(deep):
    torch.manual_seed(0)
    return wake(build_model(tiny_config(deep=deep), 5))


def with_files(model, folder, seed=1):
    """Tables on disk filled with random rows."""
    model.deep_embed.create_files(folder)
    for store in model.deep_embed.files.values():
        rows = torch.randn(store.shape, generator=torch.manual_seed(seed)) * 0.3
        store.file.write(torch.arange(store.shape[0]), rows.to(store.dtype))
    return model


# Oracles 6, 7: on disk as in memory.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_tables_on_disk_give_the_logits_and_gradients_of_tables_in_memory(
    documents, tmp_path, dtype, rank
):
    deep = {"store": "memmap", "dtype": dtype, "rank": rank}
    filed = with_files(tiny_model(deep), tmp_path)
    dense = tiny_model({"rank": rank})
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


def test_step_logits_equal_the_parallel_forward_from_disk(
    documents, assert_decoding_is_parallel, tmp_path
):
    docs = documents(demos=True)
    model = with_files(tiny_model({"store": "memmap"}), tmp_path)
    assert_decoding_is_parallel(model, docs, [d.prefix_len for d in docs])


# Checkpoints.


@pytest.mark.parametrize("deep", [{}, {"store": "memmap"}, {"store": "memmap", "dtype": "bf16"}])
def test_a_checkpoint_gives_back_every_table(documents, tmp_path, deep):
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
