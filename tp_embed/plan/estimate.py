"""Estimates the costs of each strategy, and recommends one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tp_embed import partition

from .lookups import lookup_of
from .own_tables import has_own_optimizer, states_of_own
from .setup import (
    ITEM_BYTES,
    MOMENTS,
    Setup,
    Strategy,
    block,
    head_cut,
    problem_of_world,
    refuse,
    shard,
)
from .tokens import rows_in_use, sparse_bytes
from .traffic import Network, Transfer
from .transfers import transfers


@dataclass(frozen=True)
class Cost:
    """The cost of one strategy for the rank with the largest shard, memory in bytes.

    :param dedup: whether repeated ids are sent once.
    :param weight: the weight, as ZeRO holds it between uses; ``gradient``, ``master`` (fp32 copy)
        and ``moments`` likewise, at the end of a backward.
    :param gathered: additional memory that ZeRO needs to use one Parameter.
    :param staging: buffers that the lookup keeps between exchanges, on a CPU.
    :param exchange: the peak of the lookup of a micro-batch, including ``staging`` and its output.
    :param logits: the peak of head and loss for a micro-batch.
    :param init_sharded: the peak when layers are built and initialized shard by shard.
    :param init_whole: the peak when a model is built whole, then sharded.
    :param rows: the most rows of the rank's shard that a step uses, over all micro-batches and
        data-parallel ranks.
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
    rows: int
    transfers: tuple[Transfer, ...]

    @property
    def states(self) -> int:
        """The bytes held between steps."""
        return self.weight + self.gradient + self.master + self.moments + self.staging

    @property
    def peak(self) -> int:
        """The peak of a step. The exchange and the logits don't overlap."""
        return self.states + self.gathered + max(self.exchange - self.staging, self.logits)

    @property
    def sent(self) -> float:
        """The bytes that the rank sends in a step."""
        return sum(transfer.sent for transfer in self.transfers)

    def seconds(self, setup: Setup, network: Network) -> float:
        """Returns the time of all transfers of a step, if nothing overlaps."""
        return sum(network.seconds(setup, transfer) for transfer in self.transfers)


def auto_strategy(setup: Setup) -> Strategy:
    """Chooses the strategy like ``"auto"`` of :func:`tp_embed.shard_embeddings`, by the sizes of
    table and gang and the tie only; see :func:`tp_embed.partition.auto_strategy`."""
    return partition.auto_strategy(
        setup.vocab_size, setup.embed_dim, setup.tp_size, tied=setup.tied
    )


def costs(setup: Setup) -> list[Cost]:
    """Returns the costs of all strategies: with and without de-duplication if the table is cut, and
    with and without sharded logits if the head is cut over the vocabulary. Leaves out ``"world"``
    where it is refused, or there is one rank."""
    strategies: tuple[Strategy, ...] = ("none", "embed", "vocab")
    if setup.tp_size * setup.dp_size > 1 and problem_of_world(setup) is None:
        strategies += ("world",)
    return [
        cost(setup, strategy, shard_logits, dedup)
        for strategy in strategies
        for shard_logits in (False, True)[: 1 + _may_shard_logits(setup, strategy)]
        for dedup in (False, True)[: 1 + (strategy != "none")]
    ]


def _may_shard_logits(setup: Setup, strategy: Strategy) -> bool:
    return head_cut(setup, strategy) == "vocab" and not setup.fuse_loss


def cost(setup: Setup, strategy: Strategy, shard_logits: bool = False, dedup: bool = False) -> Cost:
    """Estimates the cost of one strategy.

    :raises ValueError: ``shard_logits`` for a head that is not cut over the vocabulary, ``dedup``
        for a table that is not cut, or ``"world"`` for one that can't be cut so.
    """
    problem = problem_of_world(setup) if strategy == "world" else None
    if problem is not None:
        raise ValueError(problem)
    head = head_cut(setup, strategy)
    if shard_logits and head != "vocab":
        refuse("shard_logits", "false for a head that is not cut over the vocabulary", True)
    if dedup and strategy == "none":
        refuse("dedup", "false for a table that is not cut", True)
    table, heads = shard(setup, strategy), []
    if setup.head and not setup.tied:
        heads.append(shard(setup, head))
    sizes, own = [table, *heads], has_own_optimizer(setup, strategy)
    item, tokens = ITEM_BYTES[setup.dtype], setup.tokens
    if not setup.head:
        logits = 0
    elif setup.fuse_loss and head != "none":
        logits = _fused(setup, head)
    elif shard_logits:  # The logits, and their gradient in fp32 and in their dtype.
        logits = tokens * block(setup, "vocab") * (8 if item == 4 else 4 + 2 * item)
    else:  # The logits, and in fp32 the log-softmax and the gradients of both.
        logits = tokens * setup.vocab_size * (12 + item)
    whole = setup.vocab_size * setup.embed_dim * len(sizes)
    lookup = lookup_of(setup, strategy, dedup)
    return Cost(
        strategy,
        shard_logits,
        dedup,
        *_states_of_all(setup, strategy, table, heads),
        lookup.kept * item if setup.device == "cpu" else 0,
        lookup.items * item,
        logits,
        sum(sizes) * item,
        (whole if strategy == "none" else whole + sum(sizes)) * item,
        rows_in_use(setup, strategy, setup.accumulation_steps * setup.dp_size),
        transfers(
            setup, strategy, shard_logits, dedup, heads if own or strategy == "world" else sizes
        ),
    )


def _fused(setup: Setup, cut: Strategy) -> int:
    """Returns the most bytes that :meth:`tp_embed.OutputHead.loss` holds: the gradient of the
    weight, a buffer of logits in fp32, both twice where ranks sum logits, two blocks of the weight,
    and sums of the gradient of the hidden states."""
    tokens, width, rows = setup.tokens, setup.embed_dim, block(setup, "vocab")
    gradient, copies = rows * width * ITEM_BYTES[setup.dtype], 1
    if cut == "embed":
        rows, copies = setup.vocab_size, 2
        gradient = rows * block(setup, "embed") * 4
    buffer = 4 * min(tokens * rows, max(2 * tokens * width + width**2, 1 << 18))
    blocks = 2 * (2 if setup.device == "cpu" else 64) << 20
    return copies * (gradient + buffer) + blocks + 8 * tokens * width


def _states_of_all(
    setup: Setup, strategy: Strategy, table: int, heads: list[int]
) -> tuple[int, int, int, int, int]:
    if not has_own_optimizer(setup, strategy):
        return _states(setup, strategy, [table, *heads])
    *of_heads, gathered = _states(setup, "none", heads)
    own = zip(states_of_own(setup, strategy), of_heads, strict=True)
    weight, gradient, master, moments = map(sum, own)
    return weight, gradient, master, moments, gathered


def _states(setup: Setup, strategy: Strategy, sizes: list[int]) -> tuple[int, int, int, int, int]:
    """Returns the bytes of weight, gradient, master copy, moments and gathered Parameters, for
    Parameters of ``sizes`` items."""
    dp_size, stage, total = setup.dp_size, setup.zero_stage, sum(sizes)
    if not total:
        return 0, 0, 0, 0, 0
    item, sum_item = ITEM_BYTES[setup.dtype], ITEM_BYTES[setup.grad_dtype or setup.dtype]
    moments = 4 * MOMENTS[setup.optimizer]
    if stage == 0:
        gradient = total * item
        if setup.sparse:
            copies = 1 if strategy == "world" else dp_size
            gradient += copies * sparse_bytes(setup, strategy) - sizes[0] * item
        return total * item, gradient, 0, total * moments, 0
    if stage == 3:
        share = sum(-(-size // dp_size) for size in sizes)
        in_use = 2 * max(sizes) * item  # A whole Parameter and its gradient.
        return share * item, share * sum_item, share * 4, share * moments, in_use
    share, in_use = -(-total // dp_size), 0
    if stage == 1:  # Accumulation in another dtype needs a second copy of the gradient.
        gradient = total * (item if sum_item == item else item + sum_item)
    elif sum_item == item:
        gradient = _overlapping(sizes, share) * item
    else:
        gradient, in_use = share * sum_item, max(sizes) * item
    return total * item, gradient, share * 4, share * moments, in_use


def _overlapping(sizes: list[int], share: int) -> int:
    """Returns the most gradient items on one rank at ZeRO 2: each rank owns ``share`` consecutive
    items of all Parameters, and keeps the whole gradient of each Parameter that they overlap."""
    ends = list(itertools.accumulate(sizes))
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return max(
        sum(end - start for start, end in spans if start < first + share and first < end)
        for first in range(0, ends[-1], share)
    )


def recommend(
    setup: Setup, found: Sequence[Cost], network: Network | None = None, memory: float | None = None
) -> tuple[Cost, str]:
    """Recommends one of the costs, with a reason. Chooses the least time to send, or without a
    network the fewest bytes, among costs that fit ``memory``. Without ``memory``, chooses among
    costs within 1% of the lowest peak.

    :param memory: bytes that a rank has for table, head and logits.
    """

    def effort(cost: Cost) -> float:
        return cost.sent if network is None else cost.seconds(setup, network)

    least = min(found, key=lambda cost: (cost.peak, effort(cost)))
    limit = 1.01 * least.peak if memory is None else memory
    fitting = [cost for cost in found if cost.peak <= limit]
    if not fitting:
        return least, "needs the least memory, but none fits"
    best = min(fitting, key=lambda cost: (effort(cost), cost.peak))
    if len(fitting) == 1:
        return best, "needs the least memory" if memory is None else "the only one that fits"
    which = "need the least memory" if memory is None else "fit"
    sends = "sends the least" if network is None else "takes the least time to send"
    return best, f"{sends} among those that {which}"
