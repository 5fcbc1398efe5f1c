"""All undocumented parts of DeepSpeed that this package uses. Other modules import them from here.

Each has a line that says what it is for and, after the colon, what would go wrong without it.
``pyproject.toml`` pins the DeepSpeed version that the tests have passed with, since releases change
private parts. ``tests/integrations/deepspeed/test_private.py`` names what another version lacks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

# Attributes that describe a Parameter and a model to universal checkpoints, and one of their
# entries: DeepSpeed would not find our descriptions.
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META as DS_AUTOTP_UC_META
from deepspeed.checkpoint.constants import PARAM_GROUPS as PARAM_GROUPS
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO as UNIVERSAL_CHECKPOINT_INFO
from deepspeed.checkpoint.universal_checkpoint import _resolve_autotp_partition

# DeepSpeed's logger and timers of collectives: it would not print ours.
from deepspeed.comm import comm as comm

# A default argument of `deepspeed.initialize()`.
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT as TORCH_DISTRIBUTED_DEFAULT_PORT

# What AutoTP will cut: it would cut sharded tables, or we would shard tables that it needs.
from deepspeed.module_inject.auto_tp import AutoTP as AutoTP
from deepspeed.module_inject.autotp_config import PartitionType as PartitionType

# Attributes of a tensor-parallel Parameter: norms would count shards as copies.
from deepspeed.module_inject.layers import DS_IS_REPLACED_MODULE as DS_IS_REPLACED_MODULE
from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL as DS_TENSOR_MODEL_PARALLEL

# The class of AutoTP's layers, which we register ours for: state dicts would hold shards.
from deepspeed.module_inject.layers import TensorParallel_Layer as TensorParallel_Layer

# The description of a model for universal checkpoints: they could not merge shards.
from deepspeed.module_inject.layers import (
    collect_autotp_universal_checkpoint_info as collect_autotp_universal_checkpoint_info,
)

# Whether AutoTP's layers train: models for inference would be sharded for training.
from deepspeed.module_inject.layers import is_autotp_training_mode as is_autotp_training_mode

# The number of attention heads: we would shard tables with a column per head.
from deepspeed.module_inject.tp_shard import AutoTPMeta as AutoTPMeta

# Parameters of experts, which differ between ranks: we would export one rank's experts.
from deepspeed.moe.utils import is_moe_param as is_moe_param

# The config, with its defaults: we would accept options that train wrongly.
from deepspeed.runtime.config import get_gradient_clipping as get_gradient_clipping
from deepspeed.runtime.tensor_parallel import (
    get_tensor_parallel_config as get_tensor_parallel_config,
)
from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config as load_ds_config
from deepspeed.runtime.tensor_parallel.init_utils import (
    merge_tp_model_init_into_config as merge_tp_model_init_into_config,
)

# Norms of gradients, over tensor-parallel ranks and groups of Parameters: tables that the engine
# does not clip would not count, and we would clip by another norm.
from deepspeed.runtime.utils import clip_grad_norm_, combine_grad_norm_groups

# Which outputs of modules have no tensors: see `pass_outputs()`.
from deepspeed.runtime.zero import utils as zero_utils

# Parameters that `deepspeed.zero.Init` has partitioned: we would cut empty tables.
from deepspeed.runtime.zero.utils import is_zero_param as is_zero_param
from deepspeed.utils import groups

# The tensor-parallel group of an `mpu`, by its newer or older name: an `mpu` would give no gang.
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group as bwc_tensor_model_parallel_group
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank as bwc_tensor_model_parallel_rank
from deepspeed.utils.bwc import (
    bwc_tensor_model_parallel_world_size as bwc_tensor_model_parallel_world_size,
)
from torch import Tensor
from torch.nn import Parameter

# Whether a model has its own plan for AutoTP: we would leave tables to AutoTP that it does not cut.
get_hf_tp_plan = _get_hf_tp_plan
# A rank's shard of a whole tensor: universal checkpoints could not be loaded.
resolve_autotp_partition = _resolve_autotp_partition


# Groups


def make_tensor_parallel_groups(size: int) -> None:
    """Makes the groups that AutoTP uses: it would make other groups than the gang's."""
    groups._init_tp_mesh_device(tensor_model_parallel_size=size)


def tensor_parallel_group() -> Any:
    """Returns the group that AutoTP uses: the gang could differ from it.

    :raises AssertionError: no groups exist yet.
    """
    return groups.get_tensor_model_parallel_group()


# Models and Parameters


def layer_specs_of(pipeline: Any) -> Sequence[Any]:
    """Returns the layers of all stages of a ``PipelineModule``: we would miss tied tables on other
    stages."""
    specs: Sequence[Any] = pipeline._layer_specs
    return specs


def pass_outputs(kind: type) -> None:
    """Makes ZeRO 3 pass outputs of modules of this type on, as it does numbers: it would warn that
    it cannot find the tensors in them."""
    is_builtin_type = zero_utils.is_builtin_type
    zero_utils.is_builtin_type = lambda value: isinstance(value, kind) or is_builtin_type(value)


def describe(parameter: Parameter, tp_size: int, **what: Any) -> None:
    """Attaches the description of a cut Parameter, as AutoTP's layers do: universal checkpoints
    could not merge its shards."""
    layer = SimpleNamespace(tp_world_size=tp_size)
    TensorParallel_Layer._set_param_uc_meta(layer, parameter, **what)


def mark_replaced(
    parameter: Parameter,
    gather: Callable[[list[Parameter]], None],
    partition: Callable[[list[Parameter]], None],
) -> None:
    """Marks a Parameter as tensor-parallel, as AutoTP does: norms would count shards as copies, and
    state dicts would hold shards."""
    attributes = {
        DS_IS_REPLACED_MODULE: True,
        DS_TENSOR_MODEL_PARALLEL: True,
        "gather_params": gather,
        "_tp_partition": partition,
    }
    for name, value in attributes.items():
        setattr(parameter, name, value)


def mark_distinct(parameter: Any) -> None:
    """Marks a Parameter that differs between data-parallel ranks, as an expert does: the engine
    would overwrite it with the first rank's. An engine that does not know it fails by the name of
    its group when it reduces gradients."""
    parameter.ds_optim_param = True
    parameter.allreduce = False
    parameter.group_name = "Build the engine by `tp_embed.integrations.deepspeed.initialize()`"


def stage3_of(parameter: Any) -> Any:
    """Returns the ZeRO 3 optimizer of a Parameter, or ``None``: `safe_get_full_*` would return
    shards without a mark."""
    return vars(parameter).get("_z3_optimizer")


def link_empty(parameter: Any, get: Callable[..., Any]) -> None:
    """Makes an empty Parameter return values by ``get``, as ZeRO 1 and 2 do for others: the other
    ranks would wait for this one."""
    parameter._hp_mapping = None
    parameter.get_full_hp_param = parameter.get_full_hp_grad = get
    parameter.set_full_hp_param = parameter.set_full_hp_grad = lambda *_: None


def set_stage3(parameter: Any, optimizer: Any) -> None:
    """Sets the ZeRO 3 optimizer of a Parameter: `safe_set_full_*` would take a whole table for a
    shard."""
    parameter._z3_optimizer = optimizer


def is_of_engine(parameter: Any) -> bool:
    """Returns whether ZeRO manages the Parameter: we would resize its vocabulary under the
    optimizer."""
    return any(hasattr(parameter, name) for name in ("_hp_mapping", "_z3_optimizer", "ds_id"))


def local_gradient(parameter: Any) -> tuple[Tensor | None, int]:
    """Returns this rank's piece of the averaged gradient, in fp32 where ZeRO keeps it so, and the
    number of data-parallel ranks that share the gradient: the monitor would report norms of other
    gradients."""
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
    if gradient.numel() == p.numel():  # A buffer of the whole gradient; this rank owns a piece.
        gradient = gradient.narrow(0, own.start, own.numel)
    return gradient, pieces


# Engines


def persistent_buffers(engine: Any) -> dict[str, Tensor]:
    """Returns the buffers that the engine saves, without tables that are set apart: we would export
    and load others as well."""
    named = engine.module.named_buffers()
    buffers = {name: buffer for name, buffer in named if not isinstance(buffer, Parameter)}
    return {name: buffers[name] for name in engine._get_buffer_names() if name in buffers}


def loss_scale(engine: Any) -> float:
    """Returns the loss scale for fp16: the monitor would report scaled norms."""
    scaler = engine.torch_autocast_z0_gradscaler
    scale = scaler.get_scale() if scaler else engine._get_optimizer_loss_scale()
    return float(scale or 1.0)


def wrap_step(engine: Any, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> Any:
    """Wraps the engine's step, where gradients are reduced but not clipped yet: the monitor would
    miss steps, since loops, pipeline schedules and trainers share no other place.

    :returns: a function that unwraps it, unless something else has wrapped it since.
    """
    before = engine._take_model_step
    wrapped = engine._take_model_step = wrap(before)

    def unwrap() -> None:
        if engine._take_model_step is wrapped:
            engine._take_model_step = before

    return unwrap


def check_before_saving(check: Callable[[Any, str], None]) -> None:
    """Calls ``check(engine, method)`` before an engine gathers a whole model, for itself or for
    Accelerate's `get_state_dict()`: where it can't gather tables, it would take shards for them."""
    for name in (
        "save_16bit_model",
        "_consolidated_16bit_state_dict",
        "_zero3_consolidated_16bit_state_dict",
    ):
        gather = getattr(DeepSpeedEngine, name)

        @wraps(gather)
        def checked(engine: Any, *args: Any, gather: Any = gather, **kwargs: Any) -> Any:
            check(engine, gather.__name__)
            return gather(engine, *args, **kwargs)

        setattr(DeepSpeedEngine, name, checked)


def check_before_building(check: Callable[[Any, Any], None]) -> None:
    """Calls ``check(model, config)`` when an engine is made: a section of the config that only we
    read would be ignored."""
    build = DeepSpeedEngine.__init__
    signature = inspect.signature(build)

    @wraps(build)
    def checked(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        check(given.get("model"), given.get("config"))
        build(*args, **kwargs)

    DeepSpeedEngine.__init__ = checked


def without_reduction(engine: Any, parameters: Sequence[Parameter]) -> None:
    """Leaves gradients out when the engine reduces gradients at ZeRO 0: it would average gradients
    of different shards."""
    find = engine._get_gradients_for_reduction

    def find_others() -> Any:
        hidden = [p for p in parameters if p.requires_grad]
        for parameter in hidden:
            parameter.requires_grad_(False)
        try:
            return find()
        finally:
            for parameter in hidden:
                parameter.requires_grad_(True)

    engine._get_gradients_for_reduction = find_others


def replace_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Replaces how the engine clips at ZeRO 0 in fp32: it would average the norms of shards over
    data-parallel ranks."""
    assert callable(engine.clip_fp32_gradients)
    engine.clip_fp32_gradients = clip


def norm_of_copies(parameters: Sequence[Parameter], mpu: Any) -> Tensor:
    """Returns the norm of the gradients of Parameters that data-parallel ranks share, by which the
    engine would clip."""
    norm: Tensor = clip_grad_norm_(parameters, max_norm=math.inf, mpu=mpu)
    return norm


def join_norm(engine: Any, own: Callable[[], Tensor], note: Callable[[Tensor], None]) -> None:
    """Adds ``own()``, the norm of gradients that DeepSpeed's optimizer does not have, to the norm
    that the engine clips by and looks for overflows in, and passes ``note`` the result: all others
    would be clipped by a wrong norm.

    :raises ValueError: the engine's optimizer computes its norm in another way.
    """
    optimizer = engine.optimizer

    def joined(norms: list[Tensor]) -> Tensor:
        norm = own().to(torch.as_tensor(norms[0]))  # With offloading, norms may be on the CPU.
        note(combine_grad_norm_groups([*norms, norm]))
        return norm

    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        scaled_global_norm = optimizer.scaled_global_norm

        def total_norm(*args: Any, **kwargs: Any) -> Tensor:
            norm = scaled_global_norm(*args, **kwargs)
            total: Tensor = combine_grad_norm_groups([norm, joined([norm])])
            return total

        optimizer.scaled_global_norm = total_norm
    elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
        get_norm_groups = optimizer._get_norm_groups

        def norms() -> list[Tensor]:
            groups = get_norm_groups()
            return [*groups, joined(groups)]

        optimizer._get_norm_groups = norms
    elif engine.zero_optimization_stage() == 0 and optimizer is engine.basic_optimizer:

        def clip() -> None:
            counted = Parameter(torch.empty(1, device=engine.device))
            counted.grad = own().view(1).to(counted)
            parameters = [*engine.module.parameters(), counted]
            note(clip_grad_norm_(parameters, engine.gradient_clipping(), mpu=engine.mpu))

        engine.clip_fp32_gradients = clip
    else:
        raise ValueError(
            "The engine's optimizer must be ZeRO's, or at ZeRO 0 one in fp32, for tables with an "
            f"optimizer of their own, but is `{type(optimizer).__name__}` instead, whose norm of "
            "gradients can't take them in. Set `zero_optimization.stage` to 1, 2 or 3 for bf16 and "
            "fp16, and with bf16 leave out `data_types.grad_accum_dtype` or set the stage to 2."
        )


def after_linking(optimizer: Any, action: Callable[[], None]) -> None:
    """Runs ``action`` now and whenever ZeRO's ``optimizer`` links its fp32 values to Parameters, as
    it does again after loading a checkpoint: ``safe_set_full_*()`` would mix up shards again."""
    link = getattr(optimizer, "_link_all_hp_params", None)
    if link is None:
        return

    def link_and_act() -> None:
        link()
        action()

    optimizer._link_all_hp_params = link_and_act
    action()


def load_universal_checkpoint(engine: Any, *args: Any, **options: Any) -> Any:
    """Calls ``engine.load_checkpoint()``, or its inner part at ZeRO 0: the rest would treat the
    optimizer as a ZeRO optimizer."""
    load = engine.load_checkpoint if engine.zero_optimization_stage() else engine._load_checkpoint
    return load(*args, **options)


@contextmanager
def universal_mode(engine: Any) -> Iterator[None]:
    """Sets `checkpoint.load_universal` for the engine, and its own tensor-parallel group: ZeRO 3
    would use AutoTP's group, which other kinds of `mpu` and a second engine may not have, and ZeRO
    1 and 2 would call methods that an older `mpu` lacks."""
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
