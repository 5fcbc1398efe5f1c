"""All ranks of a job that have come, with what each sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# A part for each topic.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """The ranks that have come. Rank 0 is among them, for it is who judges.

    :param size: how many there should be.
    :param facts: what each sees.
    """

    size: int
    facts: Mapping[int, Facts]

    def part(self, topic: str) -> dict[int, Any]:
        """What each rank sees of a topic."""
        return {rank: facts[topic] for rank, facts in self.facts.items()}

    @cached_property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each node, by its name, in the order of their ranks."""
        by_key: dict[tuple[str, str], list[int]] = {}
        for rank, node in sorted(self.part("node").items()):
            by_key.setdefault((node["host"], node["key"]), []).append(rank)
        hosts = [host for host, _ in by_key]
        # Containers may all have the same name.
        return {
            host if hosts.count(host) == 1 else f"{host}({ranks[0]})": ranks
            for (host, _), ranks in by_key.items()
        }

    @cached_property
    def node_of(self) -> dict[int, str]:
        """The name of the node of each rank."""
        return {rank: node for node, ranks in self.nodes.items() for rank in ranks}

    def first_of(self, rank: int) -> int:
        """The first rank of the node of ``rank``, which does what is to be done once for each."""
        return self.nodes[self.node_of[rank]][0]
