"""Each of these faults, in the kernels' launches alone, changes outputs or choices."""

import pytest
import torch

from tiny_onn_kernels.nsa import reference
from tiny_onn_kernels.nsa.cases import Case, choices_of
from tiny_onn_kernels.nsa.layout import NsaLayout
from tiny_onn_kernels.nsa.select import overlap_taps

CASE = Case((5, 33), (0, 11), heads=4, kv_heads=2, block=4, stride=2, select_block=4, window=6)


def moved(name, first_by, stop_by):
    """A layout's runs with their ends moved."""
    right = getattr(NsaLayout, name).func

    def ends(self):
        first, stop = right(self)
        first = (first + first_by).clamp(min=0)
        return first, torch.minimum(torch.maximum(stop + stop_by, first), stop.max())

    return NsaLayout, name, property(ends)


def in_select(name, value):
    """A name of the selection's module with another value."""
    from tiny_onn_kernels.nsa import kernel_select

    return kernel_select, name, value


def swapped_gates():
    """The compressed branch with the selected one's gate, and the other way round."""
    from tiny_onn_kernels.nsa import kernel

    def combine(gate_NH3, *branches):
        return reference.combine(gate_NH3[..., [1, 0, 2]], *branches)

    return kernel, "combine", combine


def literal_equation_9(block, stride, select_block):
    first, weights = overlap_taps(block, stride, select_block)
    return first - (select_block // stride - 1), weights


def later_end(module, name, by):
    """An operation of ``module`` that is told of ends which lie ``by`` tokens later."""
    right = getattr(module, name)

    def run(*args):
        ends = {"selected": 7, "attend": 5}[name]
        return right(*args[:ends], args[ends] + by, *args[ends + 1 :])

    return module, name, run


def in_selected(by):
    from tiny_onn_kernels.nsa import kernel

    return later_end(kernel, "selected", by)


MUTATIONS = {
    "selected branch sees the next token": lambda: in_selected(1),
    "selected branch misses its own token": lambda: in_selected(-1),
    "window of w + 1": lambda: moved("window_range", -1, 0),
    "window of w - 1": lambda: moved("window_range", 1, 0),
    "window sees the next token": lambda: moved("window_range", 0, 1),
    "a compressed block too many": lambda: moved("compressed_range", 0, 1),
    "a compressed block too few": lambda: moved("compressed_range", 0, -1),
    "equation 9 as printed": lambda: in_select("overlap_taps", literal_equation_9),
    "gates of two branches swapped": swapped_gates,
    "one local block": lambda: in_select("NUM_LOCAL", 1),
}


def differs(kernel, device):
    """Whether the kernels' outputs or choices are not the reference's."""
    inputs, layout = CASE.inputs(torch.float32, device), CASE.layout(device)
    out, index = inputs.run_with(kernel, layout, CASE.count)
    exact = CASE.inputs(torch.float64)
    for name, tensor in vars(inputs).items():
        setattr(exact, name, tensor.double().cpu())
    want, right = exact.run_with(reference, CASE.layout(), CASE.count)
    if choices_of(index.cpu()) != choices_of(right):
        return True
    return not torch.allclose(out.double().cpu(), want, rtol=1e-4, atol=1e-5)


def test_nothing_differs_without_a_mutation(kernel, device):
    assert not differs(kernel, device)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, kernel, device, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[name]())
    assert differs(kernel, device)
