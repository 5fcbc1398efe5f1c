"""What the ranks send in a step, and how long that takes.

What tensor-parallel ranks send is that of the docstrings of :mod:`tp_embed.embedding`,
:mod:`tp_embed.head` and :mod:`tp_embed.loss`; what data-parallel ranks do, that of the ZeRO of
DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .setup import ITEM_BYTES, Setup, Strategy, block, head_cut, refuse, sparse_bytes

Operation = Literal["all_gather", "all_reduce", "reduce_scatter"]


@dataclass(frozen=True)
class Transfer:
    """A collective of ``ranks`` ranks, which put in ``payload`` bytes each; ``count`` of them."""

    name: str
    phase: Literal["forward", "backward", "step"]
    operation: Operation
    over: Literal["tp", "dp"]
    ranks: int
    payload: int
    count: int = 1

    @property
    def sent(self) -> float:
        """The bytes that a rank sends, by the ring algorithms that :mod:`tp_embed.gang` cites."""
        share = {"all_gather": 1.0, "all_reduce": 2 / self.ranks, "reduce_scatter": 1 / self.ranks}
        return self.count * share[self.operation] * (self.ranks - 1) * self.payload

    @property
    def messages(self) -> int:
        """How many messages a rank sends one after the other."""
        return self.count * (self.ranks - 1) * (2 if self.operation == "all_reduce" else 1)


@dataclass(frozen=True)
class Network:
    """A message of n bytes takes :math:`\\alpha + n / \\beta`, as in Thakur, Rabenseifner and
    Gropp, "Optimization of collective communication operations in MPICH" (2005).

    A ring over several nodes is as slow as its slowest link. Ranks of a TP group are neighbours.

    :param bandwidth: :math:`\\beta`, what a GPU sends inside a node, in bytes a second.
    :param latency: :math:`\\alpha`, in seconds.
    :param gpus_per_node: if ``None``, there is one node.
    :param inter_bandwidth: of a GPU between nodes; if ``None``, as inside of one.
    :param inter_latency: likewise.
    """

    bandwidth: float
    latency: float = 0.0
    gpus_per_node: int | None = None
    inter_bandwidth: float | None = None
    inter_latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth", "inter_bandwidth", "gpus_per_node"):
            if (value := getattr(self, name)) is not None and not value > 0:
                refuse(name, "greater than 0", value)
        for name in ("latency", "inter_latency"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                refuse(name, "greater than or equal to 0", value)

    def crosses_nodes(self, setup: Setup, over: Literal["tp", "dp"]) -> bool:
        """Whether the groups of that kind have ranks on several nodes."""
        ranks = setup.tp_size if over == "tp" else setup.tp_size * setup.dp_size
        return self.gpus_per_node is not None and ranks > self.gpus_per_node

    def seconds(self, setup: Setup, transfer: Transfer) -> float:
        """How long a transfer takes if nothing overlaps with it."""
        bandwidth, latency = self.bandwidth, self.latency
        if self.crosses_nodes(setup, transfer.over):
            bandwidth = self.inter_bandwidth or bandwidth
            latency = latency if self.inter_latency is None else self.inter_latency
        return transfer.messages * latency + transfer.sent / bandwidth


def transfers(
    setup: Setup, strategy: Strategy, shard_logits: bool, sizes: Sequence[int]
) -> tuple[Transfer, ...]:
    """All of a step, for the Parameters of a rank, which have ``sizes`` items."""
    found = (
        *_exchange(setup, strategy),
        *_project(setup, head_cut(setup, strategy), shard_logits),
        *_data_parallel(setup, strategy, sizes),
    )
    return tuple(transfer for transfer in found if transfer.ranks > 1)


def _exchange(setup: Setup, strategy: Strategy) -> Iterator[Transfer]:
    """What the lookup sends."""
    item, count = ITEM_BYTES[setup.dtype], setup.accumulation_steps
    if strategy == "embed":
        payload = setup.tokens * block(setup, "embed") * item
        yield Transfer("table", "forward", "all_gather", "tp", setup.tp_size, payload, count)
    elif strategy == "vocab":
        payload = setup.tokens * setup.embed_dim * item
        yield Transfer("table", "forward", "all_reduce", "tp", setup.tp_size, payload, count)


def _project(setup: Setup, cut: Strategy, shard_logits: bool) -> Iterator[Transfer]:
    """What the head and the loss send."""
    item, count, ranks = ITEM_BYTES[setup.dtype], setup.accumulation_steps, setup.tp_size
    tokens, hidden = setup.tokens, setup.tokens * setup.embed_dim * item
    if cut == "embed":
        logits, columns = tokens * setup.vocab_size * item, tokens * block(setup, "embed") * item
        yield Transfer("logits", "forward", "all_reduce", "tp", ranks, logits, count)
        yield Transfer("hidden states", "backward", "all_gather", "tp", ranks, columns, count)
    elif cut == "vocab":
        if shard_logits:
            for numbers in (1, 2):  # The highest logit; the sum of the others, and the target's.
                payload = 4 * numbers * tokens
                yield Transfer("loss", "forward", "all_reduce", "tp", ranks, payload, count)
        else:
            logits = tokens * block(setup, "vocab") * item
            yield Transfer("logits", "forward", "all_gather", "tp", ranks, logits, count)
        yield Transfer("hidden states", "backward", "all_reduce", "tp", ranks, hidden, count)


def _data_parallel(setup: Setup, strategy: Strategy, sizes: Sequence[int]) -> Iterator[Transfer]:
    """What ZeRO sends. DeepSpeed all-reduces gradients at the stages 1 and 2 too."""
    item, ranks, count = ITEM_BYTES[setup.dtype], setup.dp_size, setup.accumulation_steps
    if setup.zero_stage == 3:
        uses = [*sizes, *sizes[: setup.tied]]  # The head uses a tied table again.
        gathered = sum(-(-size // ranks) for size in uses) * item
        # The Parameters are gathered for each use, unless they are still there from the last one.
        yield Transfer("weight", "forward", "all_gather", "dp", ranks, gathered, count)
        yield Transfer("weight", "backward", "all_gather", "dp", ranks, gathered, count)
        whole = sum(-(-size // ranks) * ranks for size in sizes) * item
        yield Transfer("gradient", "backward", "reduce_scatter", "dp", ranks, whole, count)
        return
    dense = sum(sizes) * item
    if setup.sparse:
        dense -= sizes[0] * item
        rows = sparse_bytes(setup, strategy)
        yield Transfer("gradient", "backward", "all_gather", "dp", ranks, rows)
    if dense:  # ZeRO 2 does not wait for the last micro-batch.
        times = count if setup.zero_stage == 2 else 1
        yield Transfer("gradient", "backward", "all_reduce", "dp", ranks, dense, times)
    if setup.zero_stage:
        share = -(-sum(sizes) // ranks) * item
        yield Transfer("weight", "step", "all_gather", "dp", ranks, share)
