"""Gives advice on a choice beyond its costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tp_embed.partition import Partition

from .estimate import Cost, cost
from .report import name_of, size
from .setup import GIB, Setup, head_cut, sharers
from .tokens import zipf_owner_share
from .traffic import Network


def saved_by_local_logits(
    setup: Setup, chosen: Cost, network: Network | None
) -> dict[str, Any] | None:
    """Returns the bytes and seconds that ``shard_logits`` would save; ``None`` if it is on, saves
    nothing, or the head is not cut over the vocabulary."""
    if chosen.shard_logits or setup.fuse_loss or head_cut(setup, chosen.strategy) != "vocab":
        return None
    other = cost(setup, chosen.strategy, True, chosen.dedup)
    saved = {"peak": chosen.peak - other.peak, "sent": chosen.sent - other.sent}
    seconds = None
    if network is not None:
        seconds = chosen.seconds(setup, network) - other.seconds(setup, network)
    return saved | {"seconds": seconds} if saved["peak"] > 0 or saved["sent"] > 0 else None


def logits_line(chosen: Cost, saved: dict[str, Any]) -> str:
    """Formats the result of :func:`saved_by_local_logits`."""
    time = "" if saved["seconds"] is None else f" ({1e3 * saved['seconds']:.1f} ms)"
    return (
        f"shard_logits is off: with it, {name_of(chosen)} would need {size(saved['peak'])} less at "
        f"the peak of a step and send {size(saved['sent'])} less{time}: --shard-logits"
    )


def owner_line(setup: Setup, chosen: Cost) -> str | None:
    """Says how unevenly a table over all ranks is used if its frequent rows are neighbours."""
    known = setup.owner_share is not None or setup.unique_share is not None
    ranks = sharers(setup, "world")
    if chosen.strategy != "world" or setup.placement == "cyclic" or known or ranks == 1:
        return None
    share = zipf_owner_share(setup.vocab_size, setup.tokens, ranks)
    return (
        f"rows in use are taken to be spread evenly, 1/{ranks} on each rank; if small ids are the "
        f"frequent ones, {100 * share:.0f}% are on the first: --owner-share {share:.2f}, or "
        "--placement cyclic"
    )


def warnings_of(
    setup: Setup, chosen: Cost, network: Network | None, memory: float | None
) -> Iterator[str]:
    """Yields warnings about the choice."""
    if memory is not None and chosen.peak > memory:
        need, have = chosen.peak / GIB, memory / GIB
        name = name_of(chosen)
        yield f"{name} needs {need:.2f} GiB at the peak of a step, but only {have} are available."
    if chosen.strategy != "none":
        length = setup.embed_dim if chosen.strategy == "embed" else setup.vocab_size
        ranks = sharers(setup, chosen.strategy)
        holders = -(-length // Partition(length, ranks).block)
        if chosen.strategy == "world" and setup.placement == "cyclic":
            holders = min(length, ranks)
        if holders < ranks:
            yield f"{ranks - holders} of {ranks} ranks hold no part of the table."
    if network is None:
        return
    if network.crosses_nodes(setup, "tp"):
        yield (
            f"{setup.tp_size} tensor-parallel ranks span several nodes of "
            f"{network.gpus_per_node}: their collectives wait for the slower links."
        )
    if network.crosses_nodes(setup, "dp") and network.inter_bandwidth is None:
        yield "Links between nodes are assumed as fast as inside a node: set --inter-bandwidth."
