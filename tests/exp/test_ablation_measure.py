import json

import pytest

from tiny_onn.sweep.run_files import steady_rate


@pytest.fixture
def measure(script):
    return script("ablation", "measure")


def write_log(folder, version, text):
    part = folder / "logs" / f"version_{version}"
    part.mkdir(parents=True)
    (part / "metrics.csv").write_text(text)


def test_rates_and_resets_come_from_all_parts_of_the_log_in_their_order(measure, tmp_path):
    head = "moe/resets_0,moe/resets_1,step,tokens_per_s\n"
    write_log(tmp_path, 10, f"{head}4,1,60,300\n")
    write_log(tmp_path, 2, f"{head}1,0,20,100\n3,,40,200\n")
    lines = measure.log_lines(tmp_path)
    assert [line["step"] for line in lines] == ["20", "40", "60"]
    assert steady_rate(lines) == 200.0
    assert measure.total_resets(lines) == 5


def test_a_dense_run_has_no_resets_and_an_unlogged_one_no_rate(measure, tmp_path):
    assert measure.log_lines(tmp_path) == []
    assert steady_rate([]) is None
    write_log(tmp_path, 0, "step,tokens_per_s\n20,100\n")
    assert measure.total_resets(measure.log_lines(tmp_path)) is None


def test_a_dense_result_has_all_the_facts_and_no_experts(
    measure, script, tmp_path, monkeypatch, small_checkpoint
):
    arms = script("ablation", "arms")
    run = arms.Run("dense", arms.Budget(minutes=1.0), seed=0, threads=1, jobs=2)
    folder = tmp_path / "runs" / "ablation" / run.name
    loaded = small_checkpoint(folder / "checkpoint")
    write_log(folder, 0, "step,tokens_per_s\n20,1000\n")
    holdout = {
        "nll_per_token": 0.7,
        "token_accuracy": 0.6,
        "exact_match": 0.1,
        "num_outputs": 3,
        "num_decoded": 3,
    }
    facts = {
        "holdout": holdout,
        "loss": 0.9,
        "minutes": 1.0,
        "commit": "abc",
        "device": "CPU",
        "threads": 1,
        "torch": "2.13.0",
        "tokens": 5000,
        "steps": 20,
        "train_flops": 10**9,
        "seconds": 60.0,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "table_parameters": 320,
    }
    (folder / "metrics.json").write_text(json.dumps(facts))
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure.torch, "set_num_threads", lambda threads: None)
    found = measure.result_of(run, run.words([], 100), [], seconds=66.0, changed=True)
    assert found["commit"] == "abc-dirty"
    assert found["minutes_command"] == 1.1 and found["tokens_per_s"] == 1000.0
    assert found["nll_per_output_token"] == 0.7 and found["exact_match"] == 0.1
    assert found["experts"] is found["dead_experts"] is found["mean_active_experts"] is None
    assert 0 < found["active_parameters"] < found["parameters"]
    assert str(tmp_path) not in json.dumps(found)
    row = script("ablation", "table").rows([found])
    assert row[0][:4] == ["1min", "1 x 2", "dense", "0"]
