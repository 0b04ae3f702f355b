"""Which row every token takes: counted, invariant, causal, and the same decoding step by step."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_onn.arc import tokens
from tiny_onn.arc.packing import fill, pack
from tiny_onn.arc.task import NUM_COLORS as ARC_COLORS
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_demos, encode_pair
from tiny_onn.model import token_context
from tiny_onn.model.deep_embed_keys import (
    ALL_CELLS,
    CAUSAL_CELLS,
    NgramKey,
    PatchKey,
    TokenKey,
    pattern_codes,
)
from tiny_onn.model.token_context import NOTHING, PackedTokens, TokenHistory

KEYS = {
    "token": TokenKey(14),
    "ngram2": NgramKey(14, 2),
    "ngram4": NgramKey(14, 4),
    "patch": PatchKey(prefix=False),
    "patch prefix": PatchKey(prefix=True),
}
CELLS_AND_NEWLINE = (*range(10), tokens.NEWLINE)
SHAPES = [((1, 1), (1, 1)), ((3, 2), (2, 5)), ((4, 4), (4, 4)), ((1, 7), (6, 1)), ((3, 3), (2, 2))]


def random_pair(rng, shapes, colors=10):
    return Pair(*(rng.integers(0, colors, shape).astype(np.uint8) for shape in shapes))


def documents(seed=0, colors=10):
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng, shapes, colors) for shapes in SHAPES]
    demos = encode_demos(pairs[1:3], pairs[4])
    return [*(encode_pair(pair) for pair in pairs), demos]


def packed(batch, whole=True):
    layout = batch.layout
    column_N = torch.arange(len(layout.doc_N)) - layout.cu_seqlens[:-1].long()[layout.doc_N]
    whole_N = column_N < layout.prefix_lens[layout.doc_N]
    return PackedTokens(batch.tokens_N, batch.positions_N3, column_N, whole_N if whole else None)


def ids_of(key, doc):
    """Rows of every token of one document but its END."""
    return key(packed(pack([doc]))).tolist()


def test_the_models_constants_are_the_tokens_own():
    assert token_context.NUM_COLORS == ARC_COLORS
    assert token_context.NEWLINE == tokens.NEWLINE
    all_tokens = torch.arange(tokens.VOCAB)
    begins = token_context.begins_grid(all_tokens).nonzero().squeeze(1).tolist()
    assert begins == [tokens.START, tokens.SEP, tokens.END]


def test_patterns_are_counted_by_bell_numbers():
    whole, causal = pattern_codes(ALL_CELLS), pattern_codes(CAUSAL_CELLS)
    assert len(whole) == 22_038 and sum("0" not in str(c) for c in whole if c > 10**8) == 21_147
    assert len(causal) == 77 and sum("0" not in str(c) for c in causal if c > 10**4) == 52
    assert PatchKey(prefix=True).num_rows == 22_038 + 77


def grids_with_every_pattern():
    """Every partition of a 3 x 3 grid's cells, which has a cell at every kind of place in it."""
    strings = [(0,)]
    for _ in range(8):
        strings = [s + (label,) for s in strings for label in range(max(s) + 2)]
    return [np.array(s, dtype=np.uint8).reshape(3, 3) for s in strings]


def test_exactly_22038_patch_rows_are_reached():
    """The centre of 3 x 3 grids shows all 21,147 patterns without a border; smaller grids and the
    cells at the sides show the rest."""
    key, seen = PatchKey(prefix=True), set()
    small = {(h, w) for h, w in product((1, 2, 3), repeat=2) if h * w < 9}
    rng = np.random.default_rng(0)
    grids = grids_with_every_pattern()
    pairs = [Pair(grid, np.zeros((1, 1), np.uint8)) for grid in grids]
    for height, width in small:
        for cells in {tuple(g.flatten()[: height * width]) for g in grids}:
            grid = np.array(cells, dtype=np.uint8).reshape(height, width)
            pairs.append(Pair(grid, rng.integers(0, 10, (2, 2)).astype(np.uint8)))
    for start in range(0, len(pairs), 4000):
        context = packed(pack([encode_pair(pair) for pair in pairs[start : start + 4000]]))
        row_N = key(context)
        seen.update(row_N[context.whole & (context.tokens < 10)].tolist())
    assert seen == set(range(77, 77 + 22_038))


@pytest.mark.parametrize("name", ["patch", "patch prefix"])
def test_a_permutation_of_the_colours_changes_no_patch_row(name):
    rng = np.random.default_rng(1)
    for doc in documents():
        before = ids_of(KEYS[name], doc)
        for _ in range(20):
            permutation = np.concatenate([rng.permutation(10), np.arange(10, 14)])
            assert ids_of(KEYS[name], replace(doc, tokens=permutation[doc.tokens])) == before


def test_patches_tell_apart_what_a_renaming_does_not_make_equal():
    first = encode_pair(Pair(np.array([[1, 1], [2, 3]], np.uint8), np.zeros((1, 1), np.uint8)))
    other = encode_pair(Pair(np.array([[1, 2], [2, 3]], np.uint8), np.zeros((1, 1), np.uint8)))
    assert ids_of(KEYS["patch"], first) != ids_of(KEYS["patch"], other)


def loop_patch(doc, number, cells):
    """Row of a cell by the definition: look up its neighbours in the grid, rename, count."""
    grid, place = [], {}
    begin = max(i for i in range(number + 1) if doc.tokens[i] in (10, 12, 13))
    for i in range(begin + 1, len(doc.tokens)):
        if doc.tokens[i] in (10, 12, 13):
            break
        if doc.tokens[i] < 10:
            place[int(doc.positions[i, 0]), int(doc.positions[i, 1])] = int(doc.tokens[i])
    x, y = (int(v) for v in doc.positions[number, :2])
    names, code = {}, 0
    for dx, dy in cells:
        color = place.get((x + dx, y + dy))
        label = 0 if color is None else names.setdefault(color, len(names) + 1)
        grid.append(label)
        code = code * 10 + label
    return pattern_codes(cells).index(code)


def test_patch_rows_are_those_of_a_loop_over_the_grid():
    for doc in documents(colors=4):
        got = {name: ids_of(KEYS[name], doc) for name in ("patch", "patch prefix")}
        for number in range(len(doc.tokens) - 1):
            if doc.tokens[number] >= 10:
                assert got["patch"][number] == got["patch prefix"][number] == NOTHING
                continue
            causal = loop_patch(doc, number, CAUSAL_CELLS)
            assert got["patch"][number] == causal
            seen_whole = number < doc.prefix_len
            whole = 77 + loop_patch(doc, number, ALL_CELLS) if seen_whole else causal
            assert got["patch prefix"][number] == whole


def test_ngram_rows_are_exact():
    doc = documents()[1]
    for size in (2, 3, 4):
        seen, key = {}, NgramKey(14, size)
        for number, row in enumerate(ids_of(key, doc)):
            gram = tuple(doc.tokens[max(0, number - size + 1) : number + 1].tolist())
            assert 0 <= row < key.num_rows
            assert seen.setdefault(row, gram) == gram
        assert len(seen) == len(set(seen.values()))


@pytest.mark.parametrize("name", [name for name in KEYS if name != "patch prefix"])
def test_no_later_token_changes_an_earlier_key(name):
    """Over every token of inputs and outputs, whatever the mask lets attention see; in place of a
    colour or NEWLINE any token, in one place or everywhere after it."""
    rng = np.random.default_rng(2)
    for doc in documents():
        before = ids_of(KEYS[name], doc)
        for late in range(len(doc.tokens) - 1):
            if doc.tokens[late] not in CELLS_AND_NEWLINE:
                continue
            for end in (late + 1, len(doc.tokens)):
                changed = doc.tokens.copy()
                free = [i for i in range(late, end) if doc.tokens[i] in CELLS_AND_NEWLINE]
                changed[free] = rng.integers(0, tokens.VOCAB, len(free))
                assert ids_of(KEYS[name], replace(doc, tokens=changed))[:late] == before[:late]


def test_prefix_patches_see_the_prefix_whole_and_nothing_after_it():
    key = KEYS["patch prefix"]
    for doc in documents():
        before = ids_of(key, doc)
        looked_ahead = False
        for late in range(len(doc.tokens) - 1):
            if doc.tokens[late] >= 10:
                continue
            changed = doc.tokens.copy()
            changed[late] = (changed[late] + 1) % 10
            after = ids_of(key, replace(doc, tokens=changed))
            blind = late if late >= doc.prefix_len else 0  # rows that must not notice
            assert after[:blind] == before[:blind]
            if late < doc.prefix_len:
                looked_ahead |= after[:late] != before[:late]
        assert looked_ahead or doc.prefix_len < 12  # grids too small to show it


@pytest.mark.parametrize("name", list(KEYS))
def test_packing_and_filler_change_no_key(name):
    docs = documents()
    batch = pack(docs)
    together = KEYS[name](packed(fill(batch, 64))).tolist()
    start = 0
    for slot, i in enumerate(batch.order):
        length = batch.layout.lengths[slot]
        assert together[start : start + length] == ids_of(KEYS[name], docs[i])
        start += length


@pytest.mark.parametrize("name", list(KEYS))
def test_decoding_step_by_step_gives_the_keys_of_the_whole_document(name):
    docs, key = documents(), KEYS[name]
    wanted = [ids_of(key, doc) for doc in docs]
    prompts = [
        replace(d, tokens=d.tokens[: d.prefix_len], positions=d.positions[: d.prefix_len])
        for d in docs
    ]
    batch = pack(prompts)
    context = packed(batch)
    lengths_B = batch.layout.cu_seqlens.diff().long()
    history = TokenHistory(context, batch.layout.doc_N, lengths_B, int(lengths_B.max()) + 40)
    start = 0
    for slot, i in enumerate(batch.order):
        length = batch.layout.lengths[slot]
        assert key(context).tolist()[start : start + length] == wanted[i][:length]
        start += length
    alive = [(i, docs[i].prefix_len) for i in batch.order]
    while alive:
        keep = [n for n, (i, at) in enumerate(alive) if at < len(docs[i].tokens) - 1]
        history.keep(torch.tensor(keep, dtype=torch.long))
        alive = [alive[n] for n in keep]
        if not alive:
            break
        history.append(
            torch.tensor([int(docs[i].tokens[at]) for i, at in alive]),
            torch.tensor(np.stack([docs[i].positions[at] for i, at in alive])),
        )
        assert key(history).tolist() == [wanted[i][at] for i, at in alive]
        alive = [(i, at + 1) for i, at in alive]


def test_tokens_that_spell_no_grid_still_have_keys():
    """An output written without the grammar may be ragged, empty rows, START in the middle."""
    ragged = np.array([10, 5, 5, 11, 5, 11, 12, 11, 11, 4, 4, 11, 4, 4, 4, 11, 10, 4, 11, 12])
    positions, x, y = np.zeros((len(ragged), 3), np.int64), 0, 0
    for number, token in enumerate(ragged):
        positions[number] = (x, y, 3)
        x, y = (0, y + 1) if token == 11 else (x + 1, y)
    context = PackedTokens(torch.tensor(ragged), torch.tensor(positions), torch.arange(len(ragged)))
    wanted = {name: key(context) for name, key in KEYS.items()}
    for name, rows in wanted.items():
        assert ((rows >= NOTHING) & (rows < KEYS[name].num_rows)).all()
    given = PackedTokens(context.tokens[:3], torch.tensor(positions[:3]), torch.arange(3))
    history = TokenHistory(given, torch.zeros(3, dtype=torch.long), torch.tensor([3]), len(ragged))
    for at in range(3, len(ragged)):
        history.append(context.tokens[at : at + 1], torch.tensor(positions[at : at + 1]))
        for name, key in KEYS.items():
            assert key(history).tolist() == wanted[name][at : at + 1].tolist()


PRINT_ROWS = """
import torch
from tiny_onn.model.deep_embed_keys import NgramKey, PatchKey
from tiny_onn.model.token_context import PackedTokens
tokens = torch.tensor([10, 3, 3, 11, 7, 3, 11, 12, 7])
positions = torch.tensor([[0,0,0],[0,0,1],[1,0,1],[2,0,1],[0,1,1],[1,1,1],[2,1,1],[0,0,2],[0,0,3]])
context = PackedTokens(tokens, positions, torch.arange(9), torch.arange(9) < 8)
print([key(context).tolist() for key in (NgramKey(14, 3), PatchKey(True))])
"""


def test_keys_are_the_same_in_another_process():
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PRINT_ROWS],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    here: dict = {}
    exec(PRINT_ROWS.replace("print(", "rows = ("), here)
    assert done.stdout.strip() == str(here["rows"])
    assert here["rows"][0][:3] == [10, 3 + 14 * 11, 3 + 14 * (4 + 15 * 11)]
