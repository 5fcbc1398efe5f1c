"""Formats costs as text, and as data for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .estimate import Cost
from .setup import GIB, Setup
from .tokens import distinct
from .traffic import Network, Transfer

_MEMORY = {
    "weight": "weight",
    "gradient": "gradient",
    "master": "master copy, fp32",
    "moments": "moments, fp32",
    "gathered": "gathered by ZeRO",
    "staging": "kept for the next lookup",
    "exchange": "lookup",
    "logits": "logits and loss",
    "peak": "peak of a step",
    "init_sharded": "to build, shard by shard",
    "init_whole": "to build whole, then shard",
}


def as_lines(
    setup: Setup, found: Sequence[Cost], marks: Sequence[str], network: Network | None
) -> list[str]:
    """Formats a table with a column per strategy, and ``marks`` below their names."""
    return [_heading(setup), *_columns(list(_rows(setup, found, marks, network)))]


def as_data(
    cost: Cost, setup: Setup, network: Network | None, memory: float | None
) -> dict[str, Any]:
    """Converts the cost of a strategy to JSON values, with sizes in bytes."""

    def seconds(transfer: Transfer) -> dict[str, float]:
        return {} if network is None else {"seconds": network.seconds(setup, transfer)}

    return {
        "name": name_of(cost),
        "strategy": cost.strategy,
        "dedup": cost.dedup,
        "shard_logits": cost.shard_logits,
        "memory": {name: getattr(cost, name) for name in _MEMORY},
        "fits": None if memory is None else cost.peak <= memory,
        "rows_in_use": cost.rows,
        "transfers": [asdict(t) | {"sent": t.sent} | seconds(t) for t in cost.transfers],
        "sent": cost.sent,
        "seconds": None if network is None else cost.seconds(setup, network),
    }


def name_of(cost: Cost) -> str:
    """Returns the display name of a strategy."""
    return ", ".join(filter(None, _names(cost)))


def _names(cost: Cost) -> tuple[str, str, str]:
    return (
        cost.strategy,
        "dedup" if cost.dedup else "",
        "local logits" if cost.shard_logits else "",
    )


def size(nbytes: float) -> str:
    """Formats a number of bytes for humans."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} bytes"


def _heading(setup: Setup) -> str:
    head = f"{'tied' if setup.tied else 'untied'} head" if setup.head else "no head"
    head += ", fused loss" if setup.fuse_loss else ""
    own = f", {setup.table_optimizer} for the table" if setup.table_optimizer else ""
    sums = f" (gradients {setup.grad_dtype})" if setup.grad_dtype else ""
    steps = f" x {setup.accumulation_steps}" if setup.accumulation_steps > 1 else ""
    share = distinct(setup) / setup.tokens
    law = " by Zipf's law" if setup.unique_share is None else ""
    blocks = f" in {setup.tp_size} blocks" if setup.output == "sequence" else ""
    return (
        f"{setup.vocab_size} x {setup.embed_dim}, {head}; TP {setup.tp_size}, DP {setup.dp_size}, "
        f"ZeRO {setup.zero_stage}; {setup.dtype}{sums}, {setup.optimizer}{own}; "
        f"{setup.tokens}{steps} tokens{blocks}, {100 * share:.0f}% distinct{law}"
    )


def _rows(
    setup: Setup, found: Sequence[Cost], marks: Sequence[str], network: Network | None
) -> Iterator[list[str]]:
    least = min(cost.peak for cost in found)
    unit, name = next(
        (u, n) for u, n in ((GIB, "GiB"), (1 << 20, "MiB"), (1, "bytes")) if least >= u
    )

    def amount(nbytes: float) -> str:
        return f"{nbytes / unit:.3f}" if unit > 1 else f"{nbytes:.0f}"

    names = [list(names) for names in zip(*map(_names, found), strict=True)]
    yield from (["", *row] for row in names if any(row))
    yield [f"memory, {name}", *marks]
    for field, label in _MEMORY.items():
        if any(getattr(cost, field) for cost in found):
            yield [f"  {label}", *(amount(getattr(cost, field)) for cost in found)]

    if setup.table_optimizer or any(cost.strategy == "world" for cost in found):
        yield ["rows in use in a step", *(f"{cost.rows}" for cost in found)]

    # Strategies may send the same thing by different collectives.
    keys = {_key(transfer): None for cost in found for transfer in cost.transfers}
    ordered = sorted(keys, key=lambda key: ("forward", "backward", "step").index(key[0]))
    if not ordered:
        return
    yield [f"sent in a step, {name}", *("" for _ in found)]
    for phase, over, what, operation in ordered:
        key = phase, over, what, operation
        sums = [sum(t.sent for t in cost.transfers if _key(t) == key) for cost in found]
        label = f"  {phase}, {over}: {operation.replace('_', '-')} of {what}"
        yield [label, *(amount(nbytes) if nbytes else "" for nbytes in sums)]
    yield ["  total", *(amount(cost.sent) for cost in found)]
    if network is not None:
        yield ["time to send, ms", *("" for _ in found)]
        for over in ("tp", "dp", "world"):
            parts = [[t for t in cost.transfers if t.over == over] for cost in found]
            if over == "world" and not any(parts):
                continue
            sums = [sum(network.seconds(setup, t) for t in part) for part in parts]
            yield [f"  {over.upper()}", *(f"{1e3 * seconds:.3f}" for seconds in sums)]


def _key(transfer: Transfer) -> tuple[str, str, str, str]:
    return transfer.phase, transfer.over.upper(), transfer.name, transfer.operation


def _columns(rows: list[list[str]]) -> Iterator[str]:
    """Aligns the first column to the left, and the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for label, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        yield "  ".join((label.ljust(first), *right)).rstrip()
