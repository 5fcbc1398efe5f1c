"""Takes a rank's block out of DTensors over any mesh.

Each rank sees only its own mesh of a DTensor, and the next rank of its gang may see another one.
So the ranks of a gang exchange their layouts first, and take the same path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tp_embed._torch_private import AsyncCollectiveTensor
from tp_embed.gang import FakeGang, Gang
from tp_embed.gang.agreement import of_all_ranks
from tp_embed.gang.redistribute import sendable


def as_dtensor(block: Tensor, dim: int, shape: tuple[int, ...], gang: Gang) -> Tensor:
    """Wraps this rank's ``block`` of a table of ``shape``. No communication, no copy."""
    tensor: Tensor = DTensor.from_local(
        block,
        DeviceMesh.from_group(gang.as_process_group(), block.device.type),
        [Shard(dim)],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(prod(shape[i + 1 :]) for i in range(len(shape))),
    )
    return tensor


@dataclass(frozen=True)
class Layout:
    """How a DTensor is cut, as one rank sees it."""

    shape: tuple[int, ...]
    placements: tuple[str, ...]
    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    """The global ranks of the mesh, in row-major order."""
    is_ascending: bool
    """Whether the ranks ascend along each dimension of the mesh."""

    @classmethod
    def of(cls, value: DTensor) -> Layout:
        mesh = value.device_mesh.mesh
        return cls(
            tuple(value.shape),
            tuple(map(repr, value.placements)),
            tuple(mesh.shape),
            tuple(mesh.flatten().tolist()),
            all(bool((mesh.diff(dim=dim) > 0).all()) for dim in range(mesh.ndim)),
        )

    @classmethod
    def received(cls, fields: list[Any] | None) -> Layout | None:
        """Decodes the layout of another rank, which sends lists for tuples."""
        if fields is None:
            return None
        values: Any = (tuple(field) if isinstance(field, list) else field for field in fields)
        return cls(*values)


class DTensors:
    """The DTensors of a state dict to load.

    All ranks of each gang in ``found`` must construct it; they exchange about 200 bytes per
    DTensor.

    :param found: the DTensors by their keys, with the gangs of their tables.
    """

    def __init__(self, found: Mapping[str, tuple[DTensor, Gang]]) -> None:
        self._layouts: dict[str, list[Layout | None]] = {}
        for gang in dict.fromkeys(gang for _, gang in found.values()):
            own = {k: astuple(Layout.of(value)) for k, (value, g) in found.items() if g is gang}
            all_layouts = of_all_ranks(gang, own)
            for key in own:
                self._layouts[key] = [Layout.received(layouts.get(key)) for layouts in all_layouts]

    def on_this_rank(
        self, key: str, value: DTensor, dim: int, shape: tuple[int, ...], gang: Gang
    ) -> tuple[Tensor, bool]:
        """Returns the table at ``key``, or this rank's block of it. Gathers only if needed.

        :param dim: the dimension that the table is cut along, over ``gang``.
        :param shape: the shape of the whole table.
        :returns: the tensor, and whether it is the whole table.
        :raises ValueError: on all ranks of the gang, if the DTensor has another shape, or the gang
            alone can't gather it.
        """
        layouts, members = self._checked(key, shape), _global_ranks(gang)
        placements = layouts[0].placements
        if all(placement.startswith("Replicate") for placement in placements):
            return _arrived(value.to_local()), True
        is_cut_alike = all(list(layout.ranks) == members for layout in layouts)
        if is_cut_alike and placements == (repr(Shard(dim)),):
            return _arrived(value.to_local()), False
        _check_same_mesh(layouts, members)
        return _whole(value), True

    def _checked(self, key: str, shape: tuple[int, ...]) -> list[Layout]:
        """Returns the layout that each rank of the gang sees, after checking that they agree."""
        layouts = [layout for layout in self._layouts[key] if layout is not None]
        cuts = [layout and (layout.shape, layout.placements) for layout in self._layouts[key]]
        if len(set(cuts)) > 1:
            raise ValueError(
                "must be cut alike on all ranks of its gang, but by rank it is "
                f"{[cut or 'no DTensor' for cut in cuts]}. Load the same state dict on each."
            )
        if layouts[0].shape != shape:
            raise ValueError(f"must have the shape {shape}, but has {layouts[0].shape} instead.")
        return layouts


def _check_same_mesh(layouts: list[Layout], members: list[int]) -> None:
    """Checks that every rank of the mesh is in the gang, and sees the same layout."""
    by_rank = dict(zip(members, layouts, strict=False))
    for rank, layout in by_rank.items() or [(dist.get_rank(), layouts[0])]:
        if not layout.is_ascending:
            raise ValueError(
                "must be a DTensor over a mesh of ascending ranks, but the ranks are "
                f"{list(layout.ranks)}, which torch orders in two ways. Make the mesh of sorted "
                "ranks, or load the whole table."
            )
        if any(by_rank.get(other) != layout for other in layout.ranks):
            raise ValueError(
                f"must be a DTensor over ranks of its gang, {members}, but on global rank {rank} "
                f"it is over {list(layout.ranks)}, and would wait for ranks that may not load it. "
                "Gather it first, on all ranks of its mesh: `full_tensor()`."
            )


def _global_ranks(gang: Gang) -> list[int]:
    if isinstance(gang, FakeGang):  # Beyond one rank, its members don't exist.
        return [dist.get_rank()] if gang.size == 1 else []
    return dist.get_process_group_ranks(gang.as_process_group())


def _whole(value: DTensor) -> Tensor:
    """Gathers ``value``."""
    sent = DTensor.from_local(
        sendable(value.to_local()),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
    whole: Tensor = sent.full_tensor()
    return whole.view(value.dtype)


def _arrived(tensor: Any) -> Tensor:
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
