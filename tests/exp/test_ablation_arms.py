import re

import pytest

from tiny_onn.config.load import load_config
from tiny_onn.errors import UserError
from tiny_onn.sweep.choices import check_cores, check_overrides, choose_arms, choose_seeds


@pytest.fixture
def arms(script):
    return script("ablation", "arms")


def settings(words):
    return dict(word.split("=", 1) for word in words)


def test_every_arm_sets_all_three_switches_and_dense_has_no_sparse_part(arms):
    switches = {"model.attention", "model.ffn", "model.deep_embed.keys"}
    for arm in arms.ARMS.values():
        assert switches <= settings(arm.words).keys()
    assert settings(arms.ARMS["dense"].words) == {
        "model.attention": "full",
        "model.ffn": "dense",
        "model.deep_embed.keys": "[]",
        "model.deep_embed.form": "1x",
    }


def test_single_parts_differ_from_dense_in_one_switch(arms):
    dense = settings(arms.ARMS["dense"].words)
    for name in ("nsa", "dynmoe", "deepembed-task", "deepembed-token"):
        own = settings(arms.ARMS[name].words)
        assert len([key for key in own if own[key] != dense[key]]) == 1, name


def test_arms_without_reset_or_sdl_differ_from_all_in_that_alone(arms):
    whole = settings(arms.ARMS["all"].words)
    assert settings(arms.ARMS["all-no-reset"].words) == whole | {"reset.window_steps": "0"}
    assert settings(arms.ARMS["all-no-sdl"].words) == whole | {
        "moe.sparsity_weight": "0",
        "moe.diversity_weight": "0",
    }


def test_budgets_have_exact_names(arms):
    assert arms.Budget(minutes=10.0).name == "10min"
    assert arms.Budget(minutes=0.5).name == "0.5min"
    assert arms.Budget(tokens=6_000_000).name == "6Mtok"
    assert arms.Budget(tokens=1_234_567).name == "1.234567Mtok"
    assert arms.Budget(tokens=20_000_000).name == "20Mtok"


def test_tokens_become_steps_and_minutes_stay(arms):
    assert arms.Budget(minutes=2.5).word(4096) == "budget.minutes=2.5"
    assert arms.Budget(tokens=8192).word(4096) == "budget.steps=2"
    assert arms.Budget(tokens=8193).word(4096) == "budget.steps=3"


def test_words_of_a_run_hold_out_training_tests_and_take_the_users_settings_last(arms):
    run = arms.Run("all", arms.Budget(minutes=1.0), seed=3, tag="wide")
    words = run.words(["model.attention=full", "moe.experts=16"], 4096)
    given = settings(words)
    assert given["preset"] == "nano" and given["data.holdout"] == "train_tests"
    assert given["model.attention"] == "full" and given["moe.experts"] == "16"
    assert given["model.ffn"] == "dynmoe" and given["seed"] == "3"
    assert given["budget.minutes"] == "1"
    assert given["out"] == "runs/ablation/all-wide_1min_2x1_seed3"
    assert not any("evaluation" in word or "solutions" in word for word in words)


def test_names_of_runs_are_all_different_and_name_the_result(arms, tmp_path):
    budgets = (arms.Budget(minutes=1.0), arms.Budget(tokens=1_000_000))
    runs = [
        arms.Run(arm, budget, seed, tag, threads, jobs)
        for arm in arms.ARMS
        for budget in budgets
        for seed in (0, 1)
        for tag in ("", "x")
        for threads, jobs in ((2, 1), (1, 1), (1, 2))
    ]
    assert len({run.name for run in runs}) == len(runs)
    run = arms.Run("nsa", budgets[0], 2)
    assert run.result_path(tmp_path) == tmp_path / "ablation_nsa_1min_2x1_seed2.json"


def test_a_run_has_the_threads_it_is_given(arms):
    run = arms.Run("all", arms.Budget(minutes=1.0), 0, threads=1, jobs=2)
    assert settings(run.words([], 4096))["trainer.threads"] == "1"


@pytest.mark.parametrize(("threads", "jobs", "part"), [(0, 1, "--threads 0"), (1, -1, "--jobs -1")])
def test_there_is_a_thread_and_a_job(threads, jobs, part):
    with pytest.raises(UserError, match=part):
        check_cores(threads, jobs, False, cores=2)


def test_runs_that_would_share_a_core_are_refused_under_minutes_only():
    minutes, tokens = True, False
    check_cores(2, 1, minutes, cores=2)
    check_cores(1, 2, minutes, cores=2)
    check_cores(2, 2, tokens, cores=2)
    with pytest.raises(UserError, match="4 threads; expected at most the 2 cores"):
        check_cores(2, 2, minutes, cores=2)


def test_arms_are_chosen_in_the_order_of_the_table(arms):
    assert choose_arms("all, dense", arms.ARMS) == ["dense", "all"]


@pytest.mark.parametrize(
    ("text", "words"), [("densee", "did you mean dense?"), (" ,", "got no arm"), ("", "got no arm")]
)
def test_unknown_arms_are_refused(arms, text, words):
    with pytest.raises(UserError, match=re.escape(words)):
        choose_arms(text, arms.ARMS)


def test_seeds_are_whole_numbers_each_once():
    assert choose_seeds("2,0, 2") == [2, 0]
    for text in ("", "-1", "0.5", "x", "0,,y"):
        with pytest.raises(UserError, match="whole numbers"):
            choose_seeds(text)


def test_a_budget_is_one_positive_number(arms):
    assert arms.choose_budget(10.0, None) == arms.Budget(minutes=10.0)
    assert arms.choose_budget(None, 3e6) == arms.Budget(tokens=3_000_000)
    for minutes, tokens in ((0.0, None), (float("nan"), None), (float("inf"), None), (None, -1.0)):
        with pytest.raises(UserError, match="above 0"):
            arms.choose_budget(minutes, tokens)
    with pytest.raises(UserError, match="whole number"):
        arms.choose_budget(None, 0.5)


@pytest.mark.parametrize(
    ("words", "tag", "part"),
    [
        (["moe.experts=4"], "", "without --tag"),
        ([], "x", "--tag x alone"),
        (["moe.experts=4"], "a_b", "letters, digits"),
        (["budget.minutes=3"], "x", "budget.minutes=3"),
        (["seed=4"], "x", "seed=4"),
        (["trainer.threads=4"], "x", "trainer.threads=4"),
        (["data.holdout=none"], "x", "data.holdout=none"),
    ],
)
def test_settings_that_would_change_the_experiment_are_refused(arms, words, tag, part):
    with pytest.raises(UserError, match=re.escape(part)) as error:
        check_overrides(words, tag, arms.OWN_KEYS)
    assert "\n" not in str(error.value)


def test_other_settings_are_accepted_under_a_tag(arms):
    check_overrides([], "", arms.OWN_KEYS)
    check_overrides(["moe.experts=4", "seedling=1"], "e4", arms.OWN_KEYS)


def test_all_is_the_network_that_trains_by_default(arms):
    words = arms.ARMS["all"].words
    arm = load_config(["preset=nano", "network=dense", *words])
    default = load_config(["preset=nano"])
    for part in ("model", "nsa", "moe", "reset", "optim"):
        assert getattr(arm, part) == getattr(default, part)
