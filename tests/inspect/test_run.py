import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.config.load import load_inspect_config
from tiny_onn.config.schema import DeepEmbedConfig, InspectConfig, MoeConfig, NsaConfig
from tiny_onn.errors import UserError
from tiny_onn.inspect.branches import chosen_blocks, gate_stats
from tiny_onn.inspect.experts import expert_stats
from tiny_onn.inspect.run import encode, run_inspect

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def look(small_checkpoint, tmp_path):
    folder = tmp_path / "run"

    def run(**settings):
        if not folder.exists():
            small_checkpoint(folder / "checkpoint")
        out = settings.pop("out", str(tmp_path / "figures"))
        return run_inspect(InspectConfig(checkpoint=str(folder), out=out, **settings))

    return run


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_dense_checkpoint_is_told_in_one_line_a_part(look, tmp_path, capsys):
    assert look() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "no expert figures: its FFN has no experts (model.ffn=dense)",
        "no NSA figures: attention is full (model.attention=full)",
    ]
    assert list((tmp_path / "figures").iterdir()) == []


@pytest.fixture
def sparse(small_checkpoint):
    """``sparse(folder)``: every sparse part; n l' = 16 tokens, fewer than the longest document."""
    nsa = NsaConfig(block=4, stride=2, select_block=4, select_count=4, window=4)
    moe = MoeConfig(experts=4, expert_width=8, none_active="top1")
    parts = {"attention": "nsa", "ffn": "dynmoe"}
    deep = DeepEmbedConfig(keys=["token", "task"], form="1x")
    return lambda folder: small_checkpoint(folder, moe, nsa, **parts, deep_embed=deep)


def test_a_sparse_checkpoint_has_all_four_figures(sparse, tmp_path, capsys):
    sparse(tmp_path / "run" / "checkpoint")
    out = tmp_path / "figures"
    assert run_inspect(InspectConfig(checkpoint=str(tmp_path / "run"), out=str(out))) == 0
    names = ["expert_load.png", "expert_tokens.png", "nsa_blocks.png", "nsa_gates.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "of 8 dead" in lines[0]


def test_the_parts_tell_what_they_did(sparse, tmp_path):
    """Statistics from the network's own routing, gates and choices."""
    loaded = sparse(tmp_path / "run" / "checkpoint")
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    documents = [encode(loaded, corpus, example) for example in corpus.examples]
    stats = expert_stats(loaded.model, documents)
    num_tokens = sum(len(document.tokens) - 1 for document in documents)  # END is not read
    assert stats.layers == (0, 1) and (stats.tokens_LQ.sum(axis=1) == num_tokens).all()
    # top1: a token for which nothing fires runs one expert
    fired_L = stats.fired_LQE.sum(axis=(1, 2))
    assert stats.none_L.sum() > 0 and (stats.ran_L == fired_L + stats.none_L).all()
    gates = gate_stats(loaded.model, documents)
    np.testing.assert_allclose(gates.quantiles, 0.5)  # untrained gates stand at one half
    longest = max(documents, key=lambda document: len(document.tokens))
    share_TT = chosen_blocks(loaded.model, longest, 4, causal=False).share_ATT[0]
    last = share_TT[-1]
    assert last[:4].all() and last[-1] == 1, "the first block and its own are forced"
    assert 4 < last.sum() <= 16 < len(last), "n l' tokens at most"


def test_an_unknown_task_is_refused_with_the_nearest_one(look):
    with pytest.raises(UserError) as error:
        look(task="aaaa0003")
    text = one_line(error)
    assert "unknown task 'aaaa0003'" in text and "did you mean aaaa000" in text
    assert "2 that the checkpoint learnt" in text


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_inspect(InspectConfig(checkpoint=str(tmp_path / "none"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_refused(look, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to folder"):
        look(out=str(tmp_path / "file"))


def test_without_matplotlib_the_extra_is_named_before_anything_is_read(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(UserError) as error:
        run_inspect(InspectConfig(checkpoint=str(tmp_path / "none"), out=str(tmp_path)))
    text = one_line(error)
    assert "got no matplotlib" in text and "pip install '.[plots]'" in text


def command(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tiny_onn.inspect", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "checkpoint is missing"),
        (["checkpoint=x", "taks=a"], "did you mean task?"),
        (["checkpoint=x", "examples=0"], "examples=0"),
        (["checkpoint="], "a run folder, such as checkpoint=runs/x"),
    ],
)
def test_bad_settings_exit_with_2_and_one_line(arguments, part, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and part in line


def test_help_names_every_key(capsys):
    assert load_inspect_config(["--help"]) is None
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m tiny_onn.inspect")
    for key in ("checkpoint", "task", "examples", "out", "threads"):
        assert f"  {key}=" in text
    assert max(map(len, text.splitlines())) <= 100


def test_figures_go_beside_the_checkpoint_by_default():
    config = load_inspect_config(["checkpoint=runs/x", "task=00576224"])
    assert config.out == "runs/x/figures" and config.task == "00576224"
