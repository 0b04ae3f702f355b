"""2:4 weights of a trained network as they are stored, and multiplied, once nothing is learnt.

Of a mask only its places are left: no alpha, no activity, no schedule. Two forms:

* :class:`Packed24`, half the values and a 4-bit code a group of four (tiny_onn/sparse/packed.py):
  s / 2 + 1 / 8 bytes a weight of s bytes, for every expert.
* :class:`SharedBits`, one weight that E experts share, once and dense (their masks together may
  keep all of it, so it is not 2:4 itself), and a bit a weight and expert: s + E / 8 bytes. A bit is
  what a code costs too, so from two experts on this is the smaller form.

Shapes: N rows of input, E experts, O rows of a matrix, I columns.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.model.experts import Experts
from tiny_onn.sparse import k24
from tiny_onn.sparse.bits import pack_bits, unpack_bits
from tiny_onn.sparse.mask import TWO_FOUR
from tiny_onn.sparse.packed import (
    HARDWARE,
    PackedTensor,
    pack,
    packed_bytes,
    refuse_violations,
    unpack,
)
from tiny_onn.sparse.pattern import refuse_nonfinite
from tiny_onn.sparse.semi_structured import (
    SPARSE_BACKENDS,
    Backend,
    Converted,
    convert_weight,
    refusal,
)

log = logging.getLogger("tiny_onn")

Form = Literal["hardware", "rows", "bits"]
"""The two layouts of :class:`Packed24`, and :class:`SharedBits`."""
FORMS: tuple[Form, ...] = ("hardware", "rows", "bits")
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
"""What weights may be stored in, by name."""
NO_ROOM = "float16 has no room for the activations it multiplies; convert with dtype=bf16"


def best_form(shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> Form:
    """How masked weights (O, I) or (E, O, I) take the fewest bytes; ``shared``: by E experts.

    ``hardware`` where sparse tensor cores have such a type and tile: the same bytes as ``rows``.
    """
    rows, columns = shape[-2:]
    if shared:
        stack = packed_bytes((*shape[:-1], columns + -columns % 8), dtype)
        if rows * columns * dtype.itemsize + shape[0] * rows * -(-columns // 8) <= stack:
            return "bits"
    tile = HARDWARE.get((dtype, (2, 4)))
    fits = tile is not None and rows % tile[0] == 0 and columns % tile[1] == 0
    return "hardware" if fits else "rows"


class FrozenWeight(nn.Module):
    """Masked weights (O, I), or (E, O, I), in buffers; not to be trained.

    Args:
        shape: of the masked weights.
        dtype: in which they are stored.
        wide: in which they are multiplied, at least: what they had when they were trained.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype) -> None:
        super().__init__()
        self.shape, self.stored, self.wide = shape, dtype, wide
        self._dense: Tensor | None = None

    def unpacked(self) -> Tensor:
        """The masked weights in the stored type."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The same in the type that products take; unpacked once, then kept."""
        if self._dense is None:
            found = self.unpacked()
            self._dense = found.to(torch.promote_types(found.dtype, self.wide))
        return self._dense

    @property
    def num_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers())

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """Of the parameter that wore the masks."""
        return self.shape

    def _cast(self, weight: Tensor) -> Tensor:
        """``weight`` in the stored type.

        Raises:
            UserError: numbers that the type has no room for.
        """
        stored = weight.detach().to(self.stored)
        refuse_nonfinite(stored, TWO_FOUR, f"as {str(self.stored).removeprefix('torch.')} it")
        return stored

    def _forget(self) -> None:
        self._dense = None

    def _apply(self, *args: Any, **kwargs: Any) -> FrozenWeight:
        self._forget()  # of another device or type
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> FrozenWeight:
        """Raises:
        UserError: asked to learn.
        """
        if mode:
            raise UserError(
                "got a packed network to train, which has no masks to learn; expected evaluation; "
                "train from the checkpoint that it was packed from"
            )
        return super().train(mode)


class Packed24(FrozenWeight):
    """Buffers ``values`` and ``meta`` of a :class:`PackedTensor`.

    A row of 8 k + 4 columns, which the layout ``rows`` does not hold, has four zeros at its end.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype, form: Form
    ) -> None:
        super().__init__(shape, dtype, wide)
        self.form = form
        *lead, columns = shape
        padded = columns + -columns % 8
        meta = (torch.uint8, padded // 8) if form == "rows" else (torch.int16, padded // 16)
        self.register_buffer("values", torch.zeros(*lead, padded // 2, dtype=dtype))
        self.register_buffer("meta", torch.zeros(*lead, meta[1], dtype=meta[0]))

    def fill(self, weight: Tensor, mask_EOI: Tensor) -> None:
        """Pack ``weight`` (O, I) or (E, O, I) under its masks.

        Raises:
            UserError: NaN, infinities, an overflow, a group with more than two nonzeros.
        """
        refuse_nonfinite(weight, TWO_FOUR, "it")
        masked = self._cast(k24.masked(weight, mask_EOI).reshape(self.shape))
        padded = F.pad(masked, (0, -self.shape[-1] % 8))
        self.values, self.meta = pack(padded, layout=self.form)

    def unpacked(self) -> Tensor:
        return unpack(PackedTensor(self.values, self.meta))[..., : self.shape[-1]].contiguous()


class SharedBits(FrozenWeight):
    """Buffers ``weight`` (O, I) and ``bits`` (E, O, ceil(I / 8)), a mask an expert."""

    form: Form = "bits"

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype) -> None:
        super().__init__(shape, dtype, wide)
        experts, rows, columns = shape
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=dtype))
        self.register_buffer(
            "bits", torch.zeros(experts, rows, -(-columns // 8), dtype=torch.uint8)
        )

    @property
    def trained_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    def fill(self, weight: Tensor, mask_EOI: Tensor) -> None:
        """What no expert keeps is stored as zero.

        Raises:
            UserError: NaN, infinities, an overflow, a group of which an expert keeps more than two.
        """
        refuse_nonfinite(weight, TWO_FOUR, "it")
        refuse_violations(k24.masked(weight.detach(), mask_EOI), TWO_FOUR)
        kept = torch.where(mask_EOI.any(dim=0), weight.detach(), 0.0)
        self.weight, self.bits = self._cast(kept), pack_bits(mask_EOI)

    def unpacked(self) -> Tensor:
        """Raises:
        UserError: damaged bits, by which a group keeps more than two.
        """
        masked = k24.masked(self.weight, unpack_bits(self.bits, self.shape[-1]))
        refuse_violations(masked, TWO_FOUR)
        return masked


class PackedLinear(Packed24):
    """A Linear without bias: (N, I) -> (N, O), by the reference or by sparse tensor cores.

    ``backend`` is what was asked for; which one multiplies is settled once a device: see
    :meth:`product`. Sparse tensor cores multiply in the stored type; under ``auto`` they are not
    given what is wider.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        wide: torch.dtype,
        form: Form,
        backend: Backend = "reference",
    ) -> None:
        super().__init__(shape, dtype, wide, form)
        self.backend = backend
        self._product: Converted | None = None

    def product(self) -> Converted:
        """The weight as it is multiplied here, by which back-end, and why not by others.

        Raises:
            BackendUnavailable: a back-end asked for by name, and no CUDA device.
        """
        if self._product is None:
            refuse_device(self.backend, self.values.device)
            refused = {}
            if self.backend != "reference" and self.stored == torch.float16:
                asked = SPARSE_BACKENDS if self.backend == "auto" else (self.backend,)
                refused = dict.fromkeys(asked, NO_ROOM)
            elif self.backend in SPARSE_BACKENDS:
                why = refusal(self.unpacked(), self.backend)
                refused = {} if why is None else {self.backend: why}
            found = Converted(self.dense(), "reference", refused)
            if self.backend != "reference" and not refused:
                found = convert_weight(self.unpacked(), self.backend)
            if found.backend == "reference":
                found = found._replace(weight=self.dense())
            else:
                self._dense = None
            self._product = found
        return self._product

    def forward(self, x_NI: Tensor) -> Tensor:
        weight, backend, _ = self.product()
        if backend == "reference":
            return F.linear(x_NI, weight)
        device = x_NI.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_NI.dtype
        if self.backend == "auto" and dtype.itemsize > self.stored.itemsize:
            return F.linear(x_NI, self.dense())
        with torch.autocast(device, enabled=False):  # torch cannot cast its sparse tensors
            y_NO = F.linear(x_NI.to(self.stored), weight)
        return y_NO.to(dtype)

    def _forget(self) -> None:
        super()._forget()
        self._product = None


class PackedExperts(Experts):
    """:class:`Experts` in evaluation; their matrices are unpacked, for experts run as stacks."""

    def __init__(self, gate_up: FrozenWeight, down: FrozenWeight) -> None:
        nn.Module.__init__(self)
        self.gate_up, self.down = gate_up, down
        self.gate_up_pattern = self.down_pattern = None
        self.shared = False
        self.backend = "loop"

    def matrices(self, overlaps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return self.gate_up.dense(), self.down.dense()


def settle_products(model: nn.Module) -> None:
    """Find out, and log, by what every packed Linear of ``model`` multiplies where it is now.

    Raises:
        BackendUnavailable: a back-end that was asked for by name takes none of them here.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    products = [layer.product() for layer in layers]
    for backend, count in Counter(product.backend for product in products).items():
        log.info("sparse: %d packed weights multiplied by %s", count, backend)
    named = {layer.backend for layer in layers} & set(SPARSE_BACKENDS)
    reasons = Counter(why for p in products for name, why in p.refused.items() if name in named)
    if named and all(product.backend == "reference" for product in products):
        raise BackendUnavailable(
            f"got a network packed for backend={', '.join(named)}, which takes no weight of it "
            f"here ({next(iter(reasons))}); expected the device it was packed on; convert the "
            "model with backend=auto"
        )
    for why, count in reasons.items():
        log.warning("sparse: %d packed weights not by %s: %s", count, ", ".join(named), why)


def refuse_device(backend: str, device: torch.device | str) -> None:
    """Raises:
    BackendUnavailable: ``backend`` needs CUDA, and ``device`` is none.
    """
    kind = torch.device(device).type
    if backend in SPARSE_BACKENDS and kind != "cuda":
        raise BackendUnavailable(
            f"got backend={backend}, which needs a CUDA device, on {kind}; expected reference or "
            "auto there; convert the model with backend=auto"
        )
