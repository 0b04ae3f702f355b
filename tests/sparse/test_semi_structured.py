"""Converting a weight to torch's semi-structured tensor: reasons on a CPU, products on a GPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from tiny_onn.errors import BackendUnavailable, UserError
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


@pytest.mark.gpu
def test_auto_takes_what_it_timed_fastest_and_says_what_was_slower():
    weight = sparse(128, 128, torch.bfloat16, "cuda")
    converted = convert_weight(weight, tokens=16)
    assert converted.backend not in converted.refused
    assert {*converted.refused, converted.backend, "reference"} >= set(SPARSE_BACKENDS)
    others = [name for name in SPARSE_BACKENDS if name != converted.backend]
    assert all(converted.refused[name] for name in others)


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
