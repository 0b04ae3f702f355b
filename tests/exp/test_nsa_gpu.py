"""What NSA's GPU benchmark compares before it times; both GPU benchmarks run a tiny case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_scripts_run_a_tiny_case(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    cases = {"nsa_gpu": "decode paper B=1 48", "moe_gpu": "tiny, exactly 2"}
    env = os.environ | {"OUT": str(tmp_path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = {
        name: subprocess.Popen(
            [sys.executable, REPOSITORY / f"exp/bench/{name}.py", "--quick", "--only", case],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, case in cases.items()
    }
    for name, case in cases.items():
        printed, _ = running[name].communicate(timeout=120)
        assert running[name].returncode == 0, printed
        records = json.loads((tmp_path / f"bench_{name}.json").read_text())["cases"]
        assert records[case]["status"] == "done", printed


def test_packages_come_from_this_checkout_or_the_script_refuses(script, monkeypatch, tmp_path):
    tree = script("bench", "source_tree")
    assert Path(sys.modules["tiny_onn_kernels"].__file__).resolve().is_relative_to(tree.ROOT)
    other = type(sys)("tiny_onn")
    other.__file__ = str(tmp_path / "tiny_onn" / "__init__.py")
    monkeypatch.setitem(sys.modules, "tiny_onn", other)
    with pytest.raises(SystemExit, match="refused: tiny_onn was imported from"):
        tree.take_from_here()


@pytest.fixture
def nsa(script):
    """The script nsa_gpu.py; docs: a tiny document on a CPU."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    module = script("bench", "nsa_gpu")
    torch.manual_seed(0)
    module.docs = module.Documents(module.TINY_ARC, (12,), torch.device("cpu"))
    return module


def test_dense_rivals_must_agree_with_the_first(nsa):
    peers = nsa.Peers(1e-2)
    peers.join("flash", ("out",), [torch.ones(3)])
    peers.join("cudnn", ("out",), [torch.full((3,), 1.001)])
    assert peers.errors == {"cudnn against flash, out": pytest.approx(1e-3, rel=1e-2)}
    with pytest.raises(Exception, match="varlen against flash, out"):
        peers.join("varlen", ("out",), [torch.full((3,), 1.1)])


def test_repeated_heads_give_the_gradients_of_the_heads_that_were_repeated(nsa):
    from nsa_gpu_rivals import packed_results
    from torch.nn.attention import SDPBackend

    docs = nsa.docs
    grouped = nsa.sdpa(docs, SDPBackend.MATH, {})
    groups = docs.setting.heads // docs.setting.kv_heads
    repeated = [t.detach().repeat_interleave(groups, 1) for t in docs.leaves[1:3]]
    leaves = [docs.leaves[0], *(t.requires_grad_() for t in repeated)]

    def forward():
        q, k, v = (t.unflatten(0, (1, 12)).transpose(1, 2) for t in leaves)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    others = packed_results(nsa.Ready(forward, leaves, grouped.grad, grouped.packed), docs)
    for a, b, leaf in zip(packed_results(grouped, docs), others, docs.leaves, strict=False):
        assert a.shape == b.shape and a.shape[0] == len(leaf)
        torch.testing.assert_close(a, b)


def test_both_ways_round_are_compared_and_a_difference_is_wrong(nsa, monkeypatch):
    import nsa_gpu_checks as checks

    index_NKn = nsa.docs.attend()[1]
    found = checks.compare_ways(nsa.docs, index_NKn)
    assert set(found) == {f"keys first, {name}" for name in ("out", "q", "k", "v", "slices")}
    ways = []

    def wrong(q_NHD, k_NKD, v_NKD, *_):
        ways.append(checks.kernel_selected_plan.KEYS_FIRST_SHARE)
        return q_NHD * len(ways) + k_NKD.sum() + v_NKD.sum()

    monkeypatch.setattr(checks.kernel, "selected_attention", wrong)
    with pytest.raises(checks.Wrong, match="keys first against queries first, out"):
        checks.compare_ways(nsa.docs, index_NKn)
    assert ways == [0.0, float("inf")]


def test_what_is_compiled_is_held_against_the_kernels_on_its_own_choice(nsa):
    import nsa_gpu_checks as checks

    docs = nsa.docs
    assert max(nsa.compare_compiled(docs, docs.attend).values()) == 0

    def off():
        out_NHD, index_NKn = docs.attend()
        return 1.1 * out_NHD, index_NKn

    with pytest.raises(checks.Wrong, match="compiled, out"):
        nsa.compare_compiled(docs, off)
