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
