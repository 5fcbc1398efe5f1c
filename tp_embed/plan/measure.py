"""The bandwidth and latency of the machines, from the collectives that the doctor times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

from tp_embed.command import CommandError, Report, WrongUsageError
from tp_embed.doctor.command import DOCTOR
from tp_embed.launch.environment import find_place

from .setup import Device
from .traffic import Link, Network, Operation, messages, sent_of

# The seconds of each run, by operation and size.
Runs = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """What was measured on the ranks of a job.

    :param report: of the doctor; its ``printed`` lets the other ranks go.
    """

    network: Network
    device: Device
    ranks: int
    nodes: int
    report: Report

    def data(self) -> dict[str, Any]:
        """As JSON can hold it, beside the network."""
        return {"ranks": self.ranks, "nodes": self.nodes, "device": self.device}

    def lines(self) -> Iterator[str]:
        """For people."""
        on = f"{self.ranks} ranks, {self.nodes} node{'s' * (self.nodes > 1)}"
        parts = {f"measured on {on}": self.network.measured}
        if self.network.inter_measured:
            parts["between nodes"] = self.network.inter_measured
        for title, links in parts.items():
            each = (
                f"{operation.replace('_', '-')} {link.bandwidth / 1e9:.2f} GB/s, "
                f"{link.latency * 1e6:.0f} us"
                for operation, link in links.items()
            )
            yield f"{title}: {'; '.join(each)}"


def measure(tp_size: int) -> Measured | Report:
    """Times the collectives of the job of this process, with all that the doctor looks at before.
    All ranks have to call it; they wait until rank 0 has called ``report.printed``.

    :param tp_size: of the tensor-parallel gangs, which are timed apart from all ranks.
    :returns: for ranks other than 0, the report that they have to give.
    :raises WrongUsageError: this process is alone.
    :raises CommandError: the doctor has found errors.
    """
    try:
        size = find_place().size
    except ValueError as e:
        raise CommandError(str(e)) from e
    if size == 1:
        raise WrongUsageError(
            "--measure must be given on several ranks, but this process is alone. Start it by a "
            "launcher: deepspeed --module tp_embed plan ..., torchrun ... -m tp_embed plan ..."
        )
    in_gangs = tp_size > 1 and size % tp_size == 0
    report = DOCTOR.run({"tp": tp_size if in_gangs else None})
    if report.data is None:
        return report
    if report.code:
        report.printed()
        errors = [each["what"] for each in report.data["findings"] if each["level"] == "error"]
        raise CommandError(
            f"The machines must be well to be measured, but the doctor finds: {'; '.join(errors)}. "
            "`tp-embed doctor`, started alike, says what to do."
        )
    from tp_embed.doctor.machine import device_type  # Which imports torch.

    nodes = report.data["nodes"]
    network = network_of(nodes.values(), report.data["seconds"], tp_size if in_gangs else size)
    return Measured(network, cast(Device, device_type()), size, len(nodes), report)


def is_silent() -> bool:
    """Whether this process leaves it to rank 0 to say what is wrong."""
    with suppress(ValueError):
        return find_place().rank != 0
    return False


def network_of(
    nodes: Iterable[Sequence[int]], seconds: Mapping[int, Mapping[str, Runs]], tp_size: int
) -> Network:
    """
    :param nodes: the ranks of each.
    :param seconds: by rank, what the doctor measured between all ranks (``"world"``), and in the
        tensor-parallel gangs (``"gang"``) if there are several.
    """
    of_all = links_of([each["world"] for each in seconds.values()], len(seconds))
    links = of_all
    if all("gang" in each for each in seconds.values()):
        links = links_of([each["gang"] for each in seconds.values()], tp_size)
    slowest, of_slowest = _slowest(links), _slowest(of_all)
    smallest = min(map(len, nodes))
    if smallest == len(seconds):
        return Network(*slowest, measured=links)
    return Network(*slowest, smallest, *of_slowest, links, of_all)


def links_of(runs: Sequence[Runs], size: int) -> dict[Operation, Link]:
    """For each operation, between ``size`` ranks, the bandwidth and latency by which it takes as
    long as it did.

    :param runs: for each rank the seconds of each run, by ``"all_reduce 4096"``, with the bytes of
        the larger of what goes in and what comes out.
    """
    found: dict[Operation, list[tuple[float, float, float]]] = defaultdict(list)
    for name in runs[0]:
        operation, nbytes = cast(tuple[Operation, str], name.split())
        payload = float(nbytes)
        if operation == "all_gather":
            payload /= size
        elif operation == "all_to_all":
            payload *= (size - 1) / size  # What is for other ranks.
        took = max(median(each[name]) for each in runs)
        sent = payload * sent_of(operation, size)
        found[operation].append((messages(operation, size), sent, took))
    return {operation: fit(times) for operation, times in found.items()}


def fit(times: Sequence[tuple[float, float, float]]) -> Link:
    """By which times are as near as can be, with the least sum of squares of relative errors.

    :param times: messages one after the other, bytes that are sent, and seconds.
    """
    rows = [(count / took, sent / took) for count, sent, took in times]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    latency, per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency < 0:  # What is not by the model, such as caches that are too small for large ones.
        return Link(bb / b, 0.0)
    if per_byte <= 0:
        return Link(max(sent / took for _, sent, took in times), a / aa)
    return Link(1 / per_byte, latency)


def _slowest(links: Mapping[Operation, Link]) -> Link:
    return min(links.values())
