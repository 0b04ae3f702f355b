"""Tables on disk are the tables in memory, row for row, and broken files say so in one line."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tiny_onn.errors import UserError
from tiny_onn.model.deep_embed_store import DenseRows, FileRows
from tiny_onn.model.row_file import PAGE, RowFile, copy_sparse

SHAPE = (50, 3, 7)
DTYPES = [torch.float32, torch.bfloat16]


def filled(path, dtype, shape=SHAPE, seed=0):
    """A file of random rows, and the rows."""
    rows = torch.randn(shape, generator=torch.manual_seed(seed)).to(dtype)
    file = RowFile.create(path, shape, dtype)
    file.write(torch.arange(shape[0]), rows)
    return file, rows


@pytest.fixture(params=DTYPES, ids=str)
def store(request, tmp_path):
    """(a store over a file, the same rows in memory)."""
    file, rows = filled(tmp_path / "rows.safetensors", request.param)
    made = FileRows(*SHAPE, request.param)
    made.attach(file)
    dense = DenseRows(*SHAPE)
    with torch.no_grad():
        dense.weight.copy_(rows)
    return made, dense


def looked_up(fetch, layer):
    """What every index gets: its row, or zeros for -1."""
    rows = fetch()
    known = (rows.index_N >= 0).unsqueeze(1)
    return rows.layers[layer][rows.index_N.clamp(min=0)] * known


INDEX = [
    [3],
    [3, 3, 3],
    [49, 0, 17, 18, 19, 0, 49, 2],
    [-1, 5, -1, 5, 6],
    [-1, -1],
    list(range(50)),
]


@pytest.mark.parametrize("index", INDEX, ids=str)
@pytest.mark.parametrize("prefetch", [True, False])
def test_rows_from_disk_are_those_in_memory_bit_for_bit(store, index, prefetch):
    filed, dense = store
    filed.prefetch = prefetch
    index_N = torch.tensor(index)
    for layer in range(SHAPE[1]):
        got = looked_up(filed.fetch(index_N), layer)
        assert torch.equal(got, looked_up(dense.fetch(index_N), layer))


def test_without_a_file_every_row_is_zero():
    rows = FileRows(*SHAPE, torch.float32).fetch(torch.tensor([4, 9]))()
    assert all(layer.shape == (2, 7) and not layer.any() for layer in rows.layers)


def test_only_forwards_with_gradients_over_a_writable_file_leave_rows_to_train(tmp_path):
    file, _ = filled(tmp_path / "a", torch.float32)
    store = FileRows(*SHAPE, torch.float32)
    store.attach(file)
    with torch.no_grad():
        store.fetch(torch.tensor([1, 2]))()
    assert store.pending == []
    rows = store.fetch(torch.tensor([7, 1, 7]))()
    sum(layer.sum() for layer in rows.layers).backward()
    (pending,) = store.take_pending()
    assert store.pending == [] and pending.ids_U.tolist() == [1, 7]
    assert torch.equal(pending.leaf.grad, torch.ones(2, 3, 7))
    store.open(tmp_path / "a")
    assert not store.fetch(torch.tensor([1]))().layers[0].requires_grad
    assert store.pending == []


def test_the_gradient_of_a_repeated_row_is_summed_like_that_of_a_parameter(store):
    filed, dense = store
    index_N = torch.tensor([4, 30, 4, -1, 4, 31])
    weights = torch.randn(3, 6, 7, generator=torch.manual_seed(1))
    for one in (filed, dense):
        fetch = one.fetch(index_N)
        sum((looked_up(fetch, layer) * weights[layer]).sum() for layer in range(3)).backward()
    (pending,) = filed.take_pending()
    assert pending.ids_U.tolist() == [4, 30, 31]
    torch.testing.assert_close(pending.leaf.grad, dense.weight.grad[[4, 30, 31]])
    assert torch.equal(pending.leaf.grad[1], weights[:, 1])
    torch.testing.assert_close(pending.leaf.grad[0], weights[:, [0, 2, 4]].sum(1))
    rest = [i for i in range(50) if i not in (4, 30, 31)]
    assert not dense.weight.grad[rest].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_is_safetensors_and_begins_its_data_on_a_page(tmp_path, dtype):
    path = tmp_path / "rows.safetensors"
    _, rows = filled(path, dtype)
    with safe_open(path, "pt") as opened:
        assert list(opened.keys()) == ["rows"]
        assert torch.equal(opened.get_tensor("rows"), rows)
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert begin % PAGE == 0
    assert path.stat().st_size == begin + rows.numel() * rows.element_size()


def test_what_safetensors_wrote_is_read(tmp_path):
    rows = torch.randn(SHAPE)
    save_file({"rows": rows}, tmp_path / "x", metadata={"any": "thing"})
    ids_U = torch.tensor([0, 1, 2, 40])
    assert torch.equal(RowFile(tmp_path / "x", SHAPE, torch.float32).read(ids_U), rows[ids_U])


def test_written_rows_change_and_no_others(tmp_path):
    file, rows = filled(tmp_path / "x", torch.float32)
    ids_U = torch.tensor([0, 7, 8, 49])
    fresh = torch.randn(4, 3, 7)
    file.write(ids_U, fresh)
    rows[ids_U] = fresh
    assert torch.equal(file.read(torch.arange(50)), rows)


def test_new_files_and_copies_take_no_space_for_what_was_never_written(tmp_path):
    shape = (4096, 4, 1024)  # 64 MiB
    file = RowFile.create(tmp_path / "x", shape, torch.float32)
    file.write(torch.tensor([1000]), torch.ones(1, 4, 1024))
    file.copy_to(tmp_path / "y")
    for name in ("x", "y"):
        status = os.stat(tmp_path / name)
        assert status.st_size > 1 << 26
        assert status.st_blocks * 512 < 1 << 22
    copy = RowFile(tmp_path / "y", shape, torch.float32)
    assert copy.read(torch.tensor([999, 1000, 1001])).sum(dim=(1, 2)).tolist() == [0, 4096, 0]


def test_copies_are_equal_byte_for_byte(tmp_path):
    for size in (0, 1, 1 << 16, (1 << 16) + 5, 3 << 16):
        data = bytes(size // 2) + os.urandom(size - size // 2)
        (tmp_path / "a").write_bytes(data)
        copy_sparse(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == data


def _cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4)


def _longer(path):
    with open(path, "ab") as file:
        file.write(b"1234")


def _header(change):
    def apply(path):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode().ljust(length)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


BREAKS = {
    "missing": (lambda p: p.unlink(), "cannot be opened .No such file"),
    "cut short": (_cut, r"is cut short or torn: \d+ bytes; expected \d+ bytes"),
    "longer": (_longer, "is cut short or torn"),
    "empty": (lambda p: p.write_bytes(b""), "no safetensors file"),
    "half a header": (lambda p: p.write_bytes(p.read_bytes()[:20]), "no safetensors file"),
    "not ours": (lambda p: p.write_bytes(b"\xff" * 5000), "no safetensors file"),
    "a list": (lambda p: p.write_bytes(b"\x02" + bytes(7) + b"[]"), "no safetensors file"),
    "another tensor": (
        lambda p: save_file({"weight": torch.zeros(2)}, p),
        r"holds \['weight'\]; expected one tensor 'rows'",
    ),
    "another shape": (
        _header(lambda h: h["rows"].update(shape=[51, 3, 7])),
        r"shape \[51, 3, 7\]; expected F32 of shape \[50, 3, 7\] by model.deep_embed",
    ),
    "another dtype": (
        _header(lambda h: h["rows"].update(dtype="BF16")),
        "has BF16 rows.*expected F32",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_one_line_that_says_what_would_be_right(tmp_path, name):
    path = tmp_path / "deep_embed.token.safetensors"
    filled(path, torch.float32)
    breaks, message = BREAKS[name]
    breaks(path)
    with pytest.raises(UserError, match=message) as caught:
        RowFile(path, SHAPE, torch.float32)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_cut_while_it_is_open_is_an_error_and_no_crash(tmp_path):
    file, _ = filled(tmp_path / "x", torch.float32)
    os.truncate(tmp_path / "x", PAGE + 100)
    store = FileRows(*SHAPE, torch.float32)
    store.attach(file)
    with pytest.raises(UserError, match="became shorter while it was open"):
        store.fetch(torch.tensor([0, 49]))()
