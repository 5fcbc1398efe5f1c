"""Makes sure that the ranks of a gang are about to do the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from tp_embed.gang import Gang, GangError

_T = TypeVar("_T")

_MOST_CHARACTERS = 2000


def check_agreement(gang: Gang, facts: Mapping[str, object]) -> None:
    """Compares what each rank says of itself. All ranks have to call it; they gather their facts.

    :param facts: what has to be the same on every rank, by what it is called in the error.
    :raises GangError: ranks disagree; the error is raised on all of them.
    """
    all_facts = of_all_ranks(gang, {name: repr(fact) for name, fact in facts.items()})
    for name in dict.fromkeys(name for one in all_facts for name in one):
        found = [one.get(name, repr("nothing")) for one in all_facts]
        if len(set(found)) > 1:
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            raise GangError(
                f"The ranks of {gang} must agree on {name}, but disagree: {by_rank}. Build the "
                "same model from the same config on each, with torch seeded alike."
            )


def raise_together(gang: Gang, action: Callable[[], _T], what: str | None = None) -> _T:
    """What ``action`` returns. All ranks have to call it, so that an exception of one, which would
    leave the others waiting in the next collective, ends them all. ``action`` sends nothing.

    :param what: what ``action`` is, for the error of the other ranks, such as "The export".
    :raises GangError: ``action`` has raised anything on another rank, running out of memory and
        ``KeyboardInterrupt`` included, but not here. A rank where it has raised raises that.
    """
    try:
        result = action()
    except BaseException as e:
        # Whatever comes of telling the others, this rank raises what it has met.
        try:
            of_all_ranks(gang, _describe(e))
        finally:
            raise e
    for rank, failure in enumerate(of_all_ranks(gang, None)):
        if failure is not None:
            of_rank = f"Rank {rank} of {gang} has failed, and this one with it"
            if what is not None:
                of_rank = f"{what} failed on rank {rank} of {gang}"
            raise GangError(f"{of_rank}: {failure}")
    return result


def _describe(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:
        message = "its message can't be shown"
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[:_MOST_CHARACTERS]}... ({len(message)} characters)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def of_all_ranks(gang: Gang, own: Any) -> list[Any]:
    """What each rank gives as ``own``, by rank: strings and the like, which need no pickle."""
    text = json.dumps(own).encode()
    if gang.size == 1:
        return [json.loads(text)]  # On any device, even on meta.
    sizes = torch.empty(gang.size, dtype=torch.int64, device=gang.device)
    gang.all_gather(sizes, torch.tensor(len(text), device=gang.device))
    counts = sizes.tolist()
    joined = torch.empty(sum(counts), dtype=torch.uint8, device=gang.device)
    gang.all_gather(joined, torch.tensor(list(text), dtype=torch.uint8, device=gang.device), counts)
    return [json.loads(bytes(part.tolist())) for part in joined.cpu().split(counts)]
