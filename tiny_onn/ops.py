"""Decides once, when a model is built, which implementation of each operation runs.

``auto`` picks the fastest that the device has and logs it; a name that cannot run here raises
BackendUnavailable with the remedy. Nothing falls back per call. Kernels of the sparse paths
(package ``tiny_onn_kernels``) are resolved here too, and imported nowhere else.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from tiny_onn.errors import BackendUnavailable
from tiny_onn_kernels.break_even import loses
from tiny_onn_kernels.moe import reference as moe_reference
from tiny_onn_kernels.nsa import reference as nsa_reference
from tiny_onn_kernels.pattern24 import noise
from tiny_onn_kernels.relu2_24 import reference as relu2_24_reference

log = logging.getLogger("tiny_onn")

ATTENTION_BACKENDS = ("reference", "sdpa", "varlen", "flash")
EXPERT_BACKENDS = ("loop", "grouped_mm", "triton")
NSA_BACKENDS = ("reference", "triton")
SPARSE24_BACKENDS = ("torch", "triton")
OLDEST_CUDA = (8, 0)
"""Compute capability that the Triton kernels are compiled for, at least: Ampere."""

nsa = nsa_reference
"""NSA's layouts, phi and gates, and its branches in PyTorch, on every device; the back-end chosen
by :func:`resolve_nsa` has the same names."""

relu2_24 = relu2_24_reference
"""What :func:`relu2_24_kernels` packs: its layout, unpacked, and reordered for CUTLASS."""


def _has_torch_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


HALF_PRECISION_ONLY = ("varlen", "flash")


def resolve_attention(backend: str, device: torch.device | str, precision: str = "bf16") -> str:
    """Name of the attention back-end for ``device``.

    Args:
        backend: "auto" or one of ATTENTION_BACKENDS.
        device: where the model will run.
        precision: "bf16" or "fp32": the variable-length kernels compute in half precision only.

    Raises:
        BackendUnavailable: an explicit choice that cannot run on ``device``.
    """
    device = torch.device(device)
    if backend == "auto":
        if device.type == "cuda" and precision != "fp32":
            chosen = "flash" if _has_flash() else "varlen" if _has_torch_varlen() else "sdpa"
        else:
            chosen = "sdpa"
        log.info("ops: attention=%s (auto, %s, %s)", chosen, device.type, precision)
        return chosen
    if backend in HALF_PRECISION_ONLY and precision == "fp32":
        raise BackendUnavailable(
            f"ops.backend={backend} computes in half precision, got precision fp32; "
            "use precision bf16, or ops.backend=auto or sdpa"
        )
    if backend in HALF_PRECISION_ONLY and device.type != "cuda":
        raise BackendUnavailable(
            f"ops.backend={backend} needs a CUDA device, got {device.type}; "
            "use ops.backend=auto, sdpa or reference"
        )
    if backend == "flash" and not _has_flash():
        raise BackendUnavailable(
            "ops.backend=flash needs the package flash-attn, which is not installed; "
            "pip install flash-attn, or use ops.backend=varlen"
        )
    if backend == "varlen" and not _has_torch_varlen():
        raise BackendUnavailable(
            f"ops.backend=varlen needs torch >= 2.10, got {torch.__version__}; "
            "upgrade torch, or use ops.backend=sdpa"
        )
    if backend not in ATTENTION_BACKENDS:
        raise BackendUnavailable(
            f"unknown ops.backend '{backend}'; expected auto or one of {ATTENTION_BACKENDS}"
        )
    log.info("ops: attention=%s (asked for, %s)", backend, device.type)
    return backend


def triton_needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """What our Triton kernels lack on ``device`` in ``dtype``, with the remedy; None: nothing.

    On a CPU they run only through Triton's interpreter, for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed; pip install 'triton>=3.6'"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return None
    if dtype.itemsize > 4:
        return f"float32 or less, got {dtype}; set precision to bf16 or fp32"
    if device.type != "cuda" or not torch.cuda.is_available():
        found = device.type if device.type != "cuda" else "none"
        return f"a CUDA device, got {found}; set TRITON_INTERPRET=1 (slow, for tests)"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CUDA:
        wanted, got = (".".join(map(str, pair)) for pair in (OLDEST_CUDA, capability))
        return f"compute capability {wanted} (Ampere) or newer, got {got}; use another device"
    return None


def _why(lack: str | None) -> str:
    """What the log says where ``auto`` passes our kernels over on a GPU."""
    return "" if lack is None else f"; our kernels need {lack}"


def resolve_experts(
    backend: str, device: torch.device | str, dtype: torch.dtype, width: int, hidden: int
) -> str:
    """Name of the implementation of the experts for ``device``.

    Args:
        backend: "auto" or one of EXPERT_BACKENDS.
        device: where the model will run.
        dtype: what the experts compute in there.
        width, hidden: residual width and hidden width of one expert.

    Raises:
        BackendUnavailable: an explicit choice that cannot run so.
    """
    device = torch.device(device)
    needs = moe_reference.grouped_mm_needs(dtype, width, hidden)
    if backend == "auto":
        # On CUDA torch's product is a kernel in bfloat16 only.
        fast = device.type != "cuda" or dtype == torch.bfloat16
        chosen = "grouped_mm" if needs is None and fast else "loop"
        lack = triton_needs(device, dtype) if device.type == "cuda" else None
        if device.type == "cuda" and lack is None:
            chosen = "triton"
        log.info("ops: experts=%s (auto, %s, %s%s)", chosen, device.type, dtype, _why(lack))
        return chosen
    if backend not in EXPERT_BACKENDS:
        raise BackendUnavailable(
            f"unknown ops.experts '{backend}'; expected auto or one of {EXPERT_BACKENDS}"
        )
    if backend == "grouped_mm" and needs is not None:
        raise BackendUnavailable(
            f"ops.experts=grouped_mm needs {needs} (model.width and moe.expert_width); "
            "change them, or use ops.experts=auto or loop"
        )
    if backend == "triton" and (lack := triton_needs(device, dtype)) is not None:
        raise BackendUnavailable(
            f"ops.experts=triton needs {lack}, or use ops.experts=auto, grouped_mm or loop"
        )
    log.info("ops: experts=%s (asked for, %s)", backend, device.type)
    return backend


def resolve_nsa(backend: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the implementation of NSA's branches for ``device``.

    Args:
        backend: "auto" or one of NSA_BACKENDS; auto picks Triton on CUDA.
        device: where the model will run.
        dtype: of queries, keys and values in there.

    Raises:
        BackendUnavailable: an explicit choice that cannot run so.
    """
    device = torch.device(device)
    if backend == "auto":
        lack = triton_needs(device, dtype) if device.type == "cuda" else None
        chosen = "triton" if device.type == "cuda" and lack is None else "reference"
        log.info("ops: nsa=%s (auto, %s, %s%s)", chosen, device.type, dtype, _why(lack))
        return chosen
    if backend not in NSA_BACKENDS:
        raise BackendUnavailable(
            f"unknown ops.nsa '{backend}'; expected auto or one of {NSA_BACKENDS}"
        )
    needs = triton_needs(device, dtype) if backend == "triton" else None
    if needs is not None:
        raise BackendUnavailable(f"ops.nsa=triton needs {needs}, or use ops.nsa=auto or reference")
    log.info("ops: nsa=%s (asked for, %s)", backend, device.type)
    return backend


def resolve_pattern24(
    backend: str, device: torch.device | str, dtype: torch.dtype, weights: int
) -> str:
    """How 2:4 masks of weights are drawn and applied in training: in PyTorch ("torch") or by our
    kernels, with the same noise.

    Args:
        backend: "auto" or one of SPARSE24_BACKENDS; auto picks ours where measured to win.
        device: where the model will run.
        dtype: of the weights in there.
        weights: of the largest matrix that wears masks.

    Raises:
        BackendUnavailable: an explicit choice that cannot run so.
    """
    return _resolve_sparse24("pattern24", backend, torch.device(device), dtype, weights, None)


def resolve_relu2_24(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    operations: int,
    cannot: str | None = None,
) -> str:
    """How squared ReLU is made 2:4: in PyTorch ("torch") or by our kernels, packed.

    Args:
        backend, device: as for :func:`resolve_pattern24`.
        dtype: of the activations in there.
        operations: of the second product of a training batch, 2 T F C; 0: unknown, or few tokens.
        cannot: what our kernels want of the model's settings, and what was got; None: all is well.

    Raises:
        BackendUnavailable: an explicit choice that cannot run so.
    """
    device = torch.device(device)
    return _resolve_sparse24("relu2_24", backend, device, dtype, operations, cannot)


def _resolve_sparse24(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    cannot: str | None,
) -> str:
    if backend not in ("auto", *SPARSE24_BACKENDS):
        raise BackendUnavailable(
            f"unknown ops.{op} '{backend}'; expected auto or one of {SPARSE24_BACKENDS}"
        )
    if backend == "torch":
        log.info("ops: %s=torch (asked for, %s)", op, device.type)
        return backend
    lack = cannot or triton_needs(device, dtype)
    if backend == "auto":
        if device.type != "cuda":
            lack = "our kernels run on CUDA"
        elif lack is None:
            lack = loses(op, torch.cuda.get_device_capability(device), size, dtype)
        else:
            lack = f"our kernels need {lack}"
        chosen = "triton" if lack is None else "torch"
        log.info("ops: %s=%s (auto, %s; %s)", op, chosen, device.type, lack or "measured to win")
        return chosen
    if lack is not None:
        raise BackendUnavailable(f"ops.{op}=triton needs {lack}, or use ops.{op}=auto or torch")
    log.info("ops: %s=triton (asked for, %s)", op, device.type)
    return backend


def pattern_noise(num_groups: int, key: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(G, 6): the Gumbel noise of a matrix's groups, as our kernels draw it; key: 63 bits."""
    seed, none = (torch.full((), n, dtype=torch.int64, device=device) for n in (key, 0))
    return noise.gumbel(num_groups, seed, none, dtype)


def pattern24_kernels() -> ModuleType:
    """``pattern24`` and ``pattern24_free`` in Triton."""
    from tiny_onn_kernels.pattern24 import kernel

    return kernel


def relu2_24_kernels() -> ModuleType:
    """``relu2_24``, ``relu2_24_dense`` and ``relu2_24_gradient`` in Triton."""
    from tiny_onn_kernels.relu2_24 import kernel

    return kernel


def nsa_branches(backend: str) -> ModuleType:
    """NSA's branches by the back-end that :func:`resolve_nsa` named."""
    if backend == "triton":
        from tiny_onn_kernels.nsa import kernel

        return kernel
    return nsa


def run_experts(
    backend: str,
    x_NC: Tensor,
    mask_NE: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
) -> Tensor:
    """The experts by the back-end that :func:`resolve_experts` named; (N, C)."""
    run = moe_reference.expert_ffn
    if backend == "grouped_mm":
        run = moe_reference.expert_ffn_grouped
    elif backend == "triton":
        from tiny_onn_kernels.moe.kernel import expert_ffn as run  # triton need not be there
    return run(x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF)
