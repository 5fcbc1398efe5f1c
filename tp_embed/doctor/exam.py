"""Runs all checks over the ranks, and reports on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tp_embed.command import CommandError, Report
from tp_embed.launch.environment import Place, find_place
from tp_embed.launch.rendezvous import MeetingError

from . import (
    agreement,
    imports,
    locks,
    machine,
    network,
    probe,
    shared,
    speed,
    topology,
    versions,
)
from .facts import look
from .findings import LEVELS, Finding, as_data, as_lines, fold, name_ranks
from .job import Job
from .meeting import Meeting

# With errors in these topics, collectives would hang.
_REQUIRED_TOPICS = {"ranks", "network", "machine"}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    tp: int | None = None
    config: str | None = None
    shared: str | None = None
    bench: bool = True
    fix: bool = False
    strict: bool = False
    timeout: float = 60.0


def examine(options: Options) -> Report:
    """Checks the job of this process. All ranks must call it.

    :returns: the findings on rank 0; only the same exit code on other ranks.
    :raises CommandError: the variables of the launcher are missing or inconsistent.
    """
    try:
        place = find_place()
    except ValueError as e:
        raise CommandError(str(e)) from e
    try:
        meeting = Meeting(place, options.timeout)
        return _examine(place, meeting, options)
    except MeetingError as e:
        return _examine_alone(place, e, options)


def _examine(place: Place, meeting: Meeting, options: Options) -> Report:
    # Launchers started by hand on each node may have other options.
    options = Options(**meeting.tell(asdict(options)))
    job = Job(place.size, meeting.share(look(place, options.config)))
    findings = list(_judge_presence(meeting, job)) if meeting.rank == 0 else []
    removed = {}
    if options.fix:
        is_first = job.first_of(meeting.rank) == meeting.rank
        removed = meeting.share(locks.remove(job, meeting.rank) if is_first else {})
    probes = probe.probe(meeting, job)
    problems = {}
    if options.shared is not None:
        problems = shared.check(meeting, job, options.shared)
    measured: dict[int, Any] = {}
    if meeting.rank == 0:
        findings += judge_facts(job, options.tp, removed)
        findings += probe.judge(job, probes)
        if options.shared is not None:
            findings += shared.judge(job, problems, options.shared)
        if meeting.size == 1 and options.bench:
            findings += imports.judge()
    if options.bench and meeting.size > 1:
        blocked = any(each.level == "error" and each.topic in _REQUIRED_TOPICS for each in findings)
        if meeting.tell(not blocked):
            measured = meeting.share(speed.measure(meeting, _device(place), options.tp))
        elif meeting.rank == 0:
            what = "the collectives were not timed, because of the errors below"
            findings.append(Finding("note", "speed", what, tuple(job.facts)))
    if meeting.rank == 0:
        lost = tuple(rank for rank in job.facts if rank not in meeting.present)
        if lost:
            what = f"{name_ranks(lost)} connected, then stopped answering"
            findings.append(Finding("error", "ranks", what, lost, "check their output"))
        elif measured:
            findings += speed.judge(job, measured, options.tp)
    if meeting.rank:
        report = Report(None, (), code=meeting.tell(None))
        meeting.end()
        return report
    report = _report(job, findings, measured, options.strict)

    # A launcher kills rank 0 when another rank fails, so the others exit after rank 0 has printed.
    def end() -> None:
        meeting.tell(report.code)
        meeting.end()

    return replace(report, printed=end)


def judge_facts(
    job: Job, tp_size: int | None, removed: Mapping[int, Mapping[str, str]]
) -> Iterator[Finding]:
    """Yields findings on the facts that each rank collects by itself.

    :param removed: the results of :func:`locks.remove`, by rank.
    """
    yield from topology.judge(job, tp_size)
    yield from versions.judge(job)
    yield from machine.judge(job)
    yield from locks.judge(job, removed)
    yield from network.judge(job)
    yield from agreement.judge(job)


def _judge_presence(meeting: Meeting, job: Job) -> Iterator[Finding]:
    missing = [rank for rank in range(meeting.size) if rank not in job.facts]
    if missing:
        from_nodes = ", ".join(f"{name_ranks(r)} on {node}" for node, r in job.nodes.items())
        yield Finding(
            "error",
            "ranks",
            f"{name_ranks(missing)} did not connect in {meeting.timeout:.0f} s; connected: "
            f"{from_nodes}",
            tuple(missing),
            "check their output: they report if they cannot reach rank 0; without output, they "
            "did not start, or have ended (ssh, hostfile, number of tasks)",
        )
    for rank in job.facts:
        if (count := meeting.seats(rank)) > 1:
            yield Finding(
                "error",
                "ranks",
                f"{count} processes connected as rank {rank}",
                (rank,),
                "end processes of an earlier run, or choose another master port; launchers on "
                "several nodes need different node ranks",
            )


def _examine_alone(place: Place, error: MeetingError, options: Options) -> Report:
    """Reports on a rank that cannot meet the others."""
    finding = Finding("error", "ranks", str(error), (place.rank,), error.fix)
    job = Job(place.size, {place.rank: look(place, options.config)})
    if place.rank:
        for line in as_lines([finding], job.node_of)[:-1]:
            node = job.node_of[place.rank]
            print(f"rank {place.rank} on {node}: {line}", file=sys.stderr, flush=True)
        return Report(None, (), code=1)
    findings = [finding, *judge_facts(job, options.tp, {})]
    return _report(job, findings, {}, options.strict)


def _report(job: Job, findings: list[Finding], measured: dict[int, Any], strict: bool) -> Report:
    # The worst come last, where a terminal shows them.
    findings = sorted(fold(findings), key=lambda finding: LEVELS.index(finding.level))
    bad = {"error", "warning"} if strict else {"error"}
    failed = any(finding.level in bad for finding in findings)
    data = {
        "ok": not failed,
        "size": job.size,
        "nodes": job.nodes,
        "findings": [as_data(finding, job.node_of) for finding in findings],
        "seconds": {
            rank: {name: each[name] for name in ("world", "gang") if name in each}
            for rank, each in measured.items()
        },
    }
    return Report(data, as_lines(findings, job.node_of), code=int(failed))


def _device(place: Place) -> torch.device:
    if machine.device_type() == "cpu":
        return torch.device("cpu")
    with suppress(RuntimeError):  # A missing device is a finding of its own.
        torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)
