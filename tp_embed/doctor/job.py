"""The connected ranks of a job, with the facts of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# By topic.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """The connected ranks, which include rank 0.

    :param size: the number of ranks in the job.
    :param facts: the facts that each rank has collected.
    """

    size: int
    facts: Mapping[int, Facts]

    def part(self, topic: str) -> dict[int, Any]:
        """Returns the facts of a topic, by rank."""
        return {rank: facts[topic] for rank, facts in self.facts.items()}

    @cached_property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each node, by its name, in the order of their ranks."""
        by_key: dict[tuple[str, str], list[int]] = {}
        for rank, node in sorted(self.part("node").items()):
            by_key.setdefault((node["host"], node["key"]), []).append(rank)
        hosts = [host for host, _ in by_key]
        # Containers may share a host name.
        return {
            host if hosts.count(host) == 1 else f"{host}({ranks[0]})": ranks
            for (host, _), ranks in by_key.items()
        }

    @cached_property
    def node_of(self) -> dict[int, str]:
        """The name of the node of each rank."""
        return {rank: node for node, ranks in self.nodes.items() for rank in ranks}

    def first_of(self, rank: int) -> int:
        """Returns the first rank on the node of ``rank``, which does the work once per node."""
        return self.nodes[self.node_of[rank]][0]
