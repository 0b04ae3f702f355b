"""What a step's routing is counted from, and what the log says of it."""

import pytest
import torch

from tiny_onn.losses.sdl import SDLTerms
from tiny_onn.model.dyn_moe import Routing
from tiny_onn.training import routing
from tiny_onn.training.routing import gather_routing
from tiny_onn.training.routing_monitor import RoutingMonitor

E, C = 3, 4


def entry(layer, fires, num_rows, runs=None):
    fires_NE = torch.tensor(fires, dtype=torch.float32, requires_grad=True)
    return Routing(
        layer=layer,
        num_rows=num_rows,
        fires_NE=fires_NE,
        runs_NE=fires_NE.detach() > 0 if runs is None else torch.tensor(runs, dtype=torch.bool),
        gram_EE=torch.eye(E),
        thresholds_E=torch.tensor([0.1, 0.2, 0.6]) + layer,
        inputs_NC=torch.arange(len(fires) * C).view(-1, C).double(),
    )


FIRST = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]  # the last row is filler
SECOND = [[0, 0, 1], [0, 0, 0]]


def test_counts_leave_filler_out_and_add_up_the_rounds_of_a_loop():
    step = gather_routing([entry(0, FIRST, 3), entry(2, SECOND, 2), entry(0, SECOND, 1)])
    assert step.layers == (0, 2)
    assert step.active_LE.tolist() == [[2, 1, 1], [0, 0, 1]]
    assert step.tokens_L.tolist() == [4, 2]
    assert step.none_L.tolist() == [1, 1]
    assert step.pairs_L.tolist() == [4, 1]
    assert step.mean_active_L.tolist() == [1.0, 0.5]
    torch.testing.assert_close(step.thresholds_LE, torch.tensor([[0.1, 0.2, 0.6], [2.1, 2.2, 2.6]]))


def test_a_fallback_is_executed_and_not_counted_as_active():
    runs = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    step = gather_routing([entry(0, FIRST, 3, runs)])
    assert (step.active_LE.sum(), step.pairs_L.sum(), step.none_L.sum()) == (3, 4, 1)


def test_the_mean_has_a_gradient_for_every_real_pair_and_no_other():
    one = entry(0, FIRST, 3)
    gather_routing([one]).mean_active_L.sum().backward()
    assert one.fires_NE.grad.tolist() == [[pytest.approx(1 / 3)] * E] * 3 + [[0.0] * E]


def test_the_processes_gradients_average_to_that_of_one_process(monkeypatch):
    """Without a launcher: the other's counts are added where a collective call would."""
    pooled = entry(0, FIRST[:3] + SECOND, 5)
    halves = entry(0, FIRST, 3), entry(0, SECOND, 2)
    alone = gather_routing([pooled])
    alone.sdl(target=2.0).sparsity.backward()
    monkeypatch.setattr(routing.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(routing.dist, "get_world_size", lambda: 2)
    for mine, other in (halves, halves[::-1]):
        others = routing._count([other]).unsqueeze(0)
        monkeypatch.setattr(routing.dist, "all_reduce", lambda counts, o=others: counts.add_(o))
        both = gather_routing([mine])
        assert torch.equal(both.active_LE, alone.active_LE)
        assert torch.equal(both.mean_active_L, alone.mean_active_L)
        both.sdl(target=2.0).sparsity.backward()
    gradient_NE = torch.cat([halves[0].fires_NE.grad[:3], halves[1].fires_NE.grad]) / 2
    torch.testing.assert_close(gradient_NE, pooled.fires_NE.grad)


def test_samples_are_spread_over_the_real_rows_in_float32():
    step = gather_routing([entry(0, FIRST, 3), entry(1, SECOND, 1)], samples=2)
    assert step.samples_LSC.dtype == torch.float32
    assert step.samples_LSC[:, :, 0].tolist() == [[0.0, 4.0], [0.0, 0.0]]
    assert gather_routing([entry(0, FIRST, 3)]).samples_LSC is None


def test_used_experts_are_those_that_fired():
    one = entry(0, [[1, 1, 0]], 1)
    object.__setattr__(one, "gram_EE", torch.ones(E, E))
    assert float(gather_routing([one]).sdl(target=2.0).diversity) == 1.0
    object.__setattr__(one, "fires_NE", torch.tensor([[1.0, 0.0, 0.0]]))
    assert float(gather_routing([one]).sdl(target=2.0).diversity) == 0.0


def test_the_log_tells_of_the_steps_since_the_last_line():
    monitor = RoutingMonitor()
    assert monitor.take_metrics() == {} and monitor.take_pairs() == 0
    terms = SDLTerms(torch.tensor(1.0), torch.tensor(0.5))
    for sparsity in (1.0, 2.0):
        step = gather_routing([entry(0, FIRST, 3), entry(2, SECOND, 2)]).detached()
        monitor.add(step, terms._replace(sparsity=torch.tensor(sparsity)))
    metrics = monitor.take_metrics()
    assert metrics["moe/active_0"] == 1.0 and metrics["moe/active_2"] == 0.5
    assert metrics["moe/none_0"] == pytest.approx(1 / 3) and metrics["moe/none_2"] == 0.5
    assert metrics["moe/dead_0"] == 1 and metrics["moe/dead_2"] == 2
    assert metrics["moe/load_0_0"] == pytest.approx(2 / 3) and metrics["moe/load_2_2"] == 0.5
    assert metrics["moe/threshold_mean_0"] == pytest.approx(0.3)
    assert metrics["moe/threshold_max_2"] == pytest.approx(2.6)
    assert (metrics["sdl/sparsity"], metrics["sdl/diversity"]) == (1.5, 0.5)
    assert monitor.take_metrics() == {}
    assert monitor.take_pairs() == 2 * (3 + 1) and monitor.take_pairs() == 0


def test_the_log_says_nothing_of_an_sdl_that_is_off():
    monitor = RoutingMonitor()
    monitor.add(gather_routing([entry(0, FIRST, 3)]).detached(), None)
    metrics = monitor.take_metrics()
    assert "moe/active_0" in metrics and not any(name.startswith("sdl/") for name in metrics)
