import pytest


@pytest.fixture
def bench(script):
    return script("bench", "attention")


def test_the_exponent_is_the_power_of_growth_over_long_documents_only(bench):
    lengths = (256, 2048, 4096, 8192)
    assert bench.exponent(lengths, [1e9, *(3 * n**1.5 for n in lengths[1:])]) == 1.5


def test_no_exponent_without_two_values(bench):
    assert bench.exponent((256, 512), [1.0, 2.0]) is None
    assert bench.exponent((2048, 4096), [0.0, 2.0]) is None


def test_the_crossing_lies_where_the_ratio_passes_one(bench):
    assert bench.crossing((256, 1024, 4096), [4.0, 2.0, 0.5]) == 2048
    assert bench.crossing((256, 1024), [0.5, 2.0]) is None
    assert bench.crossing((256, 1024), [0.9, 0.5]) == 0.0
    assert bench.crossing((256, 512, 1024, 4096), [0.5, 2.0, 2.0, 0.5]) == 2048


def test_the_crossing_in_words(bench):
    lengths = (256, 16384)
    assert bench.crossing_text(lengths, None) == "not up to 16,384 tokens"
    assert bench.crossing_text(lengths, 0.0) == "below 256 tokens"
    assert bench.crossing_text(lengths, 5120.0) == "at about 5,120 tokens"
