"""What people should know of a choice beside its costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tp_embed.partition import Partition

from .estimate import Cost, cost
from .report import name_of, size
from .setup import GIB, Setup, head_cut
from .traffic import Network


def saved_by_local_logits(
    setup: Setup, chosen: Cost, network: Network | None
) -> dict[str, Any] | None:
    """What ``shard_logits`` would save, in bytes and seconds, where it is off and the head of the
    choice is cut over the vocabulary."""
    if chosen.shard_logits or head_cut(setup, chosen.strategy) != "vocab":
        return None
    other = cost(setup, chosen.strategy, True, chosen.dedup)
    saved = {"peak": chosen.peak - other.peak, "sent": chosen.sent - other.sent}
    seconds = None
    if network is not None:
        seconds = chosen.seconds(setup, network) - other.seconds(setup, network)
    return saved | {"seconds": seconds} if saved["peak"] > 0 or saved["sent"] > 0 else None


def logits_line(chosen: Cost, saved: dict[str, Any]) -> str:
    """The same, for people."""
    time = "" if saved["seconds"] is None else f" ({1e3 * saved['seconds']:.1f} ms)"
    return (
        f"shard_logits is off: with it, {name_of(chosen)} would need {size(saved['peak'])} less at "
        f"the peak of a step and send {size(saved['sent'])} less{time}: --shard-logits"
    )


def warnings_of(
    setup: Setup, chosen: Cost, network: Network | None, memory: float | None
) -> Iterator[str]:
    """What is wrong with the choice."""
    if memory is not None and chosen.peak > memory:
        need, have = chosen.peak / GIB, memory / GIB
        yield f"{name_of(chosen)} needs {need:.2f} GiB at the peak of a step, but there are {have}."
    if chosen.strategy != "none":
        name = "vocab_size" if chosen.strategy == "vocab" else "embed_dim"
        length = getattr(setup, name)
        holders = -(-length // Partition(length, setup.tp_size).block)
        if holders < setup.tp_size:
            idle = setup.tp_size - holders
            yield f"{idle} of {setup.tp_size} ranks hold nothing of the table."
    if network is None:
        return
    if network.crosses_nodes(setup, "tp"):
        yield (
            f"{setup.tp_size} tensor-parallel ranks are on several nodes of "
            f"{network.gpus_per_node}: what they send waits for the slower links."
        )
    if network.crosses_nodes(setup, "dp") and network.inter_bandwidth is None:
        yield "Links between nodes are taken to be as fast as those inside: --inter-bandwidth."
