"""Which implementation runs is decided once, loudly; what cannot run says what would."""

import importlib.util
import logging

import pytest
import torch

from tiny_onn import ops
from tiny_onn.errors import BackendUnavailable
from tiny_onn.ops import resolve_experts, resolve_nsa, resolve_pattern24, resolve_relu2_24
from tiny_onn_kernels import break_even

SIZES = (32, 8)
SPARSE24 = {"pattern24": resolve_pattern24, "relu2_24": resolve_relu2_24}
OPS = ["nsa", "experts", *SPARSE24]


def resolve(op, backend, device, dtype):
    """``dtype`` None: the one in which it is measured."""
    if op in SPARSE24:
        dtype = dtype or break_even.MEASURED_IN[op]
        return SPARSE24[op](backend, device, dtype, 1000)
    if op == "nsa":
        return resolve_nsa(backend, device, dtype)
    return resolve_experts(backend, device, dtype, *SIZES)


@pytest.fixture
def machine(monkeypatch):
    """``machine(triton, capability)``: whether triton is installed; of which GPU, None: no GPU."""

    def pretend(triton, capability, interpret=False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")

    return pretend


@pytest.mark.parametrize("op", ["nsa", "experts"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_takes_our_kernels_on_a_gpu_and_says_so(machine, op, dtype, caplog):
    machine(triton=True, capability=(8, 0))
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve(op, "auto", "cuda", dtype) == "triton"
    assert f"ops: {op}=triton (auto, cuda" in caplog.text


@pytest.mark.parametrize(("op", "otherwise"), [("nsa", "reference"), ("experts", "loop")])
def test_auto_takes_torchs_operations_where_ours_cannot_run(machine, op, otherwise, caplog):
    machine(triton=True, capability=(9, 0))
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve(op, "auto", "cpu", torch.float32) != "triton"
    assert f"ops: {op}=" in caplog.text and "(auto, cpu" in caplog.text
    assert resolve(op, "auto", "cuda", torch.float64) == otherwise
    machine(triton=True, capability=(7, 5))
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve(op, "auto", "cuda", torch.float32) == otherwise
    assert "our kernels need compute capability 8.0" in caplog.text
    machine(triton=False, capability=(9, 0))
    assert resolve(op, "auto", "cuda", torch.float32) == otherwise


@pytest.mark.parametrize("op", SPARSE24)
def test_auto_takes_24_kernels_only_where_they_were_measured_to_win(
    machine, op, monkeypatch, caplog
):
    machine(triton=True, capability=(9, 0))
    monkeypatch.delitem(break_even.WINS_FROM, (9, 0), raising=False)
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve(op, "auto", "cuda", torch.bfloat16) == "torch"
        assert resolve(op, "auto", "cpu", torch.float32) == "torch"
        assert resolve(op, "torch", "cuda", torch.bfloat16) == "torch"
    told = f"ops: {op}=torch (auto, cuda; not measured on compute capability 9.0: python exp/bench"
    assert told in caplog.text and f"ops: {op}=torch (auto, cpu; our kernels" in caplog.text
    assert f"ops: {op}=torch (asked for, cuda)" in caplog.text


@pytest.mark.parametrize(
    ("least", "chosen", "why"),
    [
        (1000.0, "triton", "measured to win)"),
        (1001.0, "torch", "measured to win from 1e+03 on, here 1e+03"),
        (None, "torch", "measured to win nowhere, here 1e+03"),
    ],
)
def test_auto_goes_by_the_measured_table(machine, monkeypatch, caplog, least, chosen, why):
    machine(triton=True, capability=(9, 0))
    monkeypatch.setitem(break_even.WINS_FROM, (9, 0), {"relu2_24": least})
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve("relu2_24", "auto", "cuda", None) == chosen
        assert resolve("pattern24", "auto", "cuda", None) == "torch"
    assert why in caplog.text


@pytest.mark.parametrize("op", SPARSE24)
def test_auto_takes_24_kernels_only_in_the_type_they_were_measured_in(
    machine, monkeypatch, op, caplog
):
    machine(triton=True, capability=(8, 0))
    monkeypatch.setitem(break_even.WINS_FROM, (8, 0), {op: 0.0})
    other = {"pattern24": torch.bfloat16, "relu2_24": torch.float32}[op]
    with caplog.at_level(logging.INFO, "tiny_onn"):
        assert resolve(op, "auto", "cuda", None) == "triton"
        assert resolve(op, "auto", "cuda", other) == "torch"
    assert f"measured in {break_even.MEASURED_IN[op]}, here {other}" in caplog.text


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("triton", "capability", "device", "dtype", "needs"),
    [
        (False, (9, 0), "cuda", torch.float32, "the package triton.*pip install"),
        (True, None, "cpu", torch.float32, "a CUDA device, got cpu.*TRITON_INTERPRET=1"),
        (True, None, "cuda", torch.float32, "a CUDA device, got none"),
        (True, (7, 5), "cuda", torch.float32, "compute capability 8.0 .*got 7.5"),
        (True, (9, 0), "cuda", torch.float64, "float32 or less, got torch.float64"),
    ],
)
def test_asking_for_our_kernels_where_they_cannot_run_names_the_remedy(
    machine, op, triton, capability, device, dtype, needs
):
    machine(triton, capability)
    with pytest.raises(BackendUnavailable, match=f"ops.{op}=triton needs {needs}.*auto"):
        resolve(op, "triton", device, dtype)


@pytest.mark.parametrize("op", OPS)
def test_the_interpreter_runs_our_kernels_on_a_cpu(machine, op):
    machine(triton=True, capability=None, interpret=True)
    assert resolve(op, "triton", "cpu", torch.float32) == "triton"


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_is_refused(op):
    with pytest.raises(BackendUnavailable, match=f"unknown ops.{op} 'cuda'"):
        resolve(op, "cuda", "cpu", torch.float32)


def test_the_named_implementation_is_the_one_that_runs(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    from tiny_onn_kernels.moe import kernel as moe_kernel
    from tiny_onn_kernels.nsa import kernel as nsa_kernel

    monkeypatch.setattr(moe_kernel, "expert_ffn", lambda *tensors: tensors)
    assert ops.run_experts("triton", 1, 2, 3, 4, 5) == (1, 2, 3, 4, 5)
    assert ops.nsa_branches("triton") is nsa_kernel
    assert ops.nsa_branches("reference") is ops.nsa
    for kernels in (ops.pattern24_kernels(), ops.relu2_24_kernels()):
        assert kernels.__name__.endswith("24.kernel")
