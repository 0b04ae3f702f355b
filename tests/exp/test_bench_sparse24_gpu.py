"""What the 2:4 GPU benchmark concludes from its records, and its smoke test on a CPU."""

import pytest


@pytest.fixture
def table(script):
    return script("bench", "sparse24_gpu_report")


def record(question, gflop, drawn=None, squared=None, **ratios):
    found = {f"dense / {name}": {"median": value} for name, value in ratios.items()}
    if drawn is not None:
        found["PyTorch / pattern24"] = {"median": drawn}
    if squared is not None:
        found["PyTorch / relu2_24"] = {"median": squared}
    derived = {"question": question, "gflop": gflop, "weights": 1000 * gflop}
    return {"ratios": found, "derived": derived}


def test_sparse_wins_only_from_where_every_larger_product_won(table):
    records = {
        "tiny": record("activations", 1.0, CUTLASS=1.3),
        "small": record("activations", 10.0, CUTLASS=0.7, cuSPARSELt=0.9),
        "large": record("activations", 100.0, CUTLASS=0.8, cuSPARSELt=1.1),
        "largest": record("activations", 1000.0, cuSPARSELt=1.4),
        "other": record("weights once", 2000.0, cuSPARSELt=0.5),
    }
    said = table.break_even(records, "activations")
    assert said == "activations: sparse wins from 100.0 GFLOP on (large, 1.10x); below, dense"
    assert "use dense" in table.break_even(records, "weights once")
    assert "no sparse product ran" in table.break_even(records, "weights anew")


def test_the_table_that_auto_reads_gets_what_was_measured(table):
    records = {
        "small": record("activations", 10.0, squared=0.7, CUTLASS=1.9),
        "large": record("activations", 100.0, squared=1.1),  # no CUTLASS on this GPU
        "few": record("weights anew", 1.0, drawn=1.5),
    }
    assert table.table_entry(records).endswith("{'pattern24': 1000.0, 'relu2_24': 100000000000.0}")
    records["most"] = record("weights anew", 2.0, drawn=0.9)
    assert "'pattern24': None" in table.table_entry(records)
    assert table.table_entry({"failed": {"status": "failed"}}).endswith(": {}")


def test_a_case_without_a_sparse_arm_says_nothing(table):
    records = {"failed": {"status": "failed"}, "alone": record("activations", 1.0)}
    assert "no sparse product ran" in table.break_even(records, "activations")


def test_the_quick_cases_pass_their_checks_on_a_cpu(script, capsys):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    bench = script("bench", "sparse24_gpu")
    import torch

    cases = bench.make_cases(type("Args", (), {"quick": True}))
    for case in cases:
        work = case.build(torch.device("cpu"))
        assert work.check()["kept"] == 2
        for ratio in {"PyTorch / pattern24", "PyTorch / relu2_24"} & work.ratios.keys():
            assert all(work.arms[name].make()()[1].any() for name in work.ratios[ratio])
        for name, arm in work.arms.items():
            if "CUTLASS" in name or "cuSPARSELt" in name:
                with pytest.raises(bench.Unavailable, match="CUDA"):
                    arm.make()
            else:
                arm.make()()
