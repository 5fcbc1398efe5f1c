"""All of DeepSpeed that this package uses and that is not documented. Other modules import it from
here.

Each has a line on what it is for and, after the colon, what would go wrong without it.
``pyproject.toml`` allows the version of DeepSpeed for which the tests have passed, since releases
change what is private. ``tests/integrations/deepspeed/test_private.py`` names what another version
lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

# The attributes that describe a Parameter, and a model, to universal checkpoints, and an entry of
# theirs: DeepSpeed would not find what we tell it.
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META as DS_AUTOTP_UC_META
from deepspeed.checkpoint.constants import PARAM_GROUPS as PARAM_GROUPS
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO as UNIVERSAL_CHECKPOINT_INFO
from deepspeed.checkpoint.universal_checkpoint import _resolve_autotp_partition

# Its logger and timers of collectives: ours would not be among those it prints.
from deepspeed.comm import comm as comm

# A default of the arguments of `deepspeed.initialize()`.
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT as TORCH_DISTRIBUTED_DEFAULT_PORT

# What AutoTP is about to cut: it would cut tables that are sharded already, or we those it needs.
from deepspeed.module_inject.auto_tp import AutoTP as AutoTP
from deepspeed.module_inject.autotp_config import PartitionType as PartitionType

# The attributes of a tensor-parallel Parameter: norms would count shards as copies.
from deepspeed.module_inject.layers import DS_IS_REPLACED_MODULE as DS_IS_REPLACED_MODULE
from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL as DS_TENSOR_MODEL_PARALLEL

# The class of AutoTP's layers, which ours are registered for: state dicts would hold shards.
from deepspeed.module_inject.layers import TensorParallel_Layer as TensorParallel_Layer

# The description of a model for universal checkpoints: shards could not be merged.
from deepspeed.module_inject.layers import (
    collect_autotp_universal_checkpoint_info as collect_autotp_universal_checkpoint_info,
)

# Whether AutoTP's layers train: models for inference would be sharded for training.
from deepspeed.module_inject.layers import is_autotp_training_mode as is_autotp_training_mode

# How many attention heads a model has: tables with a column for each are left to AutoTP.
from deepspeed.module_inject.tp_shard import AutoTPMeta as AutoTPMeta

# Parameters of experts, which each rank has others of: they would be exported as if they were not.
from deepspeed.moe.utils import is_moe_param as is_moe_param

# The config, with its defaults: options that train wrongly would not be refused.
from deepspeed.runtime.config import get_gradient_clipping as get_gradient_clipping
from deepspeed.runtime.tensor_parallel import (
    get_tensor_parallel_config as get_tensor_parallel_config,
)
from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config as load_ds_config
from deepspeed.runtime.tensor_parallel.init_utils import (
    merge_tp_model_init_into_config as merge_tp_model_init_into_config,
)

# Parameters that `deepspeed.zero.Init` has partitioned: tables would be cut that are empty.
from deepspeed.runtime.zero.utils import is_zero_param as is_zero_param
from deepspeed.utils import groups

# The tensor-parallel group of an `mpu`, by its newer or older name: no gang could be made of it.
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group as bwc_tensor_model_parallel_group
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank as bwc_tensor_model_parallel_rank
from deepspeed.utils.bwc import (
    bwc_tensor_model_parallel_world_size as bwc_tensor_model_parallel_world_size,
)
from torch import Tensor
from torch.nn import Parameter

# Whether a model brings a plan of its own for AutoTP, which cuts no tables then.
get_hf_tp_plan = _get_hf_tp_plan
# The shard of a whole tensor, as universal checkpoints are cut when they are loaded.
resolve_autotp_partition = _resolve_autotp_partition


# Groups


def make_tensor_parallel_groups(size: int) -> None:
    """The groups that AutoTP takes: it would make others than the gang's."""
    groups._init_tp_mesh_device(tensor_model_parallel_size=size)


def tensor_parallel_group() -> Any:
    """:raises AssertionError: there are none yet."""
    return groups.get_tensor_model_parallel_group()


# Models and Parameters


def layer_specs_of(pipeline: Any) -> Sequence[Any]:
    """The layers of all stages of a ``PipelineModule``: tied tables on other stages would not be
    seen."""
    specs: Sequence[Any] = pipeline._layer_specs
    return specs


def describe(parameter: Parameter, tp_size: int, **what: Any) -> None:
    """Leaves the description of a cut Parameter, as AutoTP's layers do: universal checkpoints could
    not merge its shards."""
    layer = SimpleNamespace(tp_world_size=tp_size)
    TensorParallel_Layer._set_param_uc_meta(layer, parameter, **what)


def mark_replaced(
    parameter: Parameter,
    gather: Callable[[list[Parameter]], None],
    partition: Callable[[list[Parameter]], None],
) -> None:
    """Marks a Parameter as one of a tensor-parallel layer, as AutoTP does: norms would count shards
    as copies, and state dicts would hold shards."""
    attributes = {
        DS_IS_REPLACED_MODULE: True,
        DS_TENSOR_MODEL_PARALLEL: True,
        "gather_params": gather,
        "_tp_partition": partition,
    }
    for name, value in attributes.items():
        setattr(parameter, name, value)


def stage3_of(parameter: Any) -> Any:
    """The optimizer of ZeRO 3 that a Parameter knows, or ``None``: `safe_get_full_*` ask it."""
    return vars(parameter).get("_z3_optimizer")


def link_empty(parameter: Any, get: Callable[..., Any]) -> None:
    """Lets an empty Parameter have the values that ``get`` gives, as ZeRO 1 and 2 let others:
    ranks would be left waiting for this one."""
    parameter._hp_mapping = None
    parameter.get_full_hp_param = parameter.get_full_hp_grad = get
    parameter.set_full_hp_param = parameter.set_full_hp_grad = lambda *_: None


def set_stage3(parameter: Any, optimizer: Any) -> None:
    """Lets a Parameter know ``optimizer`` as that of ZeRO 3."""
    parameter._z3_optimizer = optimizer


def is_of_engine(parameter: Any) -> bool:
    """Whether ZeRO has the Parameter: its vocabulary would be resized under the optimizer."""
    return any(hasattr(parameter, name) for name in ("_hp_mapping", "_z3_optimizer", "ds_id"))


def local_gradient(parameter: Any) -> tuple[Tensor | None, int]:
    """The piece of the averaged gradient that this rank updates, in fp32 where ZeRO has it so, and
    the number of the data-parallel ranks that it is cut over: the monitor would report norms of
    other gradients."""
    p = parameter
    if is_zero_param(p):
        return p._z3_optimizer.get_local_fp32_grad_for_param(p), p.ds_process_group.size()
    if not hasattr(p, "_hp_mapping"):
        return p.grad, 1
    pieces = dist.get_world_size(p._dp_group)
    if p._hp_mapping is None:
        return None, pieces  # Other ranks update this Parameter.
    gradient = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).flatten()
    own = p._hp_mapping.lp_fragment_address
    if gradient.numel() == p.numel():  # A buffer of the whole, of which this rank has a piece.
        gradient = gradient.narrow(0, own.start, own.numel)
    return gradient, pieces


# Engines


def persistent_buffers(engine: Any) -> dict[str, Tensor]:
    """The buffers that the engine saves: others would be exported and loaded as well."""
    buffers = dict(engine.module.named_buffers())
    return {name: buffers[name] for name in engine._get_buffer_names() if name in buffers}


def loss_scale(engine: Any) -> float:
    """The factor of the gradients in fp16: the monitor would report scaled norms."""
    scaler = engine.torch_autocast_z0_gradscaler
    scale = scaler.get_scale() if scaler else engine._get_optimizer_loss_scale()
    return float(scale or 1.0)


def wrap_step(engine: Any, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> Any:
    """Replaces what takes the step of an engine: where gradients are reduced and not yet clipped,
    and the only place that all of a script's loop, a pipeline's schedule and other libraries'
    trainers go through.

    :returns: a function that puts it back, unless something else has come around it since.
    """
    before = engine._take_model_step
    wrapped = engine._take_model_step = wrap(before)

    def unwrap() -> None:
        if engine._take_model_step is wrapped:
            engine._take_model_step = before

    return unwrap


def after_linking(optimizer: Any, action: Callable[[], None]) -> None:
    """Does ``action`` now and whenever ZeRO's ``optimizer`` links its fp32 values to Parameters, as
    it does again when a checkpoint is loaded: ``safe_set_full_*()`` would mix up shards again."""
    link = getattr(optimizer, "_link_all_hp_params", None)
    if link is None:
        return

    def link_and_act() -> None:
        link()
        action()

    optimizer._link_all_hp_params = link_and_act
    action()


def load_universal_checkpoint(engine: Any, *args: Any, **options: Any) -> Any:
    """``engine.load_checkpoint()``; at ZeRO 0, that takes the optimizer for one of ZeRO afterwards,
    so less of it."""
    load = engine.load_checkpoint if engine.zero_optimization_stage() else engine._load_checkpoint
    return load(*args, **options)


@contextmanager
def universal_mode(engine: Any) -> Iterator[None]:
    """As if `checkpoint.load_universal` were set in the DeepSpeed config. And with the engine's own
    tensor-parallel group: ZeRO 3 takes that of AutoTP, which an `mpu` of another kind, or a second
    engine, need not have, and ZeRO 1 and 2 ask an `mpu` by names that older ones lack."""
    changes: list[tuple[Any, str, Any]] = [(engine._config, "load_universal_checkpoint", True)]
    if engine.mpu is not None:
        group = bwc_tensor_model_parallel_group(engine.mpu)
        changes.append((groups, "_TENSOR_MODEL_PARALLEL_GROUP", group))
        if engine.zero_optimization_stage() in (1, 2):
            unit = SimpleNamespace(
                get_tensor_model_parallel_rank=lambda: dist.get_rank(group),
                get_tensor_model_parallel_world_size=lambda: dist.get_world_size(group),
            )
            changes.append((engine.optimizer, "mpu", unit))
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)
