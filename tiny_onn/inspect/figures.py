"""The figures. The only file that imports matplotlib; no window, no global state: Agg canvases.

Shapes: L layers with experts, E experts, Q kinds of tokens, A attention calls.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tiny_onn.errors import UserError
from tiny_onn.files import atomic_write_bytes
from tiny_onn.inspect.branches import BRANCHES, Choice, GateStats
from tiny_onn.inspect.canvas import Canvas, choose_queries, lay_out_grids
from tiny_onn.inspect.experts import ExpertStats
from tiny_onn.inspect.kinds import KIND_COLORS, KIND_NAMES

PALETTE = (
    "#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00",
    "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231",
)  # fmt: skip
"""The report page's colours."""

DOTS_PER_INCH = 120
LARGEST_INCHES = 40.0
QUERIES = 4
SMALLEST_CELL = 0.3
"""Side of a cell that is not read; one that is has 1."""

LABELLED_CELLS = 400
"""Up to so many cells of a heat map carry their number."""


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    try:
        atomic_write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise UserError(
            f"cannot write '{path}' ({error.strerror}); expected a writable folder with space "
            "left; give another out=FOLDER"
        ) from error
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, within reason."""
    size = (min(width, LARGEST_INCHES), min(height, LARGEST_INCHES))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_load(stats: ExpertStats) -> Figure:
    """Share of the tokens for which each expert fires, its threshold, and how many fire for a
    token, by layer."""
    load_LE = stats.load_LE()
    num_layers, num_experts = load_LE.shape
    figure = new_figure(5 + 0.45 * num_experts, 1.6 + 0.45 * num_layers)
    heat, bars = figure.subplots(
        1, 2, sharey=True, gridspec_kw={"width_ratios": [max(4, num_experts), 4]}
    )
    image = heat.imshow(load_LE, cmap="viridis", vmin=0, vmax=load_LE.max() or 1, aspect="auto")
    figure.colorbar(image, ax=heat, label="share of tokens")
    if load_LE.size <= LABELLED_CELLS:
        middle = load_LE.max() / 2
        for (layer, expert), share in np.ndenumerate(load_LE):
            dead = stats.dead_LE[layer, expert]
            color = "red" if dead else "black" if share > middle else "white"
            text = "dead" if dead else f"{100 * share:.0f}"
            text += f"\n({stats.thresholds_LE[layer, expert]:.2f})"
            heat.text(expert, layer, text, ha="center", va="center", color=color, size=7)
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    heat.set_yticks(range(num_layers), [str(layer) for layer in stats.layers])
    heat.set_title(
        f"load, % of tokens (threshold); {stats.num_dead} of {stats.num_experts} dead", size=10
    )
    active_L = load_LE.sum(axis=1)
    bars.barh(range(num_layers), active_L, color="#4477aa")
    for row, (active, none) in enumerate(zip(active_L, stats.none_share_L(), strict=True)):
        bars.text(active, row, f" {active:.2f}, none: {100 * none:.1f}%", va="center", size=7)
    bars.set_xlim(0, 1.9 * max(active_L.max(), 0.1))
    bars.set_ylim(num_layers - 0.5, -0.5)  # the bars have rescaled the axis that both share
    bars.set_title("mean active experts", size=10)
    return figure


def draw_kinds(stats: ExpertStats) -> Figure:
    """Share of each kind of token for which each expert fires, a panel a layer."""
    load_LQE = stats.load_LQE()
    num_layers, num_kinds, num_experts = load_LQE.shape
    figure = new_figure(1.5 + num_layers * (1.2 + 0.22 * num_experts), 1.2 + 0.24 * num_kinds)
    panels = figure.subplots(1, num_layers, sharey=True, squeeze=False)[0]
    for panel, layer, load_QE in zip(panels, stats.layers, load_LQE, strict=True):
        panel.set_facecolor("#dddddd")  # kinds that do not occur
        image = panel.imshow(load_QE, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        panel.set_title(f"layer {layer}")
        panel.set_xlabel("expert")
    panels[0].set_yticks(range(num_kinds), KIND_NAMES, size=7)
    for label, color in zip(panels[0].get_yticklabels(), KIND_COLORS, strict=True):
        if color is not None:
            ink = "white" if color in (0, 1, 9) else "black"
            label.set(color=ink, backgroundcolor=PALETTE[color])
    figure.colorbar(image, ax=list(panels), label="share of the kind's tokens")
    return figure


def draw_gates(stats: GateStats) -> Figure:
    """Median gate of each branch, 10% to 90% as whiskers, for input and for output tokens."""
    num_calls = len(stats.layers)
    figure = new_figure(2 + 2 * 0.9 * num_calls, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, title, values_A33 in zip(
        panels, ("input tokens", "output tokens"), stats.quantiles, strict=True
    ):
        for branch, name in enumerate(BRANCHES):
            low, median, high = values_A33[:, branch].T
            place = np.arange(num_calls) + 0.27 * (branch - 1)
            whiskers = np.stack([median - low, high - median])
            panel.bar(place, median, 0.25, yerr=whiskers, capsize=2, label=name)
        panel.set_title(title)
        panel.set_xticks(range(num_calls), [str(layer) for layer in stats.layers])
        panel.set_xlabel("layer")
    panels[0].set_ylim(0, 1)
    panels[0].set_ylabel("gate (median; 10% to 90%)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(BRANCHES))
    return figure


def draw_choice(choice: Choice, title: str) -> Figure:
    """Which cells some output cells read through the selected branch, a row an attention call.

    Full squares: in a block that all groups chose; small ones: read by none of them. Newlines
    belong to blocks too and are not shown.
    """
    canvas = lay_out_grids(choice.tokens_T, choice.positions_T3)
    queries = choose_queries(choice.tokens_T, choice.positions_T3, QUERIES)
    (height, width), num_calls = canvas.token_HW.shape, len(choice.layers)
    cell = min(0.25, 5.0 / width)
    figure = new_figure(
        1 + len(queries) * (0.3 + cell * width), 0.8 + num_calls * (0.4 + cell * height)
    )
    panels = figure.subplots(num_calls, len(queries), squeeze=False)
    for row, layer in enumerate(choice.layers):
        for panel, query in zip(panels[row], queries, strict=True):
            _draw_grids(panel, canvas, choice.tokens_T, choice.share_ATT[row, query], query)
        panels[row, 0].set_ylabel(f"layer {layer}")
    figure.suptitle(
        f"{title}: cells in the blocks that the framed cell chose\n"
        "full squares: chosen by every key/value head; dots: by none"
    )
    return figure


def _draw_grids(
    panel: Axes, canvas: Canvas, tokens_T: np.ndarray, share_T: np.ndarray, query: int
) -> None:
    """One canvas; cells are as large as they are read, the query is framed."""
    for left, top, width, height in canvas.boxes:
        place = (left - 0.5, top - 0.5)
        panel.add_patch(Rectangle(place, width, height, facecolor="#eeeeee", edgecolor="#777777"))
    cells, colors = [], []
    for (line, column), token in np.ndenumerate(canvas.token_HW):
        if token >= 0:
            side = SMALLEST_CELL + (1 - SMALLEST_CELL) * share_T[token]
            cells.append(Rectangle((column - side / 2, line - side / 2), side, side))
            colors.append(PALETTE[tokens_T[token]])
    panel.add_collection(PatchCollection(cells, facecolors=colors, linewidths=0))
    column, line = canvas.place(query)
    frame = Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2)
    panel.add_patch(frame)
    height, width = canvas.token_HW.shape
    panel.set(xlim=(-0.7, width - 0.3), ylim=(height - 0.3, -0.7), aspect="equal")
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set_visible(False)
