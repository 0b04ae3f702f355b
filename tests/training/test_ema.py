import pytest
import torch

from tiny_onn.training.ema import WeightEma


def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def test_average_follows_the_recurrence_with_warm_up():
    model = linear()
    ema = WeightEma(model, decay=0.5)
    expected = model.weight.detach().clone()
    for t in range(1, 20):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state_dict()["shadow"]["weight"], expected)


def test_applied_swaps_in_the_average_and_gives_the_weights_back_even_on_error():
    model = linear()
    ema = WeightEma(model, decay=0.9)
    old = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(5.0)
    live = model.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(model.weight, old)
        raise KeyError
    assert torch.equal(model.weight, live)


def test_state_round_trip_is_exact(tmp_path):
    model = linear()
    ema = WeightEma(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema")
    other = WeightEma(linear(1), decay=0.9)
    other.load_state_dict(torch.load(tmp_path / "ema", weights_only=True))
    assert other.updates == 1
    for name, tensor in ema.state_dict()["shadow"].items():
        assert torch.equal(tensor, other.state_dict()["shadow"][name])


def test_decays_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match="decay"):
        WeightEma(linear(), decay=1.0)


def test_rows_that_begin_anew_are_adopted_and_the_others_stay():
    model = linear()
    ema = WeightEma(model, decay=0.9)
    before = ema.state_dict()["shadow"]["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.adopt_rows(model.weight, [1])
    shadow = ema.state_dict()["shadow"]
    assert torch.equal(shadow["weight"][1], model.weight[1])
    assert torch.equal(shadow["weight"][0], before[0])
    assert torch.equal(shadow["bias"], model.bias)
