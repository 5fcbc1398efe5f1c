"""Changes the vocabulary of a universal checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from tp_embed.checkpoint.contents import MASTER, MOMENTS
from tp_embed.checkpoint.formats.universal.paths import (
    LATEST,
    parameter_directory,
    parameters_of,
    state_file,
)
from tp_embed.checkpoint.staging import staged
from tp_embed.nn.embedding import InitFn, StandardEmbedding

from .universal_format import find_universal, read_tensor, write_tensor


def resize_vocab(
    source: str | Path,
    output: str | Path,
    *,
    names: Sequence[str],
    num_embeddings: int,
    init_fn: InitFn | None = None,
    shrink: bool = False,
) -> None:
    """Writes a copy of a universal checkpoint with a new number of rows in its tables, heads and
    biases. Keeps the values and moments of old rows bit for bit; moments of new rows are zero.

    Runs in one process, on the CPU. The model that loads the result must have the new size, too.

    :param source: the directory of a universal checkpoint, see :func:`to_universal`: the one with
        the file ``latest_universal``.
    :param output: the directory to write.
    :param names: the Parameters to resize, as :mod:`fnmatch` patterns. A table tied to a head has
        one name; an untied head has its own. *Shape:* :math:`(V,E)`, or :math:`(V)` for a bias,
        with the same :math:`V` for all.
    :param num_embeddings: the new number of rows.
    :param init_fn: initializes the new rows of tables, as in :class:`tp_embed.StandardEmbedding`;
        ``torch.manual_seed()`` decides the values. New items of a bias are zero.
    :param shrink: must be ``True`` to drop rows, the last ones.
    :raises FileNotFoundError: ``source`` does not exist.
    :raises FileExistsError: ``output`` already exists.
    :raises ValueError: ``source`` is not universal, a pattern matches nothing or Parameters of
        different sizes, or rows would be dropped without ``shrink``.
    """
    source, output = Path(source), Path(output)
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"`output` must not be in `source`, since it is a copy of it, but is `{output}`."
        )
    old = find_universal(source)
    matched = _matching(old, names)
    _check_sizes(matched, num_embeddings, shrink)
    with staged(output) as stage:
        universal = stage.path / old.name
        shutil.copytree(old, universal)
        for name, directory in matched.items():
            new = parameter_directory(universal, name)
            for key in _keys(directory):
                tensor = read_tensor(directory, key)
                write_tensor(new, key, _resize(tensor, num_embeddings, init_fn, key == MASTER))
        (stage.path / LATEST).write_text(old.name)


def _matching(source: Path, names: Sequence[str]) -> dict[str, Path]:
    found = parameters_of(source)
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"`names` must match Parameters of the checkpoint, but {pattern!r} matches none of "
                f"{sorted(found)}."
            )
    return {
        name: path
        for name, path in found.items()
        if any(fnmatchcase(name, pattern) for pattern in names)
    }


def _check_sizes(matched: dict[str, Path], num_embeddings: int, shrink: bool) -> None:
    shapes = {name: tuple(read_tensor(path, MASTER).shape) for name, path in matched.items()}
    sizes = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(sizes) != 1 or any(len(shape) > 2 for shape in shapes.values()):
        raise ValueError(
            f"`names` must match Parameters with one number of rows, but match {shapes}. Name only "
            "Parameters of the vocabulary."
        )
    size = sizes.pop()
    if num_embeddings < 1:
        raise ValueError(
            f"`num_embeddings` must be greater than or equal to 1, but is {num_embeddings} instead."
        )
    if num_embeddings < size and not shrink:
        raise ValueError(
            f"`num_embeddings` must be at least {size}, the number of rows of {sorted(matched)}, "
            f"but is {num_embeddings}. Pass `shrink=True` to drop the last rows."
        )


def _keys(directory: Path) -> list[str]:
    """Returns the keys of a Parameter's tensors: frozen Parameters have no moments."""
    return [key for key in (MASTER, *MOMENTS) if state_file(directory, key).is_file()]


def _resize(old: Tensor, size: int, init_fn: InitFn | None, draw: bool) -> Tensor:
    """Returns ``old`` with ``size`` rows; new rows are drawn, or zero."""
    kept = old[:size]
    if len(kept) == size:
        return kept
    if draw and old.dim() == 2:
        table = StandardEmbedding(
            size, old.shape[1], init_fn=init_fn, device="cpu", dtype=old.dtype
        )
        new = table.weight.detach()[len(kept) :]
    else:
        new = old.new_zeros((size - len(kept), *old.shape[1:]))
    return torch.cat([kept, new])
