"""A trained network of 2:4 weights (weights=k24, s_ste, random24) in packed form, for inference.

What is packed is FFNs and experts; everything else stays as it is. ``model.packed`` records what is
needed to build the same network again around the packed tensors (see checkpoint.py).

Shapes: E experts, O rows of a matrix, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.model.experts import Experts
from tiny_onn.model.ffn import ActSparse24MLP, SquaredReLU, SwiGLU
from tiny_onn.model.packed_weights import (
    DTYPES,
    FORMS,
    Form,
    FrozenWeight,
    Packed24,
    PackedExperts,
    PackedLinear,
    SharedBits,
    best_form,
    refuse_device,
)
from tiny_onn.model.tiny_onn import TinyONN
from tiny_onn.sparse.k24_layer import K24Linear, PatternMask
from tiny_onn.sparse.masked_linear import MaskedLinear
from tiny_onn.sparse.semi_structured import SPARSE_BACKENDS, Backend

FORMAT = 1
DENSE = "dense weights, nothing of them is 2:4; train with weights=k24 or s_ste"
ACT24 = "relu2_act24: nothing of its weights is 2:4, its activations are packed per forward"
STACKED = "experts run as stacks of dense matrices (ops.experts)"


@dataclass(frozen=True)
class ConvertedWeight:
    """One matrix of an FFN, or stack of experts' matrices.

    shape: (O, I) or, of all experts under their masks, (E, O, I). form: None where it was not
    packed, ``reason`` says why. weight_bytes: before, unmasked, once where experts share it.
    mask_bytes: of what chose its masks, which is dropped. packed_bytes: after. backend: what
    multiplies it on this device; refused: back-end -> why it does not.
    """

    name: str
    shape: tuple[int, ...]
    weight_bytes: int
    form: Form | None = None
    mask_bytes: int = 0
    packed_bytes: int = 0
    backend: str = "reference"
    refused: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert` did, weight by weight; other_bytes: of all other tensors."""

    weights: tuple[ConvertedWeight, ...]
    other_bytes: int

    @property
    def packed(self) -> tuple[ConvertedWeight, ...]:
        return tuple(w for w in self.weights if w.form is not None)

    @property
    def refused(self) -> tuple[ConvertedWeight, ...]:
        """Those that were left as they were."""
        return tuple(w for w in self.weights if w.form is None)

    @property
    def bytes_before(self) -> int:
        """Of all tensors of the network."""
        return self.other_bytes + sum(w.weight_bytes + w.mask_bytes for w in self.weights)

    @property
    def bytes_after(self) -> int:
        left = sum(w.weight_bytes for w in self.refused)
        return self.other_bytes + left + sum(w.packed_bytes for w in self.packed)


class _Slot(NamedTuple):
    """A masked weight of the network: its name in the state dict, and what makes its masks."""

    name: str
    weight: nn.Parameter
    mask: PatternMask | MaskedLinear

    @property
    def is_linear(self) -> bool:
        return self.name.endswith(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.mask, MaskedLinear):
            return tuple(self.weight.shape)
        experts = () if self.is_linear else (self.mask.agents,)
        return (*experts, self.mask.rows, self.mask.columns)

    @property
    def is_shared(self) -> bool:
        return self.weight.dim() < len(self.shape)

    @property
    def mask_bytes(self) -> int:
        """Of all that is kept to make its masks."""
        if isinstance(self.mask, MaskedLinear):
            return sum(t.nbytes for t in self.mask.buffers())
        return sum(t.nbytes for t in self.mask.state_dict().values())

    def evaluated(self) -> tuple[Tensor, Tensor]:
        """The weight, and bool masks, whose product is what evaluation multiplies with."""
        if isinstance(self.mask, MaskedLinear):
            return self.mask.sparse_weight(), self.mask.mask()
        return self.weight, self.mask.likeliest(self.weight)


def _slots(model: TinyONN) -> Iterator[_Slot]:
    for name, module in model.named_modules():
        if isinstance(module, K24Linear):
            yield _Slot(f"{name}.weight", module.weight, module.pattern)
        elif isinstance(module, MaskedLinear):
            yield _Slot(f"{name}.weight", module.weight, module)
        elif isinstance(module, Experts) and module.patterns():
            yield _Slot(f"{name}.gate_up", module.gate_up, module.gate_up_pattern)
            yield _Slot(f"{name}.down", module.down, module.down_pattern)


def _unpackable(model: TinyONN) -> Iterator[ConvertedWeight]:
    """The weights of FFNs and experts that wear no masks."""
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            continue
        is_ffn = isinstance(module, SwiGLU | SquaredReLU) and not module.masked
        if is_ffn or (isinstance(module, Experts) and not module.patterns()):
            reason = ACT24 if isinstance(module, ActSparse24MLP) else DENSE
            for part, p in module.named_parameters():
                yield ConvertedWeight(f"{name}.{part}", tuple(p.shape), p.nbytes, reason=reason)


def _storage(slot: _Slot, dtype: torch.dtype, form: Form, backend: Backend) -> FrozenWeight:
    wide = slot.weight.dtype
    if slot.is_linear:
        return PackedLinear(slot.shape, dtype, wide, form, backend)
    if form == "bits":
        return SharedBits(slot.shape, dtype, wide)
    return Packed24(slot.shape, dtype, wide, form)


def _install(model: TinyONN, stored: Mapping[str, FrozenWeight], backend: Backend) -> None:
    """Put the packed weights into the places of the masked ones; ``model`` is in evaluation."""
    for name in [n for n, m in model.named_modules() if isinstance(m, K24Linear | MaskedLinear)]:
        _replace(model, name, stored[f"{name}.weight"])
    experts = [n for n, m in model.named_modules() if isinstance(m, Experts)]
    for name in experts:
        fresh = PackedExperts(stored[f"{name}.gate_up"], stored[f"{name}.down"])
        fresh.backend = model.get_submodule(name).backend
        _replace(model, name, fresh)
    model.k24 = None
    model.packed = {
        "format": FORMAT,
        "backend": backend,
        "weights": {
            name: {"form": w.form, "dtype": str(w.stored).removeprefix("torch.")}
            for name, w in stored.items()
        },
    }
    model.eval()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


@torch.no_grad()
def convert(
    model: TinyONN, backend: Backend = "auto", dtype: torch.dtype | None = None
) -> ConvertReport:
    """Pack the masked weights of ``model``, in place, under the masks that evaluation uses.

    It is in evaluation mode afterwards and predicts what it did, to the bit, where values keep
    their type and the reference multiplies; nothing of it can be trained any more. A network
    without masked weights is left as it is: the report says why. On any error too.

    Args:
        backend: reference unpacks to the masked dense weights, once; cutlass and cusparselt take
            what fits their tiles on a CUDA device, the rest is told in the report; auto takes the
            fastest on this device. Experts always run by the reference.
        dtype: of the packed values: float32, bfloat16, float16 or float64; None: their own.

    Raises:
        BackendUnavailable: cutlass or cusparselt, and no CUDA device, or no weight that it takes.
        UserError: an unknown back-end or type, a packed network, NaN, infinities, an overflow of
            ``dtype``, a group with more than two nonzeros: which weight, and where.
    """
    if backend not in get_args(Backend):
        raise UserError(
            f"unknown sparse back-end {backend!r}; expected one of {', '.join(get_args(Backend))}; "
            "use auto"
        )
    if dtype is not None and dtype not in DTYPES.values():
        raise UserError(f"got dtype {dtype}; expected one of {', '.join(DTYPES)}; use bfloat16")
    if model.packed is not None:
        raise UserError(
            "got a packed network to pack; expected one as it was trained; unpack it first, "
            "or convert the checkpoint it was packed from"
        )
    refuse_device(backend, model.head.weight.device)
    stored, rows = {}, []
    for slot in _slots(model):
        kind = dtype or slot.weight.dtype
        weight = _storage(slot, kind, best_form(slot.shape, kind, slot.is_shared), backend)
        try:
            weight.fill(*slot.evaluated())
        except UserError as error:
            raise UserError(f"weight {slot.name}: {error}; nothing was packed") from error
        stored[slot.name] = weight
        rows.append(_report(slot, weight, backend))
    rows += _unpackable(model)
    whole = sum(t.nbytes for t in model.state_dict().values())
    report = ConvertReport(tuple(rows), whole - sum(w.weight_bytes + w.mask_bytes for w in rows))
    if not stored:
        return report
    if backend in SPARSE_BACKENDS and all(row.backend == "reference" for row in rows):
        raise BackendUnavailable(
            f"got backend={backend}, which takes no weight of this network; expected one that it "
            f"does; {rows[0].name}: {rows[0].refused[backend]}"
        )
    _install(model, stored, backend)
    return report


def _report(slot: _Slot, weight: FrozenWeight, backend: Backend) -> ConvertedWeight:
    chosen, refused = "reference", {}
    if isinstance(weight, PackedLinear):
        _, chosen, refused = weight.product()
    elif backend != "reference":
        asked = SPARSE_BACKENDS if backend == "auto" else (backend,)
        refused = dict.fromkeys(asked, STACKED)
    return ConvertedWeight(
        slot.name,
        slot.shape,
        slot.weight.nbytes,
        weight.form,
        mask_bytes=slot.mask_bytes,
        packed_bytes=weight.num_bytes,
        backend=chosen,
        refused=refused,
    )


def build_packed(model: TinyONN, record: Any) -> None:
    """Make ``model``, as it is built to be trained, the packed one of ``record``, all zeros.

    Raises:
        UserError: a record that is none, or of another network.
    """
    slots = list(_slots(model))
    try:
        backend, weights = record["backend"], record["weights"]
        if record["format"] != FORMAT or backend not in get_args(Backend):
            raise ValueError(f"format {record['format']}, backend {backend}")
        if set(weights) != {slot.name for slot in slots}:
            raise ValueError("it is of another network")
        stored = {}
        for slot in slots:
            form, dtype = weights[slot.name]["form"], weights[slot.name]["dtype"]
            fits = form in FORMS and (form != "bits" or slot.is_shared)
            if not fits or dtype not in DTYPES:
                raise ValueError(f"{slot.name}: form {form} of {dtype}")
            stored[slot.name] = _storage(slot, DTYPES[dtype], form, backend)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the record of packed weights is torn ({error!r}); expected what convert wrote; "
            "convert the trained checkpoint again"
        ) from error
    _install(model, stored, backend)


def packed_weights(model: TinyONN) -> dict[str, FrozenWeight]:
    """The packed weights, by the names that they have in a dense network."""
    found: dict[str, FrozenWeight] = {}
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            found[f"{name}.weight" if isinstance(module, PackedLinear) else name] = module
    return found


def unpack(model: TinyONN) -> dict[str, Tensor]:
    """The masked dense weights of a packed network, by the names that they have in a dense one.

    In the type they were packed in: every value bit for bit, but a negative zero, which is zero.

    Raises:
        UserError: a network that is not packed, or damaged codes.
    """
    if model.packed is None:
        raise UserError(
            "got a network that is not packed; expected a packed one; its weights can be read as "
            "they are"
        )
    return {name: weight.unpacked() for name, weight in packed_weights(model).items()}


def dense_state(model: TinyONN) -> dict[str, Tensor]:
    """State dict of the dense network (weights=dense, separate experts) that predicts the same."""
    prefixes = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, FrozenWeight))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
    return kept | unpack(model)
