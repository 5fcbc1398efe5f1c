"""A gang over the tensor-parallel group that DeepSpeed uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, final

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from tp_embed.gang import Gang, GangError
from tp_embed.gang.process_group import ProcessGroupGang

from .checks import check_model
from .describe import describe_model
from .layers import register_layer
from .private import (
    bwc_tensor_model_parallel_group,
    is_zero_param,
    make_tensor_parallel_groups,
    tensor_parallel_group,
)
from .timing import log_collective


@final
class DeepSpeedGang(ProcessGroupGang):
    """A :class:`ProcessGroupGang` whose layers DeepSpeed treats as its own tensor-parallel layers.

    Create it with one of the class methods, or over any process group like the base class.
    DeepSpeed's ``comms_logger`` logs its collectives, as ``tp_embed.all_gather`` and so on.
    """

    def __init__(self, process_group: ProcessGroup | None, device: torch.device | str) -> None:
        super().__init__(process_group, device)
        self.register_collective_hook(log_collective)

    @classmethod
    def from_groups(cls, tp_size: int | None = None) -> Self:
        """Returns a gang over the tensor-parallel group of ``deepspeed.utils.groups``, which
        AutoTP uses.

        :param tp_size: the ``autotp_size`` of the DeepSpeed config. Required before
            ``deepspeed.initialize()``, to make the groups (this initializes torch.distributed if
            needed); only checked once the groups exist.
        :raises GangError: no groups exist yet and ``tp_size`` is ``None``.
        :raises ValueError: ``tp_size`` does not divide the number of processes, or differs from
            the size of existing groups.
        """
        if tp_size is not None:
            deepspeed.init_distributed()
            world_size = dist.get_world_size()
            if tp_size < 1 or world_size % tp_size:
                raise ValueError(
                    f"`tp_size` must divide the number of processes ({world_size}), "
                    f"but is {tp_size} instead."
                )
            make_tensor_parallel_groups(tp_size)
        try:
            group = tensor_parallel_group()
        except AssertionError as e:
            raise GangError(
                "DeepSpeed's tensor-parallel groups do not exist yet. Pass `tp_size`, the "
                "`autotp_size` of the DeepSpeed config, or call `deepspeed.initialize()` first."
            ) from e
        gang = cls._over(group)
        if tp_size is not None and gang.size != tp_size:
            raise ValueError(
                f"`tp_size` must be {gang.size}, the size of the tensor-parallel groups that "
                f"DeepSpeed has already made in this process, but is {tp_size} instead."
            )
        return gang

    @classmethod
    def from_world(cls) -> Self:
        """Returns a gang over all processes, for a :class:`~tp_embed.RowWiseEmbedding`. Initializes
        torch.distributed if needed."""
        deepspeed.init_distributed()
        return cls._over(None)

    @classmethod
    def from_mpu(cls, mpu: Any) -> Self:
        """Returns a gang over the tensor-parallel group of a Megatron-style model-parallel unit,
        such as ``megatron.core.mpu`` or the grid of a ``PipelineModule``.

        :raises TypeError: ``mpu`` has no getter for the group.
        :raises ValueError: DeepSpeed would sum gradients over ranks of the group.
        """
        try:
            group = bwc_tensor_model_parallel_group(mpu)
        except AttributeError as e:
            raise TypeError(
                "`mpu` must have `get_tensor_model_parallel_group()` (or the older "
                f"`get_model_parallel_group()`), but is a `{type(mpu).__name__}` without them."
            ) from e
        gang = cls._over(group)
        gang._check_mpu(mpu)
        return gang

    def _check_mpu(self, mpu: Any) -> None:
        for kind in ("sequence_data", "data"):
            name = f"get_{kind}_parallel_group"
            group = getattr(mpu, name, lambda: None)()
            ranks = [] if group is None else dist.get_process_group_ranks(group)
            if len(set(ranks) & set(self.global_ranks)) > 1:
                raise ValueError(
                    f"The tensor-parallel ranks of `mpu`, {self.global_ranks}, must be in "
                    f"different groups of `{name}()`, but {ranks} are one group: DeepSpeed would "
                    "sum gradients of different shards. Pass an `mpu` with tensor-parallel groups "
                    "of their own, or leave the tables whole."
                )

    @classmethod
    def from_engine(cls, engine: Any) -> Self:
        """Returns a gang over the tensor-parallel group of a ``DeepSpeedEngine``.

        :raises GangError: the engine has neither AutoTP nor an ``mpu``.
        """
        if engine.mpu is None:
            raise GangError(
                "`engine` has no tensor-parallel group. Set `tensor_parallel.autotp_size` in its "
                "DeepSpeed config, or pass `mpu` to `deepspeed.initialize()`."
            )
        return cls.from_mpu(engine.mpu)

    @classmethod
    def _over(cls, group: Any) -> Self:
        # The device that the engine will use; it may not be the current one yet.
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank is None:
            return cls(group, get_accelerator().current_device_name())
        return cls(group, get_accelerator().device_name(int(local_rank)))

    def adopt(self, layer: Module) -> None:
        register_layer(layer, self)

    def check_model(self, model: Module) -> None:
        check_model(model)

    def describe_model(self, model: Module) -> None:
        describe_model(model, self)

    def whole(self, *parameters: Tensor, modified: bool = False) -> AbstractContextManager[object]:
        """Gathers Parameters that ``deepspeed.zero.Init`` has partitioned."""
        partitioned: list[Any] = [p for p in parameters if is_zero_param(p)]
        if not partitioned:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None)

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def fetched_with(self, model: Module) -> Sequence[Gang]:
        """Returns the groups that ``deepspeed.zero.Init`` has partitioned ``model`` over."""
        partitioned: list[Any] = [p for p in model.parameters() if is_zero_param(p)]
        found = dict.fromkeys(p.ds_process_group for p in partitioned)
        for group in found:
            ranks = dist.get_process_group_ranks(group)
            if len(set(ranks) & set(self.global_ranks)) > 1:
                raise ValueError(
                    "`deepspeed.zero.Init` must partition over data-parallel ranks, but does over "
                    f"{ranks}, where {self.global_ranks} are tensor-parallel: their shards "
                    "would be mixed up. Pass it `data_parallel_group=deepspeed.utils.groups."
                    "get_data_parallel_group()`, or the group of your `mpu`."
                )
        return [ProcessGroupGang(group, self.device) for group in found]
