import math

import torch

from tiny_onn.training.loss_monitor import LossMonitor


def test_the_mean_is_over_the_losses_since_the_last_one():
    monitor = LossMonitor(torch.device("cpu"))
    for step, loss in enumerate([1.0, 2.0, 6.0]):
        monitor.add(step, torch.tensor(loss))
    assert monitor.take_mean() == 3.0
    monitor.add(3, torch.tensor(5.0))
    assert monitor.take_mean() == 5.0
    assert monitor.first_bad() == -1


def test_the_first_step_that_is_not_finite_is_remembered():
    monitor = LossMonitor(torch.device("cpu"))
    for step, loss in enumerate([1.0, math.inf, 2.0, math.nan]):
        monitor.add(step, torch.tensor(loss))
    assert monitor.first_bad() == 1


def test_one_loss_is_told_and_another_must_be_finite():
    monitor = LossMonitor(torch.device("cpu"))
    monitor.add(0, torch.tensor(3.0), told=torch.tensor(1.0))
    monitor.add(1, torch.tensor(math.nan), told=torch.tensor(2.0))
    assert monitor.take_mean() == 1.5 and monitor.first_bad() == 1
