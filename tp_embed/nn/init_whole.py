"""Runs init functions that need the whole table on sharded tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tp_embed._torch_private import TorchDispatchMode
from tp_embed.gang import FakeGang
from tp_embed.gang.agreement import raise_together
from tp_embed.nn.init import Table, agree_on_seed, zero_pad_row
from tp_embed.parameter.sharded import local
from tp_embed.partition import as_slice, within

# Chunk size of the broadcast.
_CHUNK_BYTES = 16 << 20


@torch.no_grad()
def fill_from_whole_table(
    embed: Table, init_fn: Callable[[Table], object], new_whole: Callable[[], Table]
) -> None:
    """Runs ``init_fn`` on rank 0 with a whole table, and sends each rank its block.

    Collective: all ranks must call it. Broadcasts V x E items, in chunks. An exception on rank 0 is
    raised there unchanged, and as a :class:`GangError` on the other ranks.

    The pad row is zero before ``init_fn``, and is zeroed again if ``init_fn`` drew random numbers
    with torch; an ``init_fn`` that copies a pretrained table keeps its pad row.

    :param new_whole: makes the whole table, or returns ``embed`` if that is whole; called on rank 0
        only.
    """
    gang = embed.gang
    seed = agree_on_seed(gang)

    def fill() -> Table | None:
        # A fake gang has no other rank to receive from.
        if gang.rank != 0 and not isinstance(gang, FakeGang):
            return None
        whole = new_whole()
        _run(init_fn, whole, seed)
        return whole

    whole = raise_together(gang, fill, "`init_fn`")
    if whole is not embed:
        _receive_block(embed, whole)


def _run(init_fn: Callable[[Table], object], whole: Table, seed: int) -> None:
    expected = whole.weight.shape, whole.weight.dtype, whole.weight.device
    zero_pad_row(whole)
    with _seeded(seed, whole.weight.device), _Draws() as draws:
        init_fn(whole)
    found = whole.weight.shape, whole.weight.dtype, whole.weight.device
    if found != expected:
        raise ValueError(
            "`init_fn` must fill `embed.weight` and keep its shape, dtype and device, "
            f"{(tuple(expected[0]), *expected[1:])}, "
            f"but changed them to {(tuple(found[0]), *found[1:])} instead."
        )
    if draws.any:
        zero_pad_row(whole)


class _Draws(TorchDispatchMode):
    """Records whether torch drew random numbers, from any generator."""

    any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any = self.any or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators of the CPU and ``device``, and restores them on exit."""
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            module = torch.get_device_module(device)
            stack.enter_context(module.device(device))
            module.manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


def _receive_block(embed: Table, whole: Table | None) -> None:
    gang, weight, rows, columns = embed.gang, local(embed.weight), embed.rows, embed.columns
    step = max(1, _CHUNK_BYTES // (embed.embed_dim * weight.element_size()))
    for first in range(0, embed.num_embeddings, step):
        last = min(first + step, embed.num_embeddings)
        if whole is not None:
            part = whole.weight[first:last].to(gang.device)
        else:
            part = weight.new_empty((last - first, embed.embed_dim), device=gang.device)
        gang.broadcast(part)
        own = within(rows, first, last)
        weight[own] = part[as_slice(rows[own], first), as_slice(columns)]
