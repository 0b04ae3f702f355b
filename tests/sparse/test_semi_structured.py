"""Converting a weight to torch's semi-structured tensor: reasons on a CPU, products on a GPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.sparse import semi_structured
from tiny_onn.sparse.mask import apply_mask, topk_mask
from tiny_onn.sparse.mvue import METHODS, inclusion_probability, mvue
from tiny_onn.sparse.packed import pack
from tiny_onn.sparse.semi_structured import SPARSE_BACKENDS, TILES, convert_weight, refusal
from tiny_onn.sparse.transposable import transposable_mask


def sparse(rows, columns, dtype=torch.bfloat16, device="cpu"):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    return apply_mask(weight, topk_mask(weight)).to(dtype).to(device)


def test_without_cuda_auto_takes_the_reference_and_says_why():
    weight = sparse(64, 128)
    converted = convert_weight(weight)
    assert converted.backend == "reference" and converted.weight.data_ptr() == weight.data_ptr()
    assert set(converted.refused) == {"cutlass", "cusparselt"}
    assert all("needs a CUDA device, got cpu" in why for why in converted.refused.values())


def test_an_asked_for_reference_is_the_masked_weight():
    weight = torch.nn.Parameter(sparse(64, 128, torch.float32))
    converted = convert_weight(weight, "reference")
    assert converted.refused == {} and not converted.weight.requires_grad
    assert torch.equal(converted.weight, weight)


@pytest.mark.parametrize(
    ("backend", "weight", "words"),
    [
        ("cutlass", sparse(64, 32), "multiples of 32 x 64, got .64, 32."),
        ("cusparselt", sparse(24, 32), "multiples of 16 x 16, got .24, 32."),
        ("cusparselt", sparse(64, 64, torch.float32), "takes float16, bfloat16, got float32"),
        ("cutlass", sparse(64, 64, torch.float64), "float16, bfloat16, float32, got float64"),
        ("cutlass", sparse(64, 64)[None], "takes matrices"),
        ("cutlass", sparse(64, 64), "needs a CUDA device, got cpu"),
    ],
)
def test_an_explicit_back_end_that_cannot_take_it_is_refused_with_the_reason(
    backend, weight, words
):
    with pytest.raises(BackendUnavailable, match=words) as caught:
        convert_weight(weight, backend)
    assert "\n" not in str(caught.value)
    assert refusal(weight, backend) in convert_weight(weight).refused[backend]


def test_weights_that_are_not_two_in_four_are_refused_by_every_back_end():
    dense, nan = torch.ones(64, 64), sparse(64, 64).clone()
    nan[3, 9] = float("nan")
    for backend in ("auto", "reference", "cutlass"):
        with pytest.raises(UserError, match="1024 groups break 2:4, the first in row 0, group 0"):
            convert_weight(dense, backend)
        with pytest.raises(UserError, match=r"NaN, the first at index \(3, 9\)"):
            convert_weight(nan, backend)
    with pytest.raises(UserError, match="unknown sparse back-end 'fast'; choose auto"):
        convert_weight(sparse(64, 64), "fast")


def test_the_tiles_are_those_that_torch_states():
    kinds = {
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    }
    for backend in SPARSE_BACKENDS:
        for dtype, tile in TILES[backend].items():
            stated = kinds[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert tile == (stated.sparse_min_rows, stated.sparse_min_cols)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_tensor_reads_our_packed_form(dtype):
    weight = sparse(64, 128, dtype)
    packed = pack(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS(
            weight.shape, packed.values, packed.meta, None, None, None
        )
    assert torch.equal(tensor.to_dense(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_products_equal_the_masked_dense_ones(backend, dtype, tokens):
    weight = sparse(128, 256, dtype, "cuda")
    reason = refusal(weight, backend)
    if reason is not None:
        assert "torch cannot run it here" in reason or "no cuSPARSELt" in reason
        pytest.skip(reason)
    converted = convert_weight(weight, backend)
    bias = torch.randn(128, dtype=dtype, device="cuda")
    x = torch.randn(tokens, 256, dtype=dtype, device="cuda")
    for some in (None, bias):
        with torch.inference_mode():
            out = F.linear(x, converted.weight, some)
        expected = F.linear(x.double(), weight.double(), None if some is None else some.double())
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=0.15)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({64: (10, 9, 8), 4096: (100, 50, 60)}, "cutlass"),  # gains least at 64 rows: 1.11, 1.25
        ({64: (10, 11, 90), 4096: (100, 50, 10)}, "reference"),  # they lose when decoding
        ({64: (10, 9.8, 9), 4096: (100, 50, 99)}, "reference"),  # as large as noise
        ({64: (10, 9, 20), 4096: (100, 90, 20)}, "cusparselt"),
    ],
)
def test_auto_takes_sparse_where_it_won_at_few_and_at_many_rows_and_says_what_was_slower(
    monkeypatch, times, chosen
):
    """times: of dense, cuSPARSELt and CUTLASS."""
    names = ("reference", *SPARSE_BACKENDS)
    clock = iter([time for rows in semi_structured.TIMED_TOKENS for time in times[rows]])
    monkeypatch.setattr(semi_structured, "_sparse", lambda weight, backend: weight.clone())
    monkeypatch.setattr(semi_structured, "_seconds", lambda run: run().numel() * 0 + next(clock))
    refused = {"other": "why"}
    found = semi_structured._fastest(
        sparse(64, 64), list(SPARSE_BACKENDS), semi_structured.TIMED_TOKENS, refused
    )
    assert found.backend == chosen
    assert set(found.refused) == {"other", *names[1:]} - {chosen}
    for name in set(SPARSE_BACKENDS) - {chosen}:
        gains = [times[rows][0] / times[rows][names.index(name)] for rows in (64, 4096)]
        told = f"{gains[0]:.2f} and {gains[1]:.2f} times as fast as dense at 64 and 4096 rows"
        assert found.refused[name] == f"{told}, {chosen} was taken"


def test_a_probe_runs_outside_autocast_and_does_not_remember_that_memory_ran_out(monkeypatch):
    errors = [torch.OutOfMemoryError("full"), RuntimeError("sm_90\nmore"), None]

    def pack_or_fail(weight, backend):
        assert not torch.is_autocast_enabled("cpu")
        if (error := errors.pop(0)) is not None:
            raise error
        return weight

    monkeypatch.setattr(semi_structured, "_sparse", pack_or_fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    probe = (torch.device("cpu"), "cutlass", torch.bfloat16)
    semi_structured._fails_on.cache_clear()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(torch.OutOfMemoryError):
                semi_structured._fails_on(*probe)
            for _ in range(2):
                assert semi_structured._fails_on(*probe) == "torch cannot run it here: sm_90"
        assert errors == [None]
        semi_structured._fails_on.cache_clear()
        assert semi_structured._fails_on(*probe) is None
    finally:
        semi_structured._fails_on.cache_clear()


@pytest.mark.gpu
def test_auto_takes_one_and_says_what_was_slower():
    weight = sparse(128, 128, torch.bfloat16, "cuda")
    converted = convert_weight(weight, tokens=(16,))
    assert set(converted.refused) == set(SPARSE_BACKENDS) - {converted.backend}
    assert all(converted.refused.values())


@pytest.mark.gpu
def test_torch_packs_on_the_gpu_what_we_pack():
    weight = sparse(128, 256, torch.bfloat16, "cuda")
    theirs = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
    packed = pack(weight)
    assert torch.equal(packed.values, theirs.packed) and torch.equal(packed.meta, theirs.meta)


@pytest.mark.gpu
def test_masks_and_probabilities_are_those_of_the_cpu():
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (256, 512)).float()
    x[::2] += torch.randn(128, 512)
    assert torch.equal(topk_mask(x.cuda()).cpu(), topk_mask(x))
    assert torch.equal(transposable_mask(x.cuda()).cpu(), transposable_mask(x))
    torch.testing.assert_close(inclusion_probability(x.cuda()).cpu(), inclusion_probability(x))
    generator = torch.Generator("cuda").manual_seed(0)
    for method in METHODS:
        out = mvue(x.cuda(), generator=generator, method=method)
        assert ((out.cpu() != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
        assert out.isfinite().all()
