"""Which implementation runs is decided once, loudly; what cannot run says what would."""

import logging

import pytest
import torch

from tiny_onn import ops
from tiny_onn.errors import BackendUnavailable


def test_auto_picks_the_reference_off_cuda_and_logs_it(caplog):
    with caplog.at_level(logging.INFO, logger="tiny_onn"):
        assert ops.resolve_nsa("auto", "cpu", torch.float32) == "reference"
    assert "nsa=reference (auto, cpu" in caplog.text
    assert ops.nsa_branches("reference") is ops.nsa


def test_auto_picks_triton_on_cuda_where_it_can_run(monkeypatch):
    for lacking, chosen in ((None, "triton"), ("needs something", "reference")):
        monkeypatch.setattr(ops, "_triton_needs", lambda *_, lacking=lacking: lacking)
        assert ops.resolve_nsa("auto", "cuda", torch.bfloat16) == chosen


def test_triton_that_is_not_installed_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install triton, or use ops.nsa=auto"):
        ops.resolve_nsa("triton", "cuda", torch.bfloat16)


def test_triton_without_a_gpu_is_refused_outside_the_interpreter(monkeypatch):
    kernel = pytest.importorskip("tiny_onn_kernels.nsa.kernel", reason="triton is not installed")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    with pytest.raises(BackendUnavailable, match="CUDA device, got cpu.*TRITON_INTERPRET=1"):
        ops.resolve_nsa("triton", "cpu", torch.float32)
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    assert ops.resolve_nsa("triton", "cpu", torch.float32) == "triton"
    assert ops.nsa_branches("triton") is kernel


def test_an_unknown_name_is_refused():
    with pytest.raises(BackendUnavailable, match="unknown ops.nsa 'cuda'"):
        ops.resolve_nsa("cuda", "cpu", torch.float32)
