"""exp/k24/arc.py: arms that training takes, what is skipped, what is measured and tabled."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.config.load import load_config
from tiny_onn.config.schema import ModelConfig, MoeConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model
from tiny_onn.model.tiny_onn import build_model


@pytest.fixture
def arc(experiment):
    return experiment("k24", "arc")


@pytest.fixture
def arms(script):
    return script("k24", "arms")


def config_of(arms, name, **budget):
    run = arms.Run(name, arms.Budget(**(budget or {"steps": 50})), seed=1)
    return load_config(run.words([]))


def test_every_trained_arm_is_a_configuration_that_training_takes(arms):
    for name, arm in arms.ARMS.items():
        if arm.pruned_by:
            continue
        config = config_of(arms, name)
        assert config.data.holdout == "train_tests" and config.network == "dense"
        assert config.budget.steps == 50 and config.trainer.log_every_steps == 5
        assert config.seed == 1 and config.model.attention == "full"
        assert not any("solutions" in word for word in arm.words)


def test_arms_of_weights_differ_in_their_weights_alone(arms):
    kinds = {name: config_of(arms, name).model.weights for name in ("dense", "s_ste", "k24")}
    assert kinds == {"dense": "dense", "s_ste": "s_ste", "k24": "k24"}
    words = {n: set(arms.ARMS[n].words) for n in ("dense", "s_ste", "k24", "random")}
    assert all(len(words["dense"] ^ words[name]) == 2 for name in ("s_ste", "k24", "random"))


def test_the_activation_arms_differ_in_when_their_dense_warm_up_ends(arms):
    warm = {n: config_of(arms, n).model.act24.activation_dense_warmup_steps for n in ("relu2",)}
    assert warm["relu2"] > 10**8
    assert config_of(arms, "relu2_act24").model.act24.activation_dense_warmup_steps == 5


def test_words_of_the_user_come_after_the_arms_own(arms):
    run = arms.Run("k24", arms.Budget(steps=10), 0, tag="div0")
    words = run.words(["k24.div_coef=0"])
    assert words.index("k24.div_coef=0") > words.index("model.weights=k24")
    assert words[-1] == "out=runs/k24/k24-div0_10steps_1x1_seed0"


def test_budgets_name_files_and_say_how_often_masks_are_looked_at(arms):
    assert arms.Budget(steps=900).name == "900steps" and arms.Budget(minutes=0.5).name == "0.5min"
    assert arms.Budget(steps=900).observe_steps == 90 and arms.Budget(steps=5).observe_steps == 1
    for minutes, steps in ((0.0, None), (float("nan"), None), (None, 0), (None, -5)):
        with pytest.raises(UserError, match="above 0"):
            arms.choose_budget(minutes, steps)


def test_names_of_parts_stand_for_their_arms(arms):
    assert arms.expand("activations, dense") == "relu2,relu2_act24,dense"


def ffn_bytes(script, arms, name):
    masks = script("k24", "masks")
    config = config_of(arms, name)
    model = build_model(replace(config.model, layers=1), 3, config.moe, config.nsa, config.k24)
    return sum(size for _, size in masks.ffn_weights(model))


def test_bytes_of_the_arms_that_share_are_what_the_experiment_says(script, arms):
    found = {name: ffn_bytes(script, arms, name) for name in arms.SHARING}
    assert found["shared-k24"] == found["experts-bytes"] == found["dense-bytes"] == 184_320
    assert found["experts"] == found["dense-wide"] == 983_040
    assert found["shared-k24-wide"] == pytest.approx(983_040, rel=3e-3)
    assert found["experts-k24"] == 0.5625 * found["experts"]
    assert ffn_bytes(script, arms, "k24") == 0.5625 * ffn_bytes(script, arms, "dense")


def test_runs_with_a_result_are_skipped_unless_asked_for_again(arc):
    runs = arc.plan(["dense", "k24"], [0, 1], arc.Budget(steps=5), "", 1, 1)
    assert [(run.seed, run.arm) for run in runs][:2] == [(0, "dense"), (0, "k24")]
    runs[1].result_path(arc.RESULTS).write_text("{}")
    assert arc.to_do(runs, arc.RESULTS, again=False) == [runs[0], *runs[2:]]
    assert arc.to_do(runs, arc.RESULTS, again=True) == runs


def test_a_failed_run_is_counted_and_what_is_pruned_from_it_too(arc, monkeypatch, tmp_path, capsys):
    script = tmp_path / arc.SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text("import sys\nsys.exit(2 * ('model.weights=dense' in sys.argv))")
    monkeypatch.setattr(arc, "code_changed", lambda *given: False)
    made = SimpleNamespace(
        result_of=lambda run, *given: {"arm": run.arm},
        pruned_result=lambda run, *given: (_ for _ in ()).throw(UserError("no result")),
    )
    monkeypatch.setitem(__import__("sys").modules, "measure", made)
    runs = arc.plan(["dense", "wanda", "k24"], [0], arc.Budget(steps=5), "", 1, 1)
    assert arc.run_all(runs, [], again=False) == 1
    assert [run.result_path(arc.RESULTS).exists() for run in runs] == [False, False, True]
    assert "2 of 3 runs failed" in capsys.readouterr().err


def test_impossible_settings_end_it_before_any_run(arc, monkeypatch):
    monkeypatch.setattr(arc, "begin", lambda *given: pytest.fail("a run was begun"))
    runs = arc.plan(["k24"], [0], arc.Budget(steps=5), "x", 1, 1)
    with pytest.raises(UserError, match="modle"):
        arc.run_all(runs, ["modle.width=3"], again=False)


def result(arm="dense", seed=0, nll=0.5, **changes):
    return {
        "experiment": "k24",
        "arm": arm,
        "tag": "",
        "budget": "50steps",
        "budget_minutes": None,
        "budget_steps": 50,
        "seed": seed,
        "threads": 1,
        "jobs": 2,
        "commit": "abc",
        "device": "2 x CPU",
        "torch": "2.13.0",
        "nll_per_output_token": nll,
        "exact_match": 0.25,
        "num_outputs": 159,
        "num_decoded": 159,
        "tokens": 200_000,
        "steps": 50,
        "train_flops": 2 * 10**15,
        "tokens_per_s": 4000.0,
        "parameters": 1_300_000,
        "ffn_bytes": 483_840,
        "flips": [],
        "masks": [],
        "drops": [],
    } | changes


def test_the_table_tells_arms_apart_and_compares_seed_by_seed(script):
    table = script("k24", "table")
    flips = [{"step": s, "flipped": s / 1000, "from_start": 0.3} for s in (10, 20)]
    masks = [{"step": s, "kappa": 1.0, "tau": 5.0, "agreement": 0.4} for s in (11, 19)]
    found = [
        result(seed=1, nll=0.4),
        result(seed=0, nll=0.6),
        result("k24", seed=0, nll=0.7, flips=flips, masks=masks),
        result("k24", seed=2, nll=0.1, flips=flips, masks=masks),
    ]
    dense, k24 = (dict(zip(table.HEAD, row, strict=True)) for row in table.rows(found))
    assert dense["seeds"] == "0, 1" and dense["hold-out NLL"] == "0.500 (0.400..0.600)"
    assert dense["against dense"] == dense["flips, last"] == ""
    assert dense["s a step"].startswith("1.000") and dense["PFLOP"].startswith("2.00")
    assert k24["against dense"] == "+0.100" and k24["FFN kB"] == "483.8"
    assert k24["flips, last"].startswith("2.00%") and k24["agreement"].startswith("40.0%")
    text = table.render(found)
    assert "| 50steps | K-2:4 | 10   | 1.00% | 30.00%     | 40.0%     | 1.00  | 5.00 |" in text
    assert "no results" in table.render([])


def test_dropped_activations_are_tabled_by_layer_and_step(script):
    measure, table = script("k24", "measure"), script("k24", "table")
    lines = [
        {"step": "20", "loss": "1"},
        *(
            {"step": str(step), "act24/sparse": str(float(step > 20))}
            | {f"act24/nonzero_{i}": "0.4" for i in (0, 1)}
            | {f"act24/dropped_{i}": f"0.{i + 1}" for i in (0, 1)}
            | {f"act24/feature_dropped_{i}": "0.0" for i in (0, 1)}
            for step in (20, 40)
        ),
    ]
    text = table.drop_table({"drops": measure.drop_series(lines)})
    assert "| 20 (dense) | 10.0% of 40.0% | 20.0% of 40.0% |" in text
    assert "| 40         | 10.0% of 40.0% | 20.0% of 40.0% |" in text


def test_a_series_is_thinned_and_keeps_its_last_point(script):
    measure = script("k24", "measure")
    points = [{"step": n} for n in range(101)]
    thin = measure.thinned(points)
    assert thin[-1] == points[-1] and 15 <= len(thin) <= 20
    assert measure.thinned(points[:7]) == points[:7] and measure.thinned([]) == []


KINDS = {
    "k24": (ModelConfig(weights="k24"), MoeConfig()),
    "s_ste": (ModelConfig(weights="s_ste"), MoeConfig()),
    "random24": (ModelConfig(weights="random24"), MoeConfig()),
    "experts": (ModelConfig(weights="k24", ffn="dynmoe"), MoeConfig(expert_weights="shared_k24")),
}
SMALL = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 24}


@pytest.mark.parametrize("kind", KINDS)
def test_flips_are_the_weights_whose_mask_changed_between_snapshots(script, tmp_path, kind):
    masks = script("k24", "masks")
    model, moe = KINDS[kind]
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(**SMALL, weights=model.weights, ffn=model.ffn), 2, moe, k24=K24Config()
    )
    watch = masks.MaskSnapshots(tmp_path, every=5)
    watch.write(model, 0)
    first = masks.evaluation_masks(model)
    assert all(int(mask.sum()) == mask.numel() // 2 for mask in first.values())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ffn." in name:
                p.normal_()
    for batch in (SimpleNamespace(step=s) for s in range(3, 10)):
        watch.on_train_batch_end(None, SimpleNamespace(model=model), None, batch, 0)
    second = masks.evaluation_masks(model)
    changed = sum(int((first[n] != second[n]).sum()) for n in first)
    share = round(changed / sum(m.numel() for m in first.values()), 6)
    assert masks.flips(tmp_path) == [
        {"step": 5, "flipped": share, "from_start": share},
        {"step": 10, "flipped": 0.0, "from_start": share},
    ]
    assert (share == 0) == (kind == "random24")


@pytest.fixture
def trained(script, small_checkpoint, tmp_path):
    """The pruning script and a loaded network of two small tasks."""
    small_checkpoint(tmp_path / "run" / "checkpoint")
    return script("k24", "prune"), load_model(tmp_path / "run")


def test_wanda_reads_learnt_pairs_only(trained, monkeypatch):
    prune, loaded = trained
    read = []
    original = prune.teacher_forced

    def note(model, documents):
        read.extend(documents)
        return original(model, documents)

    monkeypatch.setattr(prune, "teacher_forced", note)
    monkeypatch.setattr(prune, "evaluate_holdout", lambda *given: {"nll_per_token": 1.0})
    prune.measure_pruned(loaded, "wanda")
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    learnt = prune.encode_all(corpus, corpus.examples, loaded.config)
    held = {d.tokens.tobytes() for d in prune.encode_all(corpus, corpus.holdout, loaded.config)}
    assert [d.tokens.tobytes() for d in read] == [d.tokens.tobytes() for d in learnt]
    assert held and not held & {d.tokens.tobytes() for d in read}


def test_pruning_keeps_the_two_that_count_most_of_every_four(trained):
    prune, loaded = trained
    name, matrix = next(iter(prune.ffn_matrices(loaded.model).items()))
    before = matrix.weight.detach().clone()
    norms = {
        n: torch.rand(m.in_features, dtype=torch.float64)
        for n, m in prune.ffn_matrices(loaded.model).items()
    }
    prune.prune(loaded.model, norms)
    value = (before.double().abs() * norms[name]).unflatten(-1, (-1, 4))
    least = value.topk(2, dim=-1).values[..., 1:]
    assert torch.equal(matrix.weight, torch.where((value >= least).flatten(-2), before, 0.0))
    heads = [n for n in prune.ffn_matrices(loaded.model) if "ffn" not in n]
    assert len(norms) == 4 and heads == []


def test_input_norms_are_those_of_the_rows_that_a_matrix_meets(trained):
    prune, loaded = trained
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    documents = prune.encode_all(corpus, corpus.examples, loaded.config)
    rows = {}
    handles = [
        m.register_forward_pre_hook(lambda m, x, n=n: rows.setdefault(n, []).append(x[0].double()))
        for n, m in prune.ffn_matrices(loaded.model).items()
    ]
    norms = prune.input_norms(loaded.model, documents)
    [handle.remove() for handle in handles]
    for name, parts in rows.items():
        assert torch.allclose(norms[name], torch.cat(parts).norm(dim=0))


def test_the_tables_alone_run_nothing(arc, monkeypatch, capsys):
    monkeypatch.setattr(arc, "run_all", lambda *given: pytest.fail("runs were begun"))
    assert arc.main(["--table"]) == 0
    assert capsys.readouterr().out == "no results yet\n"


def test_a_pruned_arm_takes_its_facts_from_dense_and_needs_its_result(script, tmp_path, arms):
    measure = script("k24", "measure")
    run = arms.Run("wanda", arms.Budget(steps=5), 0)
    with pytest.raises(UserError, match="--arms dense,wanda"):
        measure.pruned_result(run, tmp_path, tmp_path)
    assert json.dumps(result())  # what a result file holds can be written
