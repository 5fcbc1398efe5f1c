"""Copies tensors between files, box by box. Reads one box while the previous one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .arrays import CHUNK_BYTES, Array, Index, boxes
from .hashes import SMALL_BYTES, page_aligned

Name = TypeVar("Name")
Item = TypeVar("Item")
Copied = tuple[Name, Index, Index, int]


def copy(
    tensors: Iterable[tuple[Name, Array, Array]],
    skip: Callable[[Name, Index, Index], bool] = lambda name, start, shape: False,
) -> Iterator[Copied[Name]]:
    """Copies ``tensors``, given as names, sources and targets of the same shapes and dtypes. Yields
    the name, start, shape and number of bytes of each finished box. Holds two boxes in memory.

    :param skip: returns whether the box with this name, start and shape is already written.
    """
    with ThreadPoolExecutor(1) as reader:
        begun = _begin(tensors, skip, reader)
        for copied, write in _one_ahead(begun):
            write()
            yield copied


def _begin(
    tensors: Iterable[tuple[Name, Array, Array]],
    skip: Callable[[Name, Index, Index], bool],
    reader: ThreadPoolExecutor,
) -> Iterator[tuple[Copied[Name], Callable[[], object]]]:
    """Starts to read each box, and yields it with the function that writes it. Has two buffers:
    call a box's function before drawing the second box after it."""
    buffers = cycle(
        [torch.frombuffer(page_aligned(CHUNK_BYTES), dtype=torch.uint8) for _ in range(2)]
    )
    for name, source, target in tensors:
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise CheckpointError(f"{source} cannot be copied to {target}.")
        for start, shape in boxes(source.shape, source.dtype.itemsize):
            nbytes = prod(shape) * source.dtype.itemsize
            copied = name, start, shape, nbytes
            box = next(buffers)[:nbytes].view(source.dtype).view(shape)
            if skip(name, start, shape):
                yield copied, lambda: None
            elif nbytes < SMALL_BYTES:
                source.read(start, box)
                yield copied, partial(target.write, start, box)
            else:
                read = reader.submit(source.read, start, box)
                yield copied, partial(_write_once_read, read, target, start, box)


def _write_once_read(read: Future[None], target: Array, start: Index, box: Tensor) -> None:
    read.result()
    target.write(start, box)


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the items, each after drawing the next one."""
    for item in islice(items, 1):
        for following in items:
            yield item
            item = following
        yield item
