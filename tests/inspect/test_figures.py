"""The figures hold what they say: their numbers and labels, and a PNG of a sane size."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.errors import UserError
from tiny_onn.inspect import figures
from tiny_onn.inspect.branches import Choice, GateStats
from tiny_onn.inspect.experts import ExpertStats
from tiny_onn.inspect.kinds import KIND_NAMES

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def stats():
    """Two layers of three experts; the last of layer 2 is dead; END does not occur."""
    tokens = np.full((2, len(KIND_NAMES)), 10)
    tokens[:, KIND_NAMES.index("END")] = 0
    fired = np.zeros((2, len(KIND_NAMES), 3), dtype=np.int64)
    fired[:, :, 0] = tokens
    fired[:, 3, 1] = 5
    fired[0, 4, 2] = 2
    return ExpertStats(
        (0, 2), fired, tokens, np.array([0, 24]), np.array([9, 9]), np.full((2, 3), 0.25)
    )


def texts(figure):
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_the_load_figure_names_dead_experts_and_means(stats):
    figure = figures.draw_load(stats)
    found = texts(figure)
    assert found.count("dead\n(0.25)") == 1 and "100\n(0.25)" in found
    assert any("1.03, none: 0.0%" in text for text in found)
    assert any("none: 10.0%" in text for text in found)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "2"]
    assert figure.axes[0].get_ylim() == (1.5, -0.5)  # layer 0 on top


def test_the_kinds_figure_has_a_row_a_kind_and_a_panel_a_layer(stats):
    figure = figures.draw_kinds(stats)
    panels = [panel for panel in figure.axes if panel.get_title().startswith("layer")]
    assert [panel.get_title() for panel in panels] == ["layer 0", "layer 2"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert tuple(labels) == KIND_NAMES
    shown = panels[0].get_images()[0].get_array()
    assert shown.shape == (len(KIND_NAMES), 3)
    assert shown[3, 1] == 0.5 and np.ma.is_masked(shown[KIND_NAMES.index("END"), 0])


def test_the_gates_figure_shows_medians_of_both_sides():
    quantiles = np.full((2, 2, 3, 3), np.nan)
    quantiles[0] = [0.1, 0.4, 0.6]
    quantiles[1, :, 2] = [0.2, 0.5, 0.9]
    figure = figures.draw_gates(GateStats((0, 1), quantiles))
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [0.4] * 6
    assert len(figure.legends) == 1


@pytest.fixture
def choice():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    batch = pack([encode_pair(Pair(grid, grid))])
    length = batch.num_tokens
    share = np.zeros((1, length, length))
    share[0, :, 1:3] = 1  # the cells of colours 0 and 1 of the input
    return Choice((0,), share, batch.tokens_N.numpy(), batch.positions_N3.numpy())


def test_cells_are_as_large_as_they_are_read_and_keep_their_colour(choice):
    figure = figures.draw_choice(choice, "task x")
    assert len(figure.axes) == figures.QUERIES
    (cells,) = figure.axes[0].collections
    colors = [to_hex(color) for color in cells.get_facecolors()]
    grid_rows = [figures.PALETTE[c] for c in (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)]
    assert colors == grid_rows  # both grids' rows from left to right
    sides = [path.get_extents().width for path in cells.get_paths()]
    np.testing.assert_allclose(sides, [1, 1, *[figures.SMALLEST_CELL] * 10])


def test_figures_are_saved_as_png(stats, choice, tmp_path):
    gates = GateStats((0, 1), np.full((2, 2, 3, 3), 0.5))
    drawn = (
        figures.draw_load(stats),
        figures.draw_kinds(stats),
        figures.draw_gates(gates),
        figures.draw_choice(choice, "task x"),
    )
    for number, figure in enumerate(drawn):
        path = figures.save(figure, tmp_path / f"{number}.png")
        assert path.read_bytes().startswith(PNG)
        width, height = figure.get_size_inches()
        assert 2 < width <= figures.LARGEST_INCHES and 1 < height <= figures.LARGEST_INCHES


def test_a_figure_that_cannot_be_written_is_one_line(stats, tmp_path):
    with pytest.raises(UserError, match="cannot write") as error:
        figures.save(figures.draw_load(stats), tmp_path / "missing" / "load.png")
    assert "\n" not in str(error.value)
