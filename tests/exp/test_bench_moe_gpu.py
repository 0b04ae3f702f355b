import pytest


@pytest.fixture
def roofline(script):
    return script("bench", "moe_gpu_roofline")


def rounded(work):
    """GFLOP, MB and the bound in us, as the README gives them."""
    return round(work.flops / 1e9, 1), round(work.bytes / 1e6, 1), round(work.bound_us, 1)


def test_kernels_of_64_small_experts_are_bound_as_the_readme_says(roofline):
    sizes = roofline.Sizes(8192, 512, 128, 64, pairs=65536, live=64)
    work = roofline.kernel_work(sizes, saved=True)
    assert {name: rounded(one) for name, one in work.items()} == {
        "hidden_rows": (17.2, 75.5, 17.4),
        "expert_product (down)": (8.6, 92.3, 19.2),
        "sum_rows (y)": (0, 75.5, 15.7),
        "hidden_gradient": (8.6, 100.7, 21.0),
        "matrix_gradient (down)": (8.6, 33.6, 8.7),
        "matrix_gradient (gate_up)": (17.2, 58.7, 17.4),
        "expert_product (dx)": (17.2, 117.4, 24.5),
        "sum_rows (dx)": (0, 75.5, 15.7),
    }
    assert round(roofline.total_us(work.values())) == 140
    assert sum(one.flops for one in work.values()) == roofline.useful_flops(sizes, backward=True)


def test_what_was_not_kept_is_computed_again(roofline):
    sizes = roofline.Sizes(24576, 768, 1536, 8, pairs=49152, live=8)
    work = roofline.kernel_work(sizes, saved=False)
    found = [round(one.bound_us) for one in work.values()]
    assert found == [235, 117, 24, 352, 117, 235, 235, 24]
    again = sum(one.flops for one in work.values()) / roofline.useful_flops(sizes, backward=True)
    assert again == pytest.approx(11 / 9)


def test_the_least_work_by_hand(roofline):
    sizes = roofline.Sizes(tokens=3, width=5, hidden=2, experts=4, pairs=6, live=1)
    # x and y of 15 numbers, 6 weights, 30 numbers of one expert's matrices; a mask of 12 bytes
    assert roofline.least_work(sizes, backward=False) == (6 * 60, 2 * (15 + 15 + 6 + 30) + 12)
    # besides: dy and dx, 12 gradients of weights, those of all four experts' matrices
    more = 2 * (15 + 15 + 12 + 120)
    assert roofline.least_work(sizes, backward=True) == (18 * 60, 2 * 66 + 12 + more)


def test_a_forward_pass_alone_keeps_nothing(roofline):
    sizes = roofline.Sizes(8192, 512, 128, 64, pairs=65536, live=32)
    work = roofline.kernel_work(sizes, saved=True, backward=False)
    assert list(work) == ["hidden_rows", "expert_product (down)", "sum_rows (y)"]
    # x, half of the matrices, h
    assert work["hidden_rows"].bytes == 2 * (8192 * 512 + 32 * 2 * 128 * 512 + 65536 * 128)


def test_a_kernel_launched_twice_a_call_is_told_apart_by_its_place(script):
    profile = script("bench", "moe_gpu_profile")
    call = [("product", 5.0), ("sum", 1.0), ("product", 7.0), ("other", 2.0)]
    slower = [("product", 9.0), ("sum", 1.0), ("product", 7.5), ("other", 4.0)]
    places = {"product": ("down", "dx"), "sum": ("sum (y)", "sum (dx)")}
    assert profile.by_place(call + slower + slower, 3, places) == {
        "down": 9.0,
        "dx": 7.5,
        "sum (all)": 1.0,
        "rest": 3.33,
    }


def test_experts_fire_for_the_shares_asked_for(script):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    arms = script("bench", "moe_gpu_arms")
    skewed_E = arms.shares(64, 8, "zipf")
    assert float(skewed_E.sum()) == pytest.approx(8) and float(skewed_E.max()) == 1
    rest_E = skewed_E[skewed_E < 1]
    assert float(rest_E[0] / rest_E[1]) == pytest.approx(
        ((66 - len(rest_E)) / (65 - len(rest_E))) ** 1.2
    )
    assert arms.shares(4, 2, "dead").tolist() == [1, 0, 1, 0]
    assert arms.shares(4, 1, "even").tolist() == [0.25] * 4


def test_another_batch_never_changes_what_is_kept_for_the_backward_pass(script, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    cases, tiny = script("bench", "moe_gpu_case"), script("bench", "moe_gpu").TINY
    token_bytes = tiny.experts * 2 * tiny.hidden * tiny.dtype.itemsize
    for most, tokens in ((0, 63), (50, 37), (62, 37), (63, 63)):
        monkeypatch.setattr(cases.kernel, "MOST_SAVED_BYTES", most * token_bytes)
        made = cases.Experts(tiny, None, cases.torch.device("cpu"))
        inputs = made._another_batch()
        assert len(inputs.x) == len(inputs.mask) == len(inputs.grad) == tokens
        assert cases.kernel.saves_inner(inputs.x, inputs.gate_up) == made.saved == (most >= 50)


def record(**ms):
    """As the harness writes it: medians by arm, ratios to ours, forward and backward."""
    arms = {
        f"{name}, both": {"status": "timed", "ms": {"median": value}} for name, value in ms.items()
    }
    arms["ScatterMoE, both"] = {"status": "unavailable", "why": "not at hand"}
    ratios = {
        f"{name} / ours, both": {"median": value / ms["ours"], "target": 1.3}
        for name, value in ms.items()
        if name.startswith("grouped_mm")
    }
    return {"arms": arms, "ratios": ratios}


def test_the_goal_is_measured_on_the_faster_grouped_product(script):
    report = script("bench", "moe_gpu_report")
    found = record(**{"ours": 2.0, "grouped_mm": 3.0, "grouped_mm, plain": 2.5, "all experts": 1.0})
    assert report.goal(found, "both") == (1.25, 1.3)
    assert [arm for arm, _ in report.fastest(found, "both")] == [
        "all experts, both",
        "ours, both",
        "grouped_mm, plain, both",
        "grouped_mm, both",
    ]
    assert report.goal(record(ours=2.0), "both") is None
