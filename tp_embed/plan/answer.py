"""Makes the report of the planner: all strategies, the chosen one, and the best one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tp_embed.command import Report

from .advice import logits_line, owner_line, saved_by_local_logits, warnings_of
from .chart import chart_of, check_path, write_chart
from .estimate import Cost, auto_strategy, costs, recommend
from .lookups import auto_dedup
from .report import as_data, as_lines, name_of
from .setup import Setup, Strategy, problem_of_world, refuse, sharers
from .traffic import Network

Dedup = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Options:
    """Options beyond the setup.

    :param memory: bytes that a rank has for table, head and logits.
    :param dedup: ``"always"`` and ``"never"`` omit the other columns of cut tables.
    :param chart: the file to write a chart to.
    """

    memory: float | None = None
    strategy: Strategy | Literal["auto"] = "auto"
    dedup: Dedup = "auto"
    shard_logits: bool = False
    chart: Path | None = None


def check(setup: Setup, options: Options) -> None:
    """
    :raises ValueError: the setup does not support the strategy.
    :raises CommandError: the chart cannot be drawn.
    """
    _choose(setup, options, _costs(setup, options))
    if options.chart is not None:
        check_path(options.chart)


def make_report(setup: Setup, options: Options, network: Network | None) -> Report:
    """Makes the report, and writes the chart if ``options`` name one.

    :raises ValueError: as :func:`check`.
    """
    found = _costs(setup, options)
    chosen = _choose(setup, options, found)
    best, reason = recommend(setup, found, network, options.memory)
    shown = list(_shown(options, found, best))
    saved = saved_by_local_logits(setup, chosen, network)
    warnings = list(warnings_of(setup, chosen, network, options.memory))
    data = {
        "setup": asdict(setup),
        "network": None if network is None else asdict(network),
        "strategies": [as_data(cost, setup, network, options.memory) for cost in found],
        "chosen": found.index(chosen),
        "recommended": found.index(best),
        "reason": reason,
        "shard_logits_saves": saved,
        "warnings": warnings,
    }
    auto = "auto" if options.strategy == "auto" else "yours"
    marks = [
        " ".join(mark for mark, of in ((auto, chosen), ("best", best)) if of is cost)
        for cost in shown
    ]
    lines = [*as_lines(setup, shown, marks, network), f"best: {name_of(best)}: {reason}"]
    if saved is not None:
        lines.append(logits_line(chosen, saved))
    if (uneven := owner_line(setup, chosen)) is not None:
        lines.append(uneven)
    if options.chart is not None:
        chart = chart_of(setup, network, shown)
        write_chart(chart, options.chart)
        data["chart"] = {"file": str(options.chart)} | chart.data()
        lines.append(f"chart: {options.chart}")
    return Report(data, lines, warnings)


def _costs(setup: Setup, options: Options) -> list[Cost]:
    only = {"always": True, "never": False}.get(options.dedup)
    return [
        cost
        for cost in costs(setup)
        if only is None or cost.strategy == "none" or cost.dedup == only
    ]


def _choose(setup: Setup, options: Options, found: Sequence[Cost]) -> Cost:
    if options.shard_logits and setup.fuse_loss:
        refuse("shard_logits", "false with `fuse_loss`, which holds no logits", True)
    strategy = auto_strategy(setup) if options.strategy == "auto" else options.strategy
    if strategy == "none" and setup.table_optimizer is not None:
        refuse("strategy", "'embed', 'vocab' or 'world' with `table_optimizer`", strategy)
    if strategy == "world" and sharers(setup, strategy) == 1:
        refuse("strategy", "'none', 'embed' or 'vocab' for one rank", strategy)
    problem = problem_of_world(setup) if strategy == "world" else None
    if problem is not None:
        raise ValueError(problem)
    dedup = auto_dedup(setup, strategy) if options.dedup == "auto" else options.dedup == "always"
    wanted = strategy, options.shard_logits, dedup and strategy != "none"
    for cost in found:
        if (cost.strategy, cost.shard_logits, cost.dedup) == wanted:
            return cost
    raise ValueError(
        "`shard_logits` must be false for a head that is not cut over the vocabulary, but is "
        f"true instead, and the strategy is {strategy!r}. "
        + ("Use 'vocab'." if setup.head else "There is no head: leave it out.")
    )


def _shown(options: Options, found: Sequence[Cost], best: Cost) -> Iterator[Cost]:
    """Yields each strategy, with sharded logits if ``options`` ask for them, and the best one."""
    with_logits = {cost.strategy for cost in found if cost.shard_logits}
    for cost in found:
        wanted = options.shard_logits and cost.strategy in with_logits
        if cost.shard_logits == wanted or cost is best:
            yield cost
