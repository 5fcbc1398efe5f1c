"""Models the bytes of a collective, and its time on a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .setup import Setup, refuse

Operation = Literal["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]
Phase = Literal["forward", "backward", "step"]
Over = Literal["tp", "dp", "world"]


@dataclass(frozen=True)
class Transfer:
    """A collective over ``ranks`` ranks, ``count`` times. ``payload`` is the largest input of any
    rank in bytes; for an all-to-all, without the part for the rank itself."""

    name: str
    phase: Phase
    operation: Operation
    over: Over
    ranks: int
    payload: int
    count: int = 1

    @property
    def sent(self) -> float:
        """The bytes that a rank sends, for the ring algorithms cited in :mod:`tp_embed.gang`."""
        times: dict[Operation, float] = {
            "all_gather": self.ranks - 1,
            "all_reduce": 2 * (self.ranks - 1) / self.ranks,
            "all_to_all": 1,
            "reduce_scatter": (self.ranks - 1) / self.ranks,
        }
        return self.count * self.payload * times[self.operation]

    @property
    def messages(self) -> int:
        """The number of messages that a rank sends in sequence."""
        return self.count * (self.ranks - 1) * (2 if self.operation == "all_reduce" else 1)


@dataclass(frozen=True)
class Network:
    """A message of n bytes takes :math:`\\alpha + n / \\beta`, as in Thakur, Rabenseifner and
    Gropp, "Optimization of collective communication operations in MPICH" (2005).

    A ring over several nodes is as slow as its slowest link. Ranks of a TP group are adjacent.

    :param bandwidth: :math:`\\beta`, of a GPU inside a node, in bytes per second.
    :param latency: :math:`\\alpha`, in seconds.
    :param gpus_per_node: if ``None``, all GPUs are in one node.
    :param inter_bandwidth: of a GPU between nodes; if ``None``, the same as inside.
    :param inter_latency: between nodes; if ``None``, the same as inside.
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

    def crosses_nodes(self, setup: Setup, over: Over) -> bool:
        """Returns whether the TP or DP groups, or all ranks, are on several nodes."""
        ranks = setup.tp_size if over == "tp" else setup.tp_size * setup.dp_size
        return self.gpus_per_node is not None and ranks > self.gpus_per_node

    def seconds(self, setup: Setup, transfer: Transfer) -> float:
        """Returns the time of a transfer if nothing overlaps with it."""
        bandwidth, latency = self.bandwidth, self.latency
        if self.crosses_nodes(setup, transfer.over):
            bandwidth = self.inter_bandwidth or bandwidth
            latency = latency if self.inter_latency is None else self.inter_latency
        return transfer.messages * latency + transfer.sent / bandwidth
