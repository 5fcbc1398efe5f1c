"""Line charts by matplotlib, which is optional and imported when the first chart is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from tp_embed.command import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind safe palette of Okabe and Ito.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")

Series = tuple[str, Sequence[float], Sequence[float]]

# Keep text as text, "$" included. Write the same file for the same values. Merge points less than
# half a pixel apart.
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tp_embed",
    "text.parse_math": False,
    "path.simplify_threshold": 0.5,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Returns an empty figure, with its size in inches.

    :raises MissingPackageError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure  # pyplot would keep global state.
    except ImportError as e:
        raise MissingPackageError(
            "Charts need matplotlib, which is not installed. Install it: "
            "`pip install 'tp-embed[cli]'` or `pip install matplotlib`."
        ) from e
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def line_charts(
    panels: Mapping[str, Sequence[Series]],
    *,
    title: str | None = None,
    x_label: str = "step",
    from_zero: bool = False,
    x_ticks: Sequence[int] | None = None,
) -> Figure:
    """Draws a column of charts by title, with a line for each (name, x, y). Skips non-finite
    points.

    :param from_zero: whether y-axes begin at 0.
    :param x_ticks: the ticks of the x-axes, which are logarithmic then.
    :raises MissingPackageError: matplotlib isn't installed.
    """
    figure = new_figure(7, 2.8 * len(panels) + (0.4 if title else 0), title)
    with _style():
        all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
            _draw(axes, lines)
            if x_ticks is not None:
                axes.set_xscale("log", base=2)
                axes.set_xticks(x_ticks, [str(tick) for tick in x_ticks])
            if from_zero:
                axes.set_ylim(bottom=0)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel(x_label)
            axes.grid(alpha=0.3)
    return figure


def _draw(axes: Axes, lines: Sequence[Series]) -> None:
    has_points = False
    for i, (_, x, y) in enumerate(lines):
        points = [p for p in zip(x, y, strict=True) if all(map(math.isfinite, p))]
        xs, ys = zip(*points, strict=True) if points else ((), ())
        dashes = ("-", "--", "-.", ":")[i % 4]  # One line may lie on another.
        marker = "o" if len(points) <= 60 else None
        color = COLORS[i % len(COLORS)]
        axes.plot(xs, ys, dashes, marker=marker, markersize=3, color=color, gid=f"line-{i}")
        has_points |= bool(points)
    if not has_points:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
    if len(lines) > 1:  # Passing names shows those that begin with "_" too.
        axes.legend(axes.lines, [name for name, _, _ in lines], fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Writes ``figure`` in the format of the suffix of ``path``.

    :raises OSError: the file can't be written.
    """
    if path.suffix.lower() == ".svg":
        path.write_text(to_svg(figure), encoding="utf-8")
    else:
        with _style():
            figure.savefig(path, dpi=120)


def to_svg(figure: Figure) -> str:
    """Returns ``figure`` as an ``<svg>`` element, for a file or an HTML page."""
    text = io.StringIO()
    with _style():
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    found = text.getvalue()
    return found[found.index("<svg") :]


def _style() -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(_RC)
