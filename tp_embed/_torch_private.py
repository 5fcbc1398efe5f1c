"""All private names of torch that this package uses. Other modules import them from here.

A comment for each says what it is for and, after the colon, what would go wrong without it.
``pyproject.toml`` allows the versions of torch that pass the tests.
``tests/test_torch_private.py`` lists the names that another version lacks.

Names on the path of a lookup are aliases, not wrapper functions, which would be slower.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Treats shards as plain tensors: layers would be refused the same operations as users.
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _distributed_c10d

# Rendezvous before there is a process group. Public names, but untyped where they are public.
from torch._C._distributed_c10d import HashStore as HashStore
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore
from torch._C._dynamo import eval_frame

# Tells `vmap()` from other callers: its tensors would lose the class of logits.
from torch._functorch import vmap

# Keeps communicating operators in order: compiled graphs of ranks would run them in different ones.
from torch._library.effects import EffectType as EffectType

# Operators of graphs, which were checked when traced: they would refuse shards.
from torch._ops import OperatorBase as OperatorBase

# Detects and makes fake tensors: lookups of them would send, and planning checkpoints would
# allocate tensors.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup, distributed_c10d

# A collective that may still run when its result is loaded: a block would be cut out too early.
from torch.distributed._functional_collectives import AsyncCollectiveTensor as AsyncCollectiveTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils

# Detects random numbers drawn by init functions: pad rows would keep them.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Finds shards among the arguments of a function, and the tensors of its result.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

# Names that subclasses of `torch.nn.Module` override, or that are copied from module to module, so
# no alias can replace them.
MODULE_NAMES = (
    # tp_embed.nn.gang_layer: shards would lose their marks when a model is moved, saved or loaded.
    "_apply",
    "_load_from_state_dict",
    "_save_to_state_dict",
    # tp_embed.surgery: tables would be missed, or replaced without their buffers.
    "_buffers",
    "_compiled_call_impl",
    "_get_name",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
    # tp_embed.surgery: hooks would neither be carried over nor refused.
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)

# Autograd. The id of the backward running in this thread, or -1: lookups would free what their
# backward needs too early, or too late.
current_graph_task_id = torch._C._current_graph_task_id
# Whether that backward may run again: likewise.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# Tracing. The active mode of a kind, or None: lookups would run instead of being traced.
get_dispatch_mode = torch._C._get_dispatch_mode
DispatchModeKey = torch._C._TorchDispatchModeKey

# torch.func. Unwraps tensors of `vmap()` and `grad()`: targets under `vmap()` wouldn't be checked.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
get_unwrapped = torch._C._functorch.get_unwrapped
# Detects `is_grads_batched=True`: the gradients would overwrite each other's memory.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

# Operations. `torch.nn.functional.linear` before DeepSpeed replaces it: at ZeRO 3, DeepSpeed's
# version saves the shard's Parameter, which is empty by the time of the backward.
linear = torch._C._nn.linear
# An assertion on the device: the host would wait for each batch of targets.
assert_async = torch._assert_async
# A view that autograd doesn't track as one: users couldn't write to outputs in place.
unsafe_view = torch.ops.aten._unsafe_view
# Called by `clip_grad_norm_()` and `GradScaler`: norms and infinities would cover one shard only.
foreach_norm = torch._foreach_norm
unscale = torch._amp_foreach_non_finite_check_and_unscale_

# Pickles shards as Parameters: plain torch couldn't load them.
rebuild_parameter = torch._utils._rebuild_parameter
rebuild_parameter_with_state = torch._utils._rebuild_parameter_with_state

# The collectives of this process: the watchdog wouldn't know what hangs and where.
_dump_flight_record: Any = _distributed_c10d._dump_fr_trace_json  # type: ignore[attr-defined]
# The store of the job: the watchdog and the monitor couldn't exchange data.
default_store = distributed_c10d._get_default_store
# Looks up a process group by name: a pickled gang wouldn't find its group again.
resolve_process_group: Any = distributed_c10d._resolve_process_group


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Returns whether a transform of :mod:`torch.func` or forward-mode AD is active: their
    derivatives would miss the contributions of other ranks."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def running_functions() -> Iterator[tuple[Any, ...]]:
    """Yields the arguments of each :class:`torch.autograd.Function` whose forward runs, innermost
    first: a loss of another library, which combines sums over ranks, would be refused its logits,
    or else users would not be."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            yield frame.f_locals["args"]
        frame = frame.f_back


def is_batching() -> bool:
    """Returns whether :func:`torch.vmap` called ``__torch_function__``, which called what calls
    this: it unwraps tensors, and would drop the class of logits."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "__torch_function__":
        frame = frame.f_back
    while frame is not None and frame.f_code.co_name in ("__torch_function__", "_fn"):
        frame = frame.f_back
    return frame is not None and frame.f_globals is vars(vmap)


def version(tensor: Tensor) -> int:
    """Returns the version counter of ``tensor``: modified gradient buffers would be reused without
    being cleared, and the loss of deferred logits would take hidden states that have changed."""
    return tensor._version


def is_alone(tensor: Tensor) -> bool:
    """Returns whether no other tensor shares its memory: gradients in use would be overwritten."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count == 2  # The tensor, and the storage object created here.


def hooks_of(tensor: Tensor) -> Iterable[Any]:
    """Returns the hooks of ``tensor.register_hook()``: hooks would be registered repeatedly."""
    return (tensor._backward_hooks or {}).values()


def post_accumulate_hooks_of(tensor: Tensor) -> Iterable[Any]:
    """Returns the hooks of ``tensor.register_post_accumulate_grad_hook()``: likewise."""
    return (tensor._post_accumulate_grad_hooks or {}).values()


def mark_coalesced(sparse: Tensor) -> None:
    """Marks a sparse tensor as coalesced if its indices ascend: optimizers would sort again."""
    rows = sparse._indices()[0]
    if (rows[1:] > rows[:-1]).all():
        sparse._coalesced_(True)


def parts_of_sparse(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows and values of a row-sparse tensor that may repeat rows: coalescing would sum
    them in an order that changes."""
    return sparse._indices()[0], sparse._values()


def metadata_of(state_dict: Any) -> dict[str, dict[str, Any]]:
    """Returns the metadata of a state dict, by module: saved shards couldn't be identified."""
    metadata: dict[str, dict[str, Any]] | None = getattr(state_dict, "_metadata", None)
    return {} if metadata is None else metadata


def support_foreach(parameter: Any, gradients: Iterable[type[Tensor]]) -> None:
    """Enables the fast paths of optimizers and norms for these subclasses of Tensor, as for
    DTensor: they would loop over the Parameters."""
    torch_optimizer._foreach_supported_types.append(parameter)
    _foreach_utils._foreach_supported_types.extend(gradients)


def never_compile(function: Any) -> None:
    """Keeps torch.compile from compiling ``function`` by itself if its caller isn't traced: the
    graph of one operation would run for another."""
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    eval_frame.set_code_exec_strategy(function.__code__, skip)


def is_exchanged_by_ddp(weight: Tensor) -> bool:
    """Returns whether a running DistributedDataParallel will all-reduce the gradient of ``weight``:
    it would treat a sparse one as dense."""
    wrapper: Any = DistributedDataParallel._active_ddp_module
    return (
        wrapper is not None
        and wrapper.require_backward_grad_sync
        and any(parameter is weight for parameter in wrapper._module_parameters)
    )


def find_backend(group: ProcessGroup, device: torch.device) -> tuple[str, timedelta | None]:
    """Returns the name and the timeout, if it has one, of the backend of ``group`` for ``device``.

    :raises RuntimeError: ``group`` has no backend for ``device``.
    """
    backend: Any = group._get_backend(device)
    return backend.name(), getattr(backend.options, "_timeout", None)


def new_group(name: str, global_ranks: list[int], backend: str, timeout: timedelta) -> ProcessGroup:
    """Creates a process group like ``torch.distributed.new_group()``, called by its members only.

    torch names groups by a counter that must be the same on all processes of the job, or, with
    ``use_local_synchronization``, on all members, and hangs if counters differ. Here the members
    have agreed on a name.
    """
    world = distributed_c10d._get_default_group()
    bound_device_id = world.bound_device_id
    # With a bound device NCCL would split the job's communicator, which needs all processes.
    world.bound_device_id = None
    try:
        group, _ = distributed_c10d._new_process_group_helper(
            len(global_ranks),
            global_ranks.index(dist.get_rank()),
            global_ranks,
            dist.Backend(backend),
            default_store(),
            distributed_c10d.GroupName(name),
            timeout=timeout,
        )
    finally:
        world.bound_device_id = bound_device_id
    distributed_c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(global_ranks)}
    return group  # type: ignore[no-any-return]


def ranks_of_group(name: str) -> list[int]:
    """Returns the global ranks of the process group ``name`` of the flight recorder: the watchdog
    couldn't name missing ranks."""
    world = distributed_c10d._world
    ranks = [world.pg_group_ranks[group] for group, n in world.pg_names.items() if n == name]
    return sorted(ranks[0]) if ranks else []


def recorded_collectives() -> list[dict[str, Any]]:
    """Returns the latest collectives in torch's flight recorder, and in NCCL's if torch has NCCL:
    the watchdog wouldn't know what a rank waits for."""
    dumps = (_dump_flight_record, getattr(_distributed_c10d, "_dump_nccl_trace_json", None))
    records = [json.loads(dump(True, False)) for dump in dumps if dump is not None]
    return [entry for record in records for entry in record.get("entries", [])]


def group_statuses() -> dict[str, dict[str, Any]]:
    """Returns the sequence numbers of the last collectives of each process group: the watchdog
    wouldn't notice that a collective of gloo hangs."""
    record = json.loads(_dump_flight_record(False, True))
    statuses: dict[str, dict[str, Any]] = record.get("pg_status", {})
    return statuses


def dcp_storage_info() -> Any:
    """Returns the class that locates items in the metadata of a distributed checkpoint: torch
    couldn't read our checkpoints, nor we torch's."""
    from torch.distributed.checkpoint import filesystem  # Takes a second.

    return filesystem._StorageInfo
