import numpy as np
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_demos, encode_pair
from tiny_onn.inspect.kinds import KIND_COLORS, KIND_NAMES, token_kinds

PAIR = Pair(np.array([[3, 0]], dtype=np.uint8), np.array([[9]], dtype=np.uint8))


def names(documents):
    batch = pack(documents)
    return [KIND_NAMES[k] for k in token_kinds(batch.tokens_N, batch.positions_N3).tolist()]


def test_every_token_of_a_pair_has_its_kind():
    assert names([encode_pair(PAIR)]) == [
        "START",
        *("in 3", "in 0", "in newline"),
        "SEP",
        *("out 9", "out newline"),
    ]


def test_demonstrations_end_in_the_middle_of_a_document():
    found = names([encode_demos([PAIR], PAIR)])
    assert found.count("END") == 1 and found.count("START") == 2
    assert found.count("out 9") == 2


def test_kinds_have_a_name_and_a_colour_each():
    assert len(KIND_NAMES) == len(KIND_COLORS) == len(set(KIND_NAMES)) == 25
    for name, color in zip(KIND_NAMES, KIND_COLORS, strict=True):
        assert color is None or name.split()[1] == str(color)
    every = token_kinds(torch.arange(14), torch.zeros(14, 3, dtype=torch.int64))
    assert every.min() >= 0 and every.max() < 25
