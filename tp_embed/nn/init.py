"""Init functions whose values depend only on the seed, the row and the column.

The table is split into tiles of 256 x 128 numbers, each drawn by its own generator, seeded from
(seed, tile row, tile column). A shard draws the tiles that it overlaps, so every gang size and
shard dimension gives the same table, a table that grows keeps its old rows, and initializing a
shard takes memory for the shard and one tile. Tiles are drawn on the CPU, so values don't depend on
the device either, in fp32 (fp64 for an fp64 table), then rounded to the dtype.

The seed comes from torch's default CPU generator: ``torch.manual_seed()`` sets it, and each table
takes one number from that generator. All ranks use the seed of rank 0 of the gang.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from safetensors import safe_open
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.nn import init as torch_init

from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.redistribute import redistribute
from tp_embed.parameter.sharded import local, unguarded
from tp_embed.partition import Partition, as_slice, within

_TILE_ROWS, _TILE_COLUMNS = 256, 128

# Chunk size for reading files.
_CHUNK_BYTES = 16 << 20

Draw = Callable[[Tensor, Generator], object]


class Table(Protocol):
    """The attributes init functions use: a block of a table, and its place in the table."""

    num_embeddings: int
    embed_dim: int
    pad_idx: int | None
    gang: Gang
    weight: Parameter

    @property
    def rows(self) -> range: ...

    @property
    def columns(self) -> range: ...


def blockwise(fn: Callable[..., object]) -> Callable[..., None]:
    """Marks ``fn`` as an init function that can fill a block of a table as well as a whole one.

    ``fn`` is called with the embedding, whose ``weight`` holds the rows ``embed.rows`` and the
    columns ``embed.columns`` of a table of ``embed.num_embeddings`` x ``embed.embed_dim``. It runs
    without autograd, and is skipped while the weight is on ``meta``; the pad row is zeroed
    afterwards (except by :func:`from_tensor`, which keeps the pretrained one). To give the same
    table for every gang, ``fn`` must use the shape of the weight only to loop over it; :func:`fill`
    does the loop.
    """

    @wraps(fn)
    def fill_block(embed: Table, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), unguarded():
            if not embed.weight.is_meta:
                fn(embed, *args, **kwargs)
                zero_pad_row(embed)

    return _mark(fill_block)


_F = TypeVar("_F", bound=Callable[..., object])


def _mark(fn: _F) -> _F:
    fn._tp_embed_blockwise = True  # type: ignore[attr-defined]
    return fn


def is_blockwise(fn: Callable[..., object]) -> bool:
    """Returns whether :func:`blockwise` marks ``fn``, or the function it is a partial of."""
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "_tp_embed_blockwise", False)


def zero_pad_row(embed: Table) -> None:
    """Zeroes the pad row of ``embed``, if this block holds it."""
    if embed.pad_idx is not None and embed.pad_idx in embed.rows:
        local(embed.weight)[embed.rows.index(embed.pad_idx)].zero_()


def agree_on_seed(gang: Gang) -> int:
    """Returns a seed from torch's default CPU generator, the same on every rank of the gang.

    Collective: all ranks must call it. Takes one number from the generator of each rank, and
    broadcasts the number of rank 0, 8 bytes.
    """
    seed = torch.randint(2**63 - 1, (), device="cpu")
    if gang.size > 1:
        seed = seed.to(gang.device)
        gang.broadcast(seed)
    return int(seed)


def fill(embed: Table, draw: Draw) -> None:
    """Fills the block of ``embed`` tile by tile. Collective: the gang agrees on the seed. If ranks
    hold every P-th row, each draws one of P tiles, and they exchange rows: a rank sends (P-1)/P of
    its shard.

    :param draw: fills a tile, a CPU tensor of 256 x 128, from the given generator.
    """
    seed, gang = agree_on_seed(embed.gang), embed.gang
    weight, rows, columns = local(embed.weight), embed.rows, embed.columns
    first = 0
    if rows.step > 1 and not isinstance(gang, FakeGang):
        tiles = Partition(_TILE_ROWS * gang.size, gang.size)
        for start in range(0, embed.num_embeddings - tiles.size + 1, tiles.size):
            own = range(start, start + tiles.size)[as_slice(tiles.shard(gang.rank))]
            drawn = weight.new_empty(len(own), len(columns))
            _fill(drawn, own, columns, seed, draw)
            moved = redistribute(drawn, tiles, replace(tiles, cyclic=True), gang)
            weight[first : first + len(moved)] = moved
            first += len(moved)
    _fill(weight[first:], rows[first:], columns, seed, draw)


def _fill(block: Tensor, rows: range, columns: range, seed: int, draw: Draw) -> None:
    """Fills ``block``, which holds these rows and columns of the table."""
    dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
    tile = torch.empty(_TILE_ROWS, _TILE_COLUMNS, dtype=dtype, device="cpu")
    generator = Generator("cpu")

    for row in _tile_starts(rows, _TILE_ROWS):
        for column in _tile_starts(columns, _TILE_COLUMNS):
            generator.manual_seed(_tile_seed(seed, row // _TILE_ROWS, column // _TILE_COLUMNS))
            draw(tile, generator)
            own_rows = within(rows, row, row + _TILE_ROWS)
            own_columns = within(columns, column, column + _TILE_COLUMNS)
            block[own_rows, own_columns] = tile[
                as_slice(rows[own_rows], row), as_slice(columns[own_columns], column)
            ]


def _tile_starts(block: range, size: int) -> range:
    return range(block.start // size * size, block.stop, size) if len(block) else range(0)


def _tile_seed(seed: int, tile_row: int, tile_column: int) -> int:
    key = b"".join(number.to_bytes(8, "little") for number in (seed, tile_row, tile_column))
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


# The distributions. Fans are computed as in `torch.nn.init` for a (V, E) weight.


@blockwise
def init_scaled_embedding(embed: Table) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{N}(0, \\frac{1}{\\text{embed_dim}})`."""
    std = embed.embed_dim**-0.5
    fill(embed, lambda tile, generator: tile.normal_(0.0, std, generator=generator))


scaled = init_scaled_embedding


@blockwise
def normal(embed: Table, *, mean: float = 0.0, std: float = 1.0) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{N}(\\text{mean}, \\text{std}^2)`; with the
    defaults, the distribution of :class:`torch.nn.Embedding`."""
    fill(embed, lambda tile, generator: tile.normal_(mean, std, generator=generator))


@blockwise
def uniform(embed: Table, *, a: float = 0.0, b: float = 1.0) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{U}(a, b)`."""
    fill(embed, lambda tile, generator: tile.uniform_(a, b, generator=generator))


@blockwise
def trunc_normal(
    embed: Table, *, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{N}(\\text{mean}, \\text{std}^2)` with values
    outside :math:`[a, b]` drawn again, as :func:`torch.nn.init.trunc_normal_`."""
    fill(
        embed,
        lambda tile, generator: torch_init.trunc_normal_(
            tile, mean, std, a, b, generator=generator
        ),
    )


@blockwise
def xavier_uniform(embed: Table, *, gain: float = 1.0) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{U}(-a, a)` with
    :math:`a = \\text{gain} \\sqrt{6 / (V + E)}` (Glorot and Bengio, 2010)."""
    bound = gain * math.sqrt(6.0 / (embed.num_embeddings + embed.embed_dim))
    fill(embed, lambda tile, generator: tile.uniform_(-bound, bound, generator=generator))


@blockwise
def xavier_normal(embed: Table, *, gain: float = 1.0) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{N}(0, \\text{gain}^2 \\cdot 2 / (V + E))`
    (Glorot and Bengio, 2010)."""
    std = gain * math.sqrt(2.0 / (embed.num_embeddings + embed.embed_dim))
    fill(embed, lambda tile, generator: tile.normal_(0.0, std, generator=generator))


Fan = Literal["fan_in", "fan_out"]


@blockwise
def kaiming_uniform(
    embed: Table, *, a: float = 0.0, mode: Fan = "fan_in", nonlinearity: str = "leaky_relu"
) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{U}(-b, b)` with
    :math:`b = \\text{gain} \\sqrt{3 / \\text{fan}}` (He et al., 2015); the fan is E for
    ``fan_in`` and V for ``fan_out``."""
    bound = math.sqrt(3.0) * _kaiming_std(embed, a, mode, nonlinearity)
    fill(embed, lambda tile, generator: tile.uniform_(-bound, bound, generator=generator))


@blockwise
def kaiming_normal(
    embed: Table, *, a: float = 0.0, mode: Fan = "fan_in", nonlinearity: str = "leaky_relu"
) -> None:
    """Initializes ``embed`` from :math:`\\mathcal{N}(0, \\text{gain}^2 / \\text{fan})`
    (He et al., 2015); the fan is E for ``fan_in`` and V for ``fan_out``."""
    std = _kaiming_std(embed, a, mode, nonlinearity)
    fill(embed, lambda tile, generator: tile.normal_(0.0, std, generator=generator))


def _kaiming_std(embed: Table, a: float, mode: str, nonlinearity: str) -> float:
    fans = {"fan_in": embed.embed_dim, "fan_out": embed.num_embeddings}
    if mode not in fans:
        raise ValueError(f"`mode` must be 'fan_in' or 'fan_out', but is {mode!r} instead.")
    gain: float = torch_init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    return gain / math.sqrt(fans[mode])


@blockwise
def zeros(embed: Table) -> None:
    """Initializes ``embed`` with zeros."""
    embed.weight.zero_()


@blockwise
def constant(embed: Table, *, value: float) -> None:
    """Initializes ``embed`` with ``value``."""
    embed.weight.fill_(value)


@_mark
def from_tensor(embed: Table, *, source: Tensor | str | Path, key: str | None = None) -> None:
    """Initializes ``embed`` with a pretrained table, including its pad row (which the random
    functions zero).

    :param source: the table, or the path of a safetensors file; this rank reads only its own block
        from the file. *Shape:* :math:`(V,E)`; any dtype, cast to the dtype of the weight.
    :param key: the name of the table in the file; optional if the file holds one tensor only.
    :raises ValueError: the table has another shape, or the file does not hold ``key``.
    """
    if embed.weight.is_meta:
        return
    rows, columns = embed.rows, embed.columns
    with torch.no_grad(), unguarded():
        if isinstance(source, Tensor):
            _check_shape(embed, "source", source.shape)
            block = source[as_slice(rows), as_slice(columns)]
            embed.weight.copy_(block)
            return
        key = _check_key(embed, source, key)
        # Map the file again for each chunk, so that the pages already read can be freed.
        step = max(1, _CHUNK_BYTES // (embed.embed_dim * embed.weight.element_size()))
        for start in range(rows.start, rows.stop if len(columns) else rows.start, step):
            stop = min(start + step, rows.stop)
            own = within(rows, start, stop)
            with safe_open(source, framework="pt") as file:
                part = file.get_slice(key)[start:stop, columns.start : columns.stop]
                embed.weight[own] = part[as_slice(rows[own], start)]


def _check_key(embed: Table, source: str | Path, key: str | None) -> str:
    with safe_open(source, framework="pt") as file:
        keys = sorted(file.keys())
        if key is None and len(keys) == 1:
            key = keys[0]
        if key is None or key not in keys:
            raise ValueError(
                f"`key` must name a tensor of '{source}', which holds {keys}, "
                f"but is {key!r} instead."
            )
        _check_shape(embed, f"{source}:{key}", file.get_slice(key).get_shape())
        return key


def _check_shape(embed: Table, name: str, shape: Any) -> None:
    expected = (embed.num_embeddings, embed.embed_dim)
    if tuple(shape) != expected:
        raise ValueError(
            f"`{name}` must have the shape {expected} (num_embeddings, embed_dim), "
            f"but has {tuple(shape)} instead."
        )
