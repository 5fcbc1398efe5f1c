"""A chart of what strategies cost as a table is cut over more and more ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from tp_embed.command import CommandError, WrongUsageError
from tp_embed.monitor.charts import COLORS, Series, line_chart

from .estimate import Cost, cost
from .report import name_of
from .setup import GIB, Setup
from .traffic import Network

SUFFIXES = (".svg", ".png")

_WIDTH, _HEIGHT, _LINE = 600, 250, 18
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #666; } .title { font-weight: 600; fill: #222; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .grid { stroke: #ececec; }
"""


@dataclass(frozen=True)
class Chart:
    """Lines over the number of tensor-parallel ranks: a panel for each cost, by its title."""

    title: str
    sizes: tuple[int, ...]
    panels: dict[str, list[Series]]

    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "tp_sizes": list(self.sizes),
            "panels": {t: {n: list(y) for n, _, y in lines} for t, lines in self.panels.items()},
        }


def check_path(path: Path) -> None:
    """
    :raises WrongUsageError: it is no name of a file that can be written.
    :raises CommandError: there is no matplotlib for a PNG.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise WrongUsageError(
            f"--chart must be a file that ends in {' or '.join(SUFFIXES)}, but is '{path}' instead."
        )
    if path.suffix.lower() == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError as e:
            raise CommandError(
                "A chart as PNG needs matplotlib, which is not installed. Install it, as "
                "`pip install 'tp-embed[cli]'` does, or let the file end in .svg."
            ) from e


def chart_of(setup: Setup, network: Network | None, shown: Sequence[Cost]) -> Chart:
    """The costs of the strategies that are ``shown``, with 1, 2, 4, ... ranks, up to 8 at least and
    to the ``tp_size`` of ``setup``, which is one of them."""
    most = max(8, setup.tp_size)
    sizes = sorted({1 << i for i in range(most.bit_length())} | {setup.tp_size})
    columns = [[_with(setup, size, each) for size in sizes] for each in shown]
    names = [name_of(each) for each in shown]

    def lines(value: Any) -> list[Series]:
        return [
            (name, sizes, [value(*found) for found in column])
            for name, column in zip(names, columns, strict=True)
        ]

    panels = {
        "Peak of a step (GiB)": lines(lambda at, cost: cost.peak / GIB),
        "Sent in a step (GiB)": lines(lambda at, cost: cost.sent / GIB),
        "Of that for lookups (GiB)": lines(lambda at, cost: _sent_for_lookups(cost) / GIB),
    }
    if network is not None:
        panels["Time to send (ms)"] = lines(lambda at, cost: 1e3 * cost.seconds(at, network))
    title = (
        f"{setup.vocab_size} x {setup.embed_dim}, {setup.tokens} tokens, DP {setup.dp_size}, "
        f"ZeRO {setup.zero_stage}, {setup.dtype}"
    )
    return Chart(title, tuple(sizes), panels)


def _with(setup: Setup, tp_size: int, like: Cost) -> tuple[Setup, Cost]:
    share = setup.owner_share
    if share is not None:  # A rank holds no less than its part.
        share = max(share, 1 / tp_size)
    at = replace(setup, tp_size=tp_size, owner_share=share)
    return at, cost(at, like.strategy, like.shard_logits, like.dedup)


def _sent_for_lookups(cost: Cost) -> float:
    return sum(transfer.sent for transfer in cost.transfers if transfer.name == "table")


def write_chart(chart: Chart, path: Path) -> None:
    """Writes ``chart`` as what the name of ``path`` ends in.

    :raises OSError: it cannot be written.
    """
    if path.suffix.lower() == ".svg":
        path.write_text(_as_svg(chart), encoding="utf-8")
    else:
        _write_png(chart, path)


def _as_svg(chart: Chart) -> str:
    names = [name for name, _, _ in next(iter(chart.panels.values()))]
    top = 30 + _LINE * -(-len(names) // 3)
    height = top + _HEIGHT * len(chart.panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="20" y="20">{escape(chart.title)}</text>'
        f"{''.join(_svg_legend(names))}{''.join(_svg_panels(chart, top))}</svg>\n"
    )


def _svg_legend(names: Sequence[str]) -> Iterator[str]:
    for i, name in enumerate(names):
        x, y = 20 + 190 * (i % 3), 30 + _LINE * (i // 3)
        yield f'<rect x="{x}" y="{y}" width="10" height="10" rx="2" fill="{COLORS[i]}"/>'
        yield f'<text x="{x + 16}" y="{y + 9}">{escape(name)}</text>'


def _svg_panels(chart: Chart, top: int) -> Iterator[str]:
    for i, (title, lines) in enumerate(chart.panels.items()):
        y = top + _HEIGHT * i
        drawn = line_chart(lines, x_label="tensor-parallel ranks", from_zero=True)
        yield f'<text class="title" x="20" y="{y + 16}">{escape(title)}</text>'
        yield f'<svg x="10" y="{y + 20}" width="{_WIDTH - 20}" height="{_HEIGHT - 20}">'
        yield f"{drawn}</svg>"


def _write_png(chart: Chart, path: Path) -> None:
    from matplotlib.figure import Figure  # Without pyplot there is no state that others share.

    figure = Figure(figsize=(7, 0.6 + 2.8 * len(chart.panels)), layout="constrained")
    figure.suptitle(chart.title, fontsize=10)
    for axes, (title, lines) in zip(
        figure.subplots(len(chart.panels), squeeze=False)[:, 0], chart.panels.items(), strict=True
    ):
        for i, (name, x, y) in enumerate(lines):
            dashes = ("-", "--", "-.", ":")[i % 4]  # One line may lie on another.
            axes.plot(x, y, dashes, marker="o", markersize=3, color=COLORS[i], label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(chart.sizes, [str(size) for size in chart.sizes])
        axes.set_xlabel("tensor-parallel ranks")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
