"""Kernels compile for GPUs that are not here: one workload (`make kernels-compile`: all)."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")


def compile_check(*words):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tiny_onn_kernels.compile_check", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_the_kernels_of_one_workload_compile_within_their_bounds():
    done = compile_check("--arch", "80", "--only", "moe: nano, decoding")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = re.findall(r"^sm_80 +(\w+)", done.stdout, re.M)
    expected = {
        "count_pairs", "place_pairs", "map_tiles", "sum_rows", "hidden_rows", "expert_product",
        "hidden_gradient", "add_parts", "matrix_gradient",
    }  # fmt: skip
    assert set(kernels) == expected
    assert re.search(r"^\d+ compiled, 0 faulty$", done.stdout, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        ("pattern24: base, bfloat16", {"draw_patterns", "differentiate_patterns"}),
        ("relu2_24: base, float16", {"square_and_pack", "differentiate_kept"}),
    ],
)
def test_the_2_4_kernels_neither_spill_nor_use_shared_memory(workload, expected):
    done = compile_check("--arch", "80", "--only", workload)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^sm_80 +(\w+) .* (\d+) +(\d+) +(\d+) +- ", done.stdout, re.M)
    assert {line[0] for line in lines} == expected
    assert all(spilled == shared == "0" for _, _, spilled, shared in lines)
