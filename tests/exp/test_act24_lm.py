"""The small language model of exp/act24_lm: its text, its arms, its files and tables."""

import json

import torch

from tiny_onn.model.ffn import act24_layers


def test_the_text_is_split_by_topics_and_nothing_is_in_both_parts(script):
    text = script("act24_lm", "text")
    found = text.load_text()
    assert len(found.train_N) > 300_000 and len(found.validation_N) > 20_000
    assert int(found.train_N.max()) < text.VOCAB_SIZE and int(found.train_N.min()) >= 0
    assert found.sha256 == text.load_text().sha256
    plain = [
        "".join((text.PLAIN + ["?"])[i] for i in part.tolist())
        for part in (found.train_N, found.validation_N)
    ]
    lines = [{line for line in part.split("\n") if len(line) > 60} for part in plain]
    assert not lines[0] & lines[1] and len(lines[1]) > 200


def test_a_window_asks_for_the_next_symbol(script):
    text = script("act24_lm", "text")
    symbols = torch.arange(20)
    inputs, targets = text.windows(symbols, torch.tensor([0, 7]), 5)
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert torch.equal(targets, inputs + 1)


def test_arms_have_equal_parameters_and_differ_in_one_thing(script):
    char_lm = script("act24_lm", "char_lm")
    arms = script("act24_lm", "arms")
    sizes = {}
    for name, arm in arms.ARMS.items():
        model = char_lm.CharLM(96, arm.ffn, arm.config(100), width=128)
        sizes[name] = sum(p.numel() for p in model.parameters())
        assert len(act24_layers(model)) == (4 if arm.ffn == "relu2_act24" else 0)
    assert max(sizes.values()) / min(sizes.values()) < 1.01
    own = arms.ARMS["act24"].config(100)
    assert own.activation_dense_warmup_steps == 10
    for name in list(arms.ARMS)[3:]:
        changed = [k for k, v in vars(arms.ARMS[name].config(100)).items() if v != getattr(own, k)]
        assert len(changed) == (2 if name == "split100-no-permutation" else 1), name


def test_the_model_is_causal(script):
    char_lm = script("act24_lm", "char_lm")
    arms = script("act24_lm", "arms")
    torch.manual_seed(0)
    model = char_lm.CharLM(10, "relu2_act24", arms.ARMS["no-warmup"].config(10), width=32, layers=2)
    torch.nn.init.normal_(model.head.weight)
    symbols = torch.randint(10, (2, 12))
    changed = symbols.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 10
    before, after = model.eval()(symbols), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_runs_are_written_kept_and_put_into_tables(experiment, monkeypatch, capsys):
    run = experiment("act24_lm", "run")
    train_lm = run.train.__globals__
    whole = run.load_text()
    small = type(whole)(whole.train_N[:3000], whole.validation_N[:600], "0")
    monkeypatch.setattr(run, "load_text", lambda: small)
    monkeypatch.setitem(train_lm, "CONTEXT", 16)
    monkeypatch.setitem(train_lm, "LOG_EVERY", 2)
    run.run_all(["relu2", "act24"], [0, 1], 2)
    found = json.loads(run.result_path("act24", 1, 2).read_text())
    assert found["seed"] == 1 and len(found["drops"]) == 1 and found["validation_loss"] > 0
    assert found["fidelity"]["naive, 95%"]["dX"] == 0.0
    assert found["fidelity"]["dX from the feature-wise operand, 95%"]["dX"] > 0
    monkeypatch.setattr(run, "train", None)  # nothing is trained twice
    run.run_all(["relu2", "act24"], [0, 1], 2)
    assert "there already" in capsys.readouterr().out
    results = run.load_results(2)
    assert list(results) == ["relu2", "act24"]
    lines = run.table(results).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| dense ReLU² | 2 |")
    assert "naive, 100%" in run.fidelity_table(results["act24"])
    assert run.layer_table(results["act24"][0]).count("layer") == 4
