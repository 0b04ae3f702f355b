import torch

from tiny_onn.training.step_seed import seed_step, step_seed


def test_seeds_of_steps_and_processes_differ():
    seeds = {step_seed(s, t, r) for s in range(3) for t in range(50) for r in range(4)}
    assert len(seeds) == 3 * 50 * 4


def test_a_step_draws_the_same_numbers_whatever_was_drawn_before():
    draws = []
    for before in (0, 7):
        torch.rand(before)
        seed_step(torch.device("cpu"), step_seed(0, 5, 0))
        draws.append(torch.rand(4))
    assert torch.equal(*draws)
