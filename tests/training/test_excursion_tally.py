"""What the log says of excursions, against counts by hand."""

import numpy as np
import pytest

from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import NEWLINE, encode_pair
from tiny_onn.training.alignment_batch import align
from tiny_onn.training.distributed import StepChannel
from tiny_onn.training.excursion_tally import ExcursionTally
from tiny_onn.training.excursions import Excursion


def test_what_is_cut_is_counted():
    """Of three free excursions, two by hand that never ended."""
    document = encode_pair(Pair(np.zeros((1, 1), np.uint8), np.array([[1, 2]], np.uint8)), task=0)
    places = np.array([(x, 0) for x in range(4)])
    cut = Excursion(np.array([1, 2, 2]), None, places, ended=False)
    right = Excursion(np.array([1, 2, NEWLINE]), None, np.array([(0, 0), (1, 0), (2, 0), (0, 1)]),
                      ended=True)  # fmt: skip
    tally, documents = ExcursionTally(), [document] * 4
    excursions = [[cut], [right], [], [cut]]
    tally.excursions(documents, excursions, align(documents, excursions), 2.0)
    found = tally.take(StepChannel())
    assert found["eavi/cut"] == pytest.approx(2 / 3)
    assert found["eavi/perfect"] == pytest.approx(1 / 3)
    assert found["eavi/share"] == 3 / 4
    assert found["eavi/own_accuracy"] == pytest.approx((2 + 2 + 2) / 8)
    assert found["eavi/excursion_seconds_per_step"] == 2
    assert tally.take(StepChannel()) == {}
