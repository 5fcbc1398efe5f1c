"""All private names of torch that this package uses. Other modules import them from here.

Each has a line on what it is for and, after the colon, what would go wrong without it.
``pyproject.toml`` allows the versions of torch for which the tests have passed.
``tests/test_torch_private.py`` names what another version lacks.

What a lookup calls has another name here, and no function around it, which would take time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# In its context a shard is a plain tensor: layers would be refused what is refused to users.
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import _distributed_c10d

# Where ranks meet before there is a process group. Public names, but without types there.
from torch._C._distributed_c10d import HashStore as HashStore
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore
from torch._C._dynamo import eval_frame

# Keeps operators that send in one order: ranks would meet in different ones in compiled graphs.
from torch._library.effects import EffectType as EffectType

# Operators of graphs, which were checked when they were traced: they would be refused shards.
from torch._ops import OperatorBase as OperatorBase

# Lookups of fake tensors send nothing, and checkpoints are laid out without memory for tensors.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup, distributed_c10d

# What is still on its way when it is loaded: a block would be cut out before it is there.
from torch.distributed._functional_collectives import AsyncCollectiveTensor as AsyncCollectiveTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils

# Notices that an init function draws random numbers: pad rows would keep what was drawn.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Finds shards among the arguments of a function.
from torch.utils._pytree import tree_leaves as tree_leaves

# What subclasses of `torch.nn.Module` override, and others copy from module to module, by names
# that no function can stand for.
MODULE_NAMES = (
    # tp_embed.nn.gang_layer: shards would not stay marked when a model moves, is saved, is loaded.
    "_apply",
    "_load_from_state_dict",
    "_save_to_state_dict",
    # tp_embed.surgery: tables would not be found, or replaced without their buffers.
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

# Autograd. The number of the backward that runs in this thread, or -1: ids are checked, and memory
# is kept, otherwise in a backward.
current_graph_task_id = torch._C._current_graph_task_id
# Whether that backward may run again: what it needs is let go too early, or too late.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# Tracing. The active mode of a kind, or None: lookups would be run instead of recorded.
get_dispatch_mode = torch._C._get_dispatch_mode
DispatchModeKey = torch._C._TorchDispatchModeKey

# torch.func. What `vmap()` and `grad()` wrap: targets under `vmap()` could not be checked.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
get_unwrapped = torch._C._functorch.get_unwrapped
# Several gradients at once, by `is_grads_batched=True`: memory of gradients would be written twice.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

# Operations. The product of `torch.nn.functional.linear`, which DeepSpeed replaces by one of its
# own: at ZeRO 3 that one keeps the shard's Parameter, which is empty by the time of its backward.
linear = torch._C._nn.linear
# An assertion that the host does not wait for: it would wait for each batch of targets.
assert_async = torch._assert_async
# Like a view, but one that may be written to in place after an autograd function returned it.
unsafe_view = torch.ops.aten._unsafe_view
# What `clip_grad_norm_()` and `GradScaler` call: norms and infinities would be those of a shard.
foreach_norm = torch._foreach_norm
unscale = torch._amp_foreach_non_finite_check_and_unscale_

# What pickle writes for a Parameter: shards are saved as what plain torch loads.
rebuild_parameter = torch._utils._rebuild_parameter
rebuild_parameter_with_state = torch._utils._rebuild_parameter_with_state

# The collectives of this process: the watchdog would know neither what hangs nor where.
_dump_flight_record: Any = _distributed_c10d._dump_fr_trace_json  # type: ignore[attr-defined]
# The store of the job: the watchdog and the monitor meet by it.
default_store = distributed_c10d._get_default_store
# The process group of a name: a pickled gang would not find the one that it had.
resolve_process_group: Any = distributed_c10d._resolve_process_group


def is_transformed() -> bool:
    """Whether a transform of :mod:`torch.func` or forward-mode AD is under way: their derivatives
    would leave out what other ranks hold."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to: memory of gradients would be taken again as if nobody
    had."""
    return tensor._version


def is_alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares its memory: gradients that are in use would be overwritten."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count == 2  # The tensor, and the object that was just asked for.


def hooks_of(tensor: Tensor) -> Iterable[Any]:
    """What ``tensor.register_hook()`` was given: hooks would be registered again and again."""
    return (tensor._backward_hooks or {}).values()


def post_accumulate_hooks_of(tensor: Tensor) -> Iterable[Any]:
    """What ``tensor.register_post_accumulate_grad_hook()`` was given: likewise."""
    return (tensor._post_accumulate_grad_hooks or {}).values()


def mark_coalesced(sparse: Tensor) -> None:
    """Marks a sparse tensor as coalesced if its indices ascend: optimizers would sort it again."""
    rows = sparse._indices()[0]
    if (rows[1:] > rows[:-1]).all():
        sparse._coalesced_(True)


def metadata_of(state_dict: Any) -> dict[str, dict[str, Any]]:
    """What modules note in a state dict, by their names: it would not be known of what saved
    weights are shards."""
    metadata: dict[str, dict[str, Any]] | None = getattr(state_dict, "_metadata", None)
    return {} if metadata is None else metadata


def support_foreach(parameter: Any, gradients: Iterable[type[Tensor]]) -> None:
    """Lets optimizers and norms take their fast paths for these subclasses of Tensor, as they do
    for DTensors: they would take one step for each Parameter."""
    torch_optimizer._foreach_supported_types.append(parameter)
    _foreach_utils._foreach_supported_types.extend(gradients)


def never_compile(function: Any) -> None:
    """Keeps torch.compile from making a graph of ``function`` where its caller is not traced: one
    of an operation would be taken for another."""
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    eval_frame.set_code_exec_strategy(function.__code__, skip)


def is_exchanged_by_ddp(weight: Tensor) -> bool:
    """Whether DistributedDataParallel runs, and will exchange the gradient of ``weight``: it would
    take a sparse one for a dense one."""
    wrapper: Any = DistributedDataParallel._active_ddp_module
    return (
        wrapper is not None
        and wrapper.require_backward_grad_sync
        and any(parameter is weight for parameter in wrapper._module_parameters)
    )


def find_backend(group: ProcessGroup, device: torch.device) -> tuple[str, timedelta]:
    """The name and the timeout of the backend of ``group`` for ``device``.

    :raises RuntimeError: there is none.
    """
    backend: Any = group._get_backend(device)
    return backend.name(), backend.options._timeout


def new_group(name: str, global_ranks: list[int], backend: str, timeout: timedelta) -> ProcessGroup:
    """``torch.distributed.new_group()`` for callers that are only a part of the job.

    That function names groups by a count that all processes of the job have to share, or, with
    ``use_local_synchronization``, by one that the members have to share; where counts differ it
    hangs. Here the members have agreed on a name.
    """
    world = distributed_c10d._get_default_group()
    bound_device_id = world.bound_device_id
    # With a bound device NCCL would split the communicator of the job, for which all have to call.
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
    """The global ranks of the process group that the flight recorder calls ``name``: the watchdog
    would not say who is missing."""
    world = distributed_c10d._world
    ranks = [world.pg_group_ranks[group] for group, n in world.pg_names.items() if n == name]
    return sorted(ranks[0]) if ranks else []


def recorded_collectives() -> list[dict[str, Any]]:
    """The latest collectives in torch's flight recorder, and in NCCL's own one if torch has NCCL:
    the watchdog would not know what a rank waits for."""
    dumps = (_dump_flight_record, getattr(_distributed_c10d, "_dump_nccl_trace_json", None))
    records = [json.loads(dump(True, False)) for dump in dumps if dump is not None]
    return [entry for record in records for entry in record.get("entries", [])]


def group_statuses() -> dict[str, dict[str, Any]]:
    """The numbers of the last collectives of each process group: the watchdog would not notice that
    a collective of gloo hangs."""
    record = json.loads(_dump_flight_record(False, True))
    statuses: dict[str, dict[str, Any]] = record.get("pg_status", {})
    return statuses


def dcp_storage_info() -> Any:
    """The class by which the metadata of a distributed checkpoint says where an item is: torch
    could not read the checkpoints that are written here, nor we those of torch."""
    from torch.distributed.checkpoint import filesystem  # Takes a second.

    return filesystem._StorageInfo
