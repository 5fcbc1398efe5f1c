"""Estimates what a table with an optimizer of its own holds and sends: the arithmetic of
:mod:`tp_embed.optim`, and of the engine that averages its gradients over data-parallel ranks.

Such a table is a buffer to DeepSpeed: each data-parallel rank holds its whole shard, at each stage.
"""

from __future__ import annotations

from collections.abc import Iterator

from .setup import ITEM_BYTES, Setup, Strategy, shape
from .tokens import rows_in_use
from .traffic import Transfer


def has_own_optimizer(setup: Setup, strategy: Strategy) -> bool:
    """Returns whether the table has an optimizer of its own: the engine's trains whole tables."""
    return setup.table_optimizer is not None and strategy != "none"


def states_of_own(setup: Setup, strategy: Strategy) -> tuple[int, int, int, int]:
    """Returns the bytes of weight, gradients, master copy and moments. The gradients of all
    micro-batches are kept as they come: 8 bytes for the number of a row, and the row."""
    (rows, columns), item = shape(setup, strategy), ITEM_BYTES[setup.dtype]
    items = rows * columns
    batches = setup.dp_size if strategy == "world" else 1
    used = rows_in_use(setup, strategy, batches) * setup.accumulation_steps
    moments = {"rowwise_adagrad": rows, "rowwise_adam": items + rows, "lazy_adam": 2 * items}
    decay = 8 * rows if setup.table_decay else 0
    optimizer = setup.table_optimizer or "lazy_adam"
    master = 2 * items if item == 2 else 0  # The lower halves of the fp32 values.
    return items * item, used * (8 + columns * item), master, 4 * moments[optimizer] + decay


def exchange_of_own(setup: Setup, strategy: Strategy) -> Iterator[Transfer]:
    """Yields the transfers of a step: how many rows each data-parallel rank has used, which ones,
    and their gradients in fp32; and for states of rows that are cut, their squares."""
    columns, steps = shape(setup, strategy)[1], setup.accumulation_steps
    if strategy != "world":  # Else the lookup's backward has averaged them.
        used = rows_in_use(setup, strategy, steps)
        for payload in (8, 8 * used, 4 * columns * used):
            yield Transfer("rows in use", "step", "all_gather", "dp", setup.dp_size, payload)
    if strategy == "embed" and setup.table_optimizer != "lazy_adam":
        squares = 8 * rows_in_use(setup, strategy, steps * setup.dp_size)
        yield Transfer("squares", "step", "all_reduce", "tp", setup.tp_size, squares)
