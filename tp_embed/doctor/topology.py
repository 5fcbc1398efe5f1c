"""Checks the places of ranks from the launcher, and tensor-parallel gangs over nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .findings import Finding, differing, name_ranks, odd_ones
from .job import Job


def gangs_of(size: int, tp_size: int) -> list[list[int]]:
    """Returns the ranks of each tensor-parallel gang: adjacent, as in DeepSpeed and Megatron."""
    return [list(range(first, first + tp_size)) for first in range(0, size, tp_size)]


def judge(job: Job, tp_size: int | None) -> Iterator[Finding]:
    """Yields findings on the nodes and gangs of ranks."""
    places = job.part("place")
    everywhere = tuple(places)
    yield from _judge_places(job, places)
    launcher = places[0]["launcher"]
    by = "" if launcher == "none" else f", started by {launcher}"
    counts = " + ".join(f"{len(ranks)} on {node}" for node, ranks in job.nodes.items())
    ranks = f"{job.size} ranks" if job.size > 1 else "1 rank"
    yield Finding("ok", "topology", f"{ranks}{by}: {counts}", everywhere)
    if tp_size is None:
        if job.size > 1:
            yield Finding(
                "note",
                "topology",
                "the tensor-parallel gangs were not checked",
                everywhere,
                "pass their size: `--tp N`",
            )
        return
    if job.size % tp_size:
        divisors = [n for n in range(1, job.size + 1) if job.size % n == 0]
        yield Finding(
            "error",
            "topology",
            f"the number of ranks ({job.size}) must be a multiple of `--tp`, but that is {tp_size}",
            everywhere,
            f"use a tensor-parallel size of {divisors}, or another number of ranks",
        )
        return
    yield from _judge_gangs(job, tp_size)


def _judge_places(job: Job, places: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    sizes = {rank: str(place["size"]) for rank, place in places.items()}
    if len(set(sizes.values())) > 1:
        yield Finding(
            "error",
            "topology",
            f"ranks disagree on the number of ranks: {differing(sizes)}",
            odd_ones(sizes),
            "two jobs share a master port, or the launchers of the nodes have different options",
        )
    for node, ranks in job.nodes.items():
        local_ranks = [places[rank]["local_rank"] for rank in ranks]
        twice = [rank for rank in ranks if local_ranks.count(places[rank]["local_rank"]) > 1]
        if twice:
            yield Finding(
                "error",
                "topology",
                f"ranks of {node} have the same local rank, and so the same device: "
                f"{ {rank: places[rank]['local_rank'] for rank in twice} }",
                tuple(twice),
                "start one launcher on each node, and let it set LOCAL_RANK",
            )
        if ranks[-1] - ranks[0] + 1 != len(ranks):
            yield Finding(
                "warning",
                "topology",
                f"{name_ranks(ranks)} of {node} are not adjacent, so gangs cross nodes",
                tuple(ranks),
                "fill one node after the other: `--map-by slot` of Open MPI, "
                "`--distribution=block` of srun",
            )
    local_sizes = {node: len(ranks) for node, ranks in job.nodes.items()}
    if len(set(local_sizes.values())) > 1:
        yield Finding(
            "note",
            "topology",
            f"nodes have different numbers of ranks: {local_sizes}",
            tuple(places),
            "use the same number on each, unless this is intended",
        )


def _judge_gangs(job: Job, tp_size: int) -> Iterator[Finding]:
    gangs = gangs_of(job.size, tp_size)
    crossing = []
    for gang in gangs:
        nodes = list(dict.fromkeys(job.node_of[rank] for rank in gang if rank in job.node_of))
        if len(nodes) > 1:
            crossing.append(gang)
            yield Finding(
                "warning",
                "topology",
                f"the gang of {name_ranks(gang)} crosses nodes ({', '.join(nodes)}): each lookup, "
                "and each layer, waits for the network between them",
                tuple(gang),
                _gang_fix(job, tp_size),
            )
    if not crossing:
        what = f"{len(gangs)} gang{'s' if len(gangs) > 1 else ''} of {tp_size}, each in one node"
        yield Finding("ok", "topology", what, tuple(job.facts))


def _gang_fix(job: Job, tp_size: int) -> str:
    smallest = min(len(ranks) for ranks in job.nodes.values())
    fitting = [n for n in range(1, smallest + 1) if all(not len(r) % n for r in job.nodes.values())]
    fix = f"a tensor-parallel size of {' or '.join(map(str, fitting))}"
    if tp_size in fitting:
        return "order the ranks so that adjacent ones are on one node"
    return f"{fix} if the model fits; else make sure that gangs use the fastest network"
