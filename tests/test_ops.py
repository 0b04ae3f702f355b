"""Which implementation of the experts runs where, and what is said when one cannot."""

import importlib.util
import logging

import pytest
import torch

from tiny_onn import ops
from tiny_onn.errors import BackendUnavailable
from tiny_onn.ops import resolve_experts

SIZES = (32, 8)


@pytest.fixture
def machine(monkeypatch):
    """``machine(triton, capability)``: whether triton is installed; of which GPU, None: no GPU."""

    def pretend(triton, capability, interpret=False):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if triton else None
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")

    return pretend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_takes_our_kernels_on_a_gpu_and_says_so(machine, dtype, caplog):
    machine(triton=True, capability=(8, 0))
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve_experts("auto", "cuda", dtype, *SIZES) == "triton"
    assert "ops: experts=triton (auto, cuda" in caplog.text


def test_auto_takes_torchs_operations_where_ours_cannot_run(machine):
    machine(triton=True, capability=(9, 0))
    assert resolve_experts("auto", "cpu", torch.float32, *SIZES) != "triton"
    assert resolve_experts("auto", "cuda", torch.float64, *SIZES) == "loop"
    machine(triton=True, capability=(7, 5))
    assert resolve_experts("auto", "cuda", torch.float32, *SIZES) == "loop"
    machine(triton=False, capability=(9, 0))
    assert resolve_experts("auto", "cuda", torch.float32, *SIZES) == "loop"


@pytest.mark.parametrize(
    ("triton", "capability", "device", "dtype", "needs"),
    [
        (False, (9, 0), "cuda", torch.float32, "the package triton.*pip install"),
        (True, None, "cpu", torch.float32, "a CUDA device, got cpu"),
        (True, (7, 5), "cuda", torch.float32, "8.0 .*got 7.5"),
        (True, (9, 0), "cuda", torch.float64, "float32 or less, got torch.float64"),
    ],
)
def test_asking_for_our_kernels_where_they_cannot_run_names_the_remedy(
    machine, triton, capability, device, dtype, needs
):
    machine(triton, capability)
    with pytest.raises(BackendUnavailable, match=f"ops.experts=triton needs {needs}.*auto"):
        resolve_experts("triton", device, dtype, *SIZES)


def test_the_interpreter_runs_our_kernels_on_a_cpu_but_not_in_bfloat16(machine):
    machine(triton=True, capability=None, interpret=True)
    assert resolve_experts("triton", "cpu", torch.float32, *SIZES) == "triton"
    with pytest.raises(BackendUnavailable, match="got bfloat16"):
        resolve_experts("triton", "cpu", torch.bfloat16, *SIZES)


def test_the_named_implementation_is_the_one_that_runs(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    from tiny_onn_kernels.moe import kernel

    monkeypatch.setattr(kernel, "expert_ffn", lambda *tensors: tensors)
    assert ops.run_experts("triton", 1, 2, 3, 4, 5) == (1, 2, 3, 4, 5)
