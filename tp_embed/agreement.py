"""Makes sure that the ranks of a gang are about to do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from tp_embed.gang import Gang, GangError

_T = TypeVar("_T")


def check_agreement(gang: Gang, facts: Mapping[str, object]) -> None:
    """Compares what each rank says of itself. All ranks have to call it; each broadcasts its facts.

    :param facts: what has to be the same on every rank, by what it is called in the error.
    :raises GangError: ranks disagree; the error is raised on all of them.
    """
    all_facts = _of_all_ranks(gang, dict(facts))
    for name in dict.fromkeys(name for one in all_facts for name in one):
        found = [repr(one.get(name, "nothing")) for one in all_facts]
        if len(set(found)) > 1:
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            raise GangError(
                f"The ranks of {gang} must agree on {name}, but disagree: {by_rank}. Build the "
                "same model from the same config on each, with torch seeded alike."
            )


def raise_together(gang: Gang, action: Callable[[], _T]) -> _T:
    """What ``action`` returns. All ranks have to call it, so that an error of one, which would
    leave the others waiting in the next collective, ends them all.

    :raises GangError: ``action`` has raised an OSError, TypeError or ValueError on other ranks, but
        not here. A rank where it has raised one raises that.
    """
    result: _T | None = None
    error: Exception | None = None
    try:
        result = action()
    except (OSError, TypeError, ValueError) as e:
        error = e
    messages = _of_all_ranks(gang, None if error is None else str(error))
    for rank, message in enumerate(messages):
        if error is None and message is not None:
            error = GangError(f"Rank {rank} of {gang} has failed, and this one with it: {message}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _of_all_ranks(gang: Gang, own: _T) -> list[_T]:
    """What each rank gives as ``own``, by rank."""
    found = []
    for rank in range(gang.size):
        box = [own]
        gang.broadcast_objects(box, rank)
        found.append(box[0])
    return found
