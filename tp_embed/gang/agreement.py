"""Makes the ranks of a gang agree before they act: if one fails or differs, all raise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from tp_embed.gang import Gang, GangError

_T = TypeVar("_T")

# Values that must be the same on every rank, by their name in the error.
Facts = dict[str, object]

_MOST_CHARACTERS = 2000


def meet(
    gang: Gang,
    action: Callable[[Facts], _T],
    others: Sequence[Gang] = (),
    what: str | None = None,
) -> _T:
    """Runs ``action`` and shares its outcome, so that either all ranks continue or all raise.
    Otherwise an exception on one rank would leave the others waiting in the next collective.

    Collective: all ranks must call it. Does two all-gathers: 8 (P-1) bytes, and (P-1) times the
    facts and the error of this rank.

    :param action: must not communicate. It gets a dictionary, and writes to it the values that must
        be the same on every rank of ``gang``.
    :param others: further gangs of this rank, which are told about failures too.
    :param what: the name of ``action`` in the errors of other ranks, such as "The export".
    :returns: the result of ``action``.
    :raises GangError: ranks disagree on a fact, or ``action`` raised on another rank only. This
        covers all exceptions, even out of memory and ``KeyboardInterrupt``. Ranks where ``action``
        raised raise the original exception.
    """
    facts: Facts = {}
    try:
        result = action(facts)
    except BaseException as e:
        # Raise the original exception even if the exchange fails.
        try:
            _exchange(gang, others, facts, _describe(e), what)
        finally:
            raise e
    problem = _exchange(gang, others, facts, None, what)
    if problem is not None:
        raise GangError(problem)
    return result


def raise_together(gang: Gang, action: Callable[[], _T], what: str | None = None) -> _T:
    """Calls :func:`meet` with an ``action`` that has no facts to compare."""
    return meet(gang, lambda facts: action(), what=what)


def _exchange(
    gang: Gang, others: Sequence[Gang], facts: Facts, failure: str | None, what: str | None
) -> str | None:
    """Exchanges facts and failures, and returns the first problem of any rank."""
    reprs = {name: repr(fact) for name, fact in facts.items()}
    reports = of_all_ranks(gang, {"facts": reprs, "failure": failure})
    failures = [report["failure"] for report in reports]
    problem = _disagreement(gang, [report["facts"] for report in reports], failures)
    problem = problem or _first_failure(gang, failures, what)
    for other in others:
        told = of_all_ranks(other, problem)
        problem = problem or _first_failure(other, told, what)
    return problem


def _disagreement(
    gang: Gang, all_facts: list[Mapping[str, str]], failures: list[str | None]
) -> str | None:
    """Describes the first fact that differs. A rank that failed may lack some facts."""
    has_failure = any(failure is not None for failure in failures)
    for name in dict.fromkeys(name for one in all_facts for name in one):
        if has_failure and not all(name in one for one in all_facts):
            continue
        found = [one.get(name, repr("nothing")) for one in all_facts]
        if len(set(found)) > 1:
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            return (
                f"The ranks of {gang} must agree on {name}, but disagree: {by_rank}. Build the "
                "same model from the same config on each, with torch seeded alike."
            )
    return None


def _first_failure(gang: Gang, failures: list[str | None], what: str | None) -> str | None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            if what is not None:
                return f"{what} failed on rank {rank} of {gang}: {failure}"
            return f"Rank {rank} of {gang} failed, so this rank stops too: {failure}"
    return None


def _describe(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "its message can't be shown"
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[:_MOST_CHARACTERS]}... ({len(message)} characters)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def of_all_ranks(gang: Gang, own: Any) -> list[Any]:
    """Returns ``own`` of each rank, by rank. Sends JSON: ``own`` needs no pickle."""
    text = json.dumps(own).encode()
    if gang.size == 1:
        return [json.loads(text)]  # Needs no device, which may be meta.
    sizes = torch.empty(gang.size, dtype=torch.int64, device=gang.device)
    gang.all_gather(sizes, torch.tensor(len(text), device=gang.device))
    counts = sizes.tolist()
    joined = torch.empty(sum(counts), dtype=torch.uint8, device=gang.device)
    gang.all_gather(joined, torch.tensor(list(text), dtype=torch.uint8, device=gang.device), counts)
    return [json.loads(bytes(part.tolist())) for part in joined.cpu().split(counts)]
