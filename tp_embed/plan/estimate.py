"""The arithmetic: memory of each strategy, and which one to choose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tp_embed import partition

from .lookups import lookup_of
from .setup import ITEM_BYTES, MOMENTS, Setup, Strategy, block, head_cut, refuse, shard
from .tokens import sparse_bytes
from .traffic import Network, Transfer
from .transfers import transfers


@dataclass(frozen=True)
class Cost:
    """What one strategy costs the rank with the largest shard, memory in bytes.

    :param dedup: whether an id that occurs several times is sent once.
    :param weight: as ZeRO holds it between uses; ``gradient``, ``master`` (copy in fp32) and
        ``moments`` likewise, at the end of a backward.
    :param gathered: what ZeRO holds of one Parameter for its use on top of that.
    :param staging: what the lookup keeps from one exchange to the next, on a CPU.
    :param exchange: the most that the lookup takes for a micro-batch, with that and its output.
    :param logits: the most that head and loss take for it.
    :param init_sharded: the peak as the layers are built and drawn shard by shard.
    :param init_whole: the peak where a model is built first and sharded then.
    """

    strategy: Strategy
    shard_logits: bool
    dedup: bool
    weight: int
    gradient: int
    master: int
    moments: int
    gathered: int
    staging: int
    exchange: int
    logits: int
    init_sharded: int
    init_whole: int
    transfers: tuple[Transfer, ...]

    @property
    def states(self) -> int:
        """What is held from step to step."""
        return self.weight + self.gradient + self.master + self.moments + self.staging

    @property
    def peak(self) -> int:
        """The most in a step. The exchange and the logits come one after the other."""
        return self.states + self.gathered + max(self.exchange - self.staging, self.logits)

    @property
    def sent(self) -> float:
        """The bytes that the rank sends in a step."""
        return sum(transfer.sent for transfer in self.transfers)

    def seconds(self, setup: Setup, network: Network) -> float:
        """The time of all transfers of a step, if nothing overlaps."""
        return sum(network.seconds(setup, transfer) for transfer in self.transfers)


def auto_strategy(setup: Setup) -> Strategy:
    """Chooses the strategy as ``"auto"`` of :func:`tp_embed.shard_embeddings` does, by the sizes of
    table and gang and the tie alone; see :func:`tp_embed.partition.auto_strategy`."""
    return partition.auto_strategy(
        setup.vocab_size, setup.embed_dim, setup.tp_size, tied=setup.tied
    )


def costs(setup: Setup) -> list[Cost]:
    """All strategies: with and without de-duplication where a table is cut, and with logits that
    stay sharded where the head is cut over the vocabulary."""
    strategies: tuple[Strategy, ...] = ("none", "embed", "vocab")
    return [
        cost(setup, strategy, shard_logits, dedup)
        for strategy in strategies
        for shard_logits in (False, True)[: 1 + (head_cut(setup, strategy) == "vocab")]
        for dedup in (False, True)[: 1 + (strategy != "none")]
    ]


def cost(setup: Setup, strategy: Strategy, shard_logits: bool = False, dedup: bool = False) -> Cost:
    """
    :raises ValueError: ``shard_logits`` for a head that is not cut over the vocabulary, or
        ``dedup`` for a table that is not cut.
    """
    head = head_cut(setup, strategy)
    if shard_logits and head != "vocab":
        refuse("shard_logits", "false for a head that is not cut over the vocabulary", True)
    if dedup and strategy == "none":
        refuse("dedup", "false for a table that is not cut", True)
    sizes = [shard(setup, strategy)]
    if setup.head and not setup.tied:
        sizes.append(shard(setup, head))
    item, tokens = ITEM_BYTES[setup.dtype], setup.tokens
    if not setup.head:
        logits = 0
    elif shard_logits:  # The logits, a gradient of each in fp32, and that in their dtype.
        logits = tokens * block(setup, "vocab") * (8 if item == 4 else 4 + 2 * item)
    else:  # The logits, and in fp32 the log-softmax and the gradients of both.
        logits = tokens * setup.vocab_size * (12 + item)
    whole = setup.vocab_size * setup.embed_dim * len(sizes)
    lookup = lookup_of(setup, strategy, dedup)
    return Cost(
        strategy,
        shard_logits,
        dedup,
        *_states(setup, strategy, sizes),
        lookup.kept * item if setup.device == "cpu" else 0,
        lookup.items * item,
        logits,
        sum(sizes) * item,
        (whole if strategy == "none" else whole + sum(sizes)) * item,
        transfers(setup, strategy, shard_logits, dedup, sizes),
    )


def _states(setup: Setup, strategy: Strategy, sizes: list[int]) -> tuple[int, int, int, int, int]:
    """Weight, gradient, master copy, moments, and what is gathered, of Parameters of ``sizes``."""
    dp_size, stage, total = setup.dp_size, setup.zero_stage, sum(sizes)
    item, sum_item = ITEM_BYTES[setup.dtype], ITEM_BYTES[setup.grad_dtype or setup.dtype]
    moments = 4 * MOMENTS[setup.optimizer]
    if stage == 0:
        gradient = total * item
        if setup.sparse:
            gradient += dp_size * sparse_bytes(setup, strategy) - sizes[0] * item
        return total * item, gradient, 0, total * moments, 0
    if stage == 3:
        share = sum(-(-size // dp_size) for size in sizes)
        in_use = 2 * max(sizes) * item  # A whole Parameter and its gradient.
        return share * item, share * sum_item, share * 4, share * moments, in_use
    share, in_use = -(-total // dp_size), 0
    if stage == 1:  # Where they are added up in another dtype, gradients are there as well.
        gradient = total * (item if sum_item == item else item + sum_item)
    elif sum_item == item:
        gradient = _overlapping(sizes, share) * item
    else:
        gradient, in_use = share * sum_item, max(sizes) * item
    return total * item, gradient, share * 4, share * moments, in_use


def _overlapping(sizes: list[int], share: int) -> int:
    """At ZeRO 2 each rank has a share of all Parameters, one after the other, and keeps the whole
    gradient of each of which it has a part: the most that a rank keeps."""
    ends = list(itertools.accumulate(sizes))
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return max(
        sum(end - start for start, end in spans if start < first + share and first < end)
        for first in range(0, ends[-1], share)
    )


def recommend(
    setup: Setup, found: Sequence[Cost], network: Network | None = None, memory: float | None = None
) -> tuple[Cost, str]:
    """The one of the costs to choose, and why: of those that fit ``memory``, the one that sends the
    fastest, or without a network the least; without ``memory``, of those that need the least, give
    or take a percent.

    :param memory: what a rank has for table, head and logits, in bytes.
    """

    def effort(cost: Cost) -> float:
        return cost.sent if network is None else cost.seconds(setup, network)

    least = min(found, key=lambda cost: (cost.peak, effort(cost)))
    limit = 1.01 * least.peak if memory is None else memory
    fitting = [cost for cost in found if cost.peak <= limit]
    if not fitting:
        return least, "none fits; it needs the least memory"
    best = min(fitting, key=lambda cost: (effort(cost), cost.peak))
    if len(fitting) == 1:
        return best, "it needs the least memory" if memory is None else "it alone fits"
    which = "need the least memory" if memory is None else "fit"
    sends = "sends the least" if network is None else "takes the least time to send"
    return best, f"of those that {which} it {sends}"
