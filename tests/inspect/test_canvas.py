import numpy as np

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_demos, encode_pair
from tiny_onn.inspect.canvas import choose_queries, lay_out_grids


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


PAIR = Pair(grid([1, 2, 3], [4, 5, 6]), grid([7], [8], [9]))


def packed(document):
    batch = pack([document])
    return batch.tokens_N.numpy(), batch.positions_N3.numpy()


def test_cells_stand_where_their_grid_has_them():
    tokens, positions = packed(encode_pair(PAIR))
    canvas = lay_out_grids(tokens, positions)
    assert canvas.boxes == ((0, 0, 3, 2), (4, 0, 1, 3))
    shown = np.where(canvas.token_HW >= 0, tokens[canvas.token_HW], -1)
    assert shown.tolist() == [[1, 2, 3, -1, 7], [4, 5, 6, -1, 8], [-1, -1, -1, -1, 9]]


def test_a_cell_is_found_again():
    tokens, positions = packed(encode_pair(PAIR))
    canvas = lay_out_grids(tokens, positions)
    (token,) = np.flatnonzero(tokens == 6)
    assert canvas.place(token) == (2, 1)


def test_demonstrations_stand_before_the_query():
    tokens, positions = packed(encode_demos([PAIR], Pair(PAIR.output, PAIR.input)))
    canvas = lay_out_grids(tokens, positions)
    assert [box[0] for box in canvas.boxes] == [0, 4, 6, 8]
    assert canvas.token_HW.shape == (3, 11)


def test_queries_are_spread_over_the_last_output():
    tokens, positions = packed(encode_demos([PAIR], Pair(PAIR.output, PAIR.input)))
    queries = choose_queries(tokens, positions, 4)
    assert tokens[queries].tolist() == [1, 3, 4, 6]
    assert min(queries) > np.flatnonzero(tokens == 10)[-1]


def test_a_short_output_is_asked_whole():
    tokens, positions = packed(encode_pair(PAIR))
    assert tokens[choose_queries(tokens, positions, 4)].tolist() == [7, 8, 9]
