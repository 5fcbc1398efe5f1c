"""Charts the costs of strategies over the number of tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tp_embed.command import WrongUsageError
from tp_embed.monitor.charts import Series, line_charts, new_figure, save

from .estimate import Cost, cost
from .report import name_of
from .setup import GIB, Setup
from .traffic import Network

SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Chart:
    """Lines over the number of tensor-parallel ranks, in a panel per cost, by title."""

    title: str
    sizes: tuple[int, ...]
    panels: dict[str, list[Series]]

    def data(self) -> dict[str, Any]:
        """Converts the chart to JSON values."""
        return {
            "tp_sizes": list(self.sizes),
            "panels": {t: {n: list(y) for n, _, y in lines} for t, lines in self.panels.items()},
        }


def check_path(path: Path) -> None:
    """
    :raises WrongUsageError: the suffix of ``path`` is not supported.
    :raises MissingPackageError: matplotlib isn't installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise WrongUsageError(
            f"--chart must be a file that ends in {' or '.join(SUFFIXES)}, but is '{path}' instead."
        )
    new_figure(1, 1)  # Without matplotlib, fails now, not after the costs are printed.


def chart_of(setup: Setup, network: Network | None, shown: Sequence[Cost]) -> Chart:
    """Charts the strategies ``shown`` at 1, 2, 4, ... ranks, up to at least 8 and at least
    ``setup.tp_size``, which is included."""
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
        "Sent for lookups (GiB)": lines(lambda at, cost: _sent_for_lookups(cost) / GIB),
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
    if share is not None:  # The largest owner holds at least 1/P.
        share = max(share, 1 / tp_size)
    at = replace(setup, tp_size=tp_size, owner_share=share)
    return at, cost(at, like.strategy, like.shard_logits, like.dedup)


def _sent_for_lookups(cost: Cost) -> float:
    return sum(transfer.sent for transfer in cost.transfers if transfer.name == "table")


def write_chart(chart: Chart, path: Path) -> None:
    """Writes ``chart`` in the format of the suffix of ``path``.

    :raises OSError: the file can't be written.
    """
    figure = line_charts(
        chart.panels,
        title=chart.title,
        x_label="tensor-parallel ranks",
        from_zero=True,
        x_ticks=chart.sizes,
    )
    save(figure, path)
