"""Loads universal checkpoints into engines of every ZeRO stage.

DeepSpeed loads trained Parameters at ZeRO 1 to 3. This module loads what DeepSpeed does not: ZeRO
0, frozen Parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor
from torch.nn import Parameter

from tp_embed.checkpoint.contents import MASTER, MOMENTS
from tp_embed.checkpoint.formats.universal.paths import (
    STEP,
    model_file,
    optimizer_state_file,
    parameters_of,
    state_file,
)
from tp_embed.gang.process_group import ProcessGroupGang

from .layout import has_mixed_up_masters, logical_shape, own_shard
from .private import (
    PARAM_GROUPS,
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
    load_universal_checkpoint,
    persistent_buffers,
    universal_mode,
)
from .table_checkpoints import check_no_tables
from .table_optimizers import own_tables_of
from .universal_format import find_universal, load, read_step, read_tensor


def load_universal(
    engine: Any,
    directory: str | Path,
    tag: str | None = None,
    *,
    strict: bool = True,
    load_lr_scheduler_states: bool = True,
) -> tuple[str, dict[str, Any]]:
    """Loads the output of :func:`to_universal` into ``engine``, at any ZeRO stage and any tensor-
    and data-parallel size: Parameters and buffers, moments and step of Adam, the param groups'
    hyperparameters, the learning-rate schedule and the step counts.

    All ranks must call it. Each reads the whole checkpoint but keeps only its part. The engine need
    not be configured for universal checkpoints. Runs no code from the files.

    :param directory: the output of :func:`to_universal`.
    :param tag: the checkpoint in it; defaults to the one in its file ``latest_universal``.
    :param strict: if ``False``, keeps frozen Parameters and buffers that the checkpoint lacks, as
        after saving with ``exclude_frozen_parameters``.
    :param load_lr_scheduler_states: whether to load the learning-rate schedule, if the engine has
        one.
    :returns: the results of ``engine.load_checkpoint()``: the path of the file that was read, and
        the client state.
    :raises FileNotFoundError: the checkpoint does not exist.
    :raises ValueError: the checkpoint does not fit the model or the optimizer. Nothing has changed.
    """
    directory = Path(directory)
    universal = find_universal(directory, tag)
    if isinstance(engine.module, PipelineModule):
        raise ValueError(
            "`engine` must have a model without pipeline stages, but has a `PipelineModule`."
        )
    stage = engine.zero_optimization_stage()
    if has_mixed_up_masters(engine):
        raise ValueError(
            "`engine` must have `zero_optimization.round_robin_gradients` off, since DeepSpeed "
            "would load optimizer states into the wrong Parameters, but has it on."
        )
    _check_files(universal, stage)
    param_groups = load(optimizer_state_file(universal))[PARAM_GROUPS]
    optimizer = _basic_optimizer(engine, stage)
    _check_optimizer(optimizer, param_groups)
    found = parameters_of(universal)
    parameters = dict(engine.module.named_parameters())
    _check_parameters(parameters, found, strict)
    if stage:
        _check_steps(found)
    saved = load(model_file(universal, 0, stage))
    _check_buffers(engine, saved["module"], strict)
    if load_lr_scheduler_states:
        _check_scheduler(engine, saved["lr_scheduler"])
    own, load_tables = own_tables_of(engine), None
    if own is None:
        check_no_tables(ProcessGroupGang(None, engine.device), universal)
    else:
        load_tables = own.checkpoints.open(universal)

    _load_buffers(engine, saved["module"])
    with universal_mode(engine):
        for name, param in parameters.items():
            if name in found and (stage == 0 or not param.requires_grad):
                _load_parameter(engine, param, found[name], stage)
        if stage == 0:
            _load_optimizer(engine, parameters, found, param_groups)
        path, client_state = load_universal_checkpoint(
            engine,
            str(directory),
            universal.name,
            load_optimizer_states=stage > 0,
            load_lr_scheduler_states=load_lr_scheduler_states,
        )
    if stage == 3:
        _mend_zero3(optimizer, param_groups)
    if (
        load_tables is not None and stage == 0
    ):  # At other stages, the engine's method has loaded them.
        load_tables(client_state)
    return path, client_state


def _check_files(universal: Path, stage: int) -> None:
    for file in (optimizer_state_file(universal), model_file(universal, 0, stage)):
        if not file.is_file():
            raise ValueError(
                f"`{universal}` must be a universal checkpoint that `to_universal()` has written, "
                f"but has no `{file.relative_to(universal)}`. Convert the engine's checkpoint."
            )


def _basic_optimizer(engine: Any, stage: int) -> torch.optim.Optimizer:
    """Returns the torch optimizer that the engine wraps, or the engine's own."""
    wrapped = engine.optimizer.optimizer if stage else engine.optimizer
    if isinstance(wrapped, torch.optim.Optimizer):
        return wrapped
    raise ValueError(
        f"`engine` must have an optimizer in fp32 at ZeRO 0, but has a `{type(wrapped).__name__}`. "
        "Set `zero_optimization.stage` to 1 in its DeepSpeed config."
    )


def _check_optimizer(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    for group in optimizer.param_groups:
        if not {"betas", "eps"} <= group.keys() or group.get("amsgrad", False):
            raise ValueError(
                "`engine` must have Adam or AdamW without amsgrad, whose states the checkpoint "
                f"holds, but has a `{type(optimizer).__name__}` with {sorted(group)}."
            )
    if len(optimizer.param_groups) != len(groups):
        raise ValueError(
            f"The optimizer must have {len(groups)} param groups, like the checkpoint, but "
            f"has {len(optimizer.param_groups)}. Build it with the same param groups."
        )


def _check_parameters(
    parameters: Mapping[str, Parameter], found: Mapping[str, Path], strict: bool
) -> None:
    """Checks that the checkpoint has the engine's Parameters, and no others."""
    unknown = [
        name for name in found.keys() - parameters.keys() if state_file(found[name], STEP).is_file()
    ]
    if unknown:
        raise ValueError(
            f"The model must have all Parameters of the checkpoint, but lacks {sorted(unknown)}. "
            "Build the model that was saved, with the same tied weights."
        )
    for name, param in parameters.items():
        if name not in found:
            if param.requires_grad or strict:
                raise ValueError(
                    f"The checkpoint must have all Parameters of the model, but lacks `{name}`. "
                    "Build the model that was saved"
                    + (", or pass `strict=False`." if not param.requires_grad else ".")
                )
            continue
        keys = (MASTER, *MOMENTS) if param.requires_grad else (MASTER,)
        expected = logical_shape(param)
        for key in keys:
            if not state_file(found[name], key).is_file():
                raise ValueError(
                    f"The checkpoint must have the optimizer's state of `{name}`, but lacks its "
                    f"`{key}`: it was frozen. Freeze it, or save it as trained."
                )
            shape = tuple(read_tensor(found[name], key).shape)
            if shape != expected:
                raise ValueError(
                    f"`{name}` must have the shape {expected}, but its `{key}` in the checkpoint "
                    f"has {shape}. Build the model that was saved, or change the size of its "
                    "vocabulary with `resize_vocab()`."
                )


def _check_steps(found: Mapping[str, Path]) -> None:
    """Checks that all Parameters have the same step, as ZeRO 1 to 3 need."""
    steps = {
        name: float(read_step(path))
        for name, path in found.items()
        if state_file(path, STEP).is_file()
    }
    if len(set(steps.values())) > 1:
        fewest = min(steps, key=lambda name: steps[name])
        raise ValueError(
            f"All Parameters must have made {max(steps.values()):.0f} steps for ZeRO 1 to 3, but "
            f"`{fewest}` has made {steps[fewest]:.0f}. Load the checkpoint at ZeRO 0."
        )


def _check_buffers(engine: Any, buffers: Mapping[str, Tensor], strict: bool) -> None:
    expected = persistent_buffers(engine)
    missing = sorted(expected.keys() - buffers.keys())
    if missing and strict:
        raise ValueError(
            f"The checkpoint must have all buffers of the model, but lacks {missing}. Build the "
            "model that was saved, or pass `strict=False`."
        )
    for name in expected.keys() & buffers.keys():
        if expected[name].shape != buffers[name].shape:
            raise ValueError(
                f"The buffer `{name}` must have the shape {tuple(expected[name].shape)}, but in "
                f"the checkpoint has {tuple(buffers[name].shape)}. Build the model that was saved."
            )


def _check_scheduler(engine: Any, state: Any) -> None:
    if engine.lr_scheduler is not None and state is None:
        raise ValueError(
            "The checkpoint must have the state of a learning-rate schedule, since the engine has "
            "one, but has none. Pass `load_lr_scheduler_states=False` to restart the schedule."
        )


@torch.no_grad()
def _load_buffers(engine: Any, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in persistent_buffers(engine).items():
        if name in buffers:
            buffer.copy_(buffers[name])


@torch.no_grad()
def _load_parameter(engine: Any, param: Parameter, directory: Path, stage: int) -> None:
    """Loads a Parameter that DeepSpeed does not load."""
    if stage == 3:
        fragment = engine.optimizer.load_hp_checkpoint_state(str(directory), MASTER, param=param)
        param.ds_tensor.copy_(fragment)  # type: ignore[attr-defined]
    else:
        param.copy_(_own_shard(engine, param, directory, MASTER))


def _own_shard(engine: Any, param: Parameter, directory: Path, key: str) -> Tensor:
    rank = bwc_tensor_model_parallel_rank(engine.mpu)
    size = bwc_tensor_model_parallel_world_size(engine.mpu)
    return own_shard(param, key, read_tensor(directory, key), rank, size)


def _load_optimizer(
    engine: Any,
    parameters: Mapping[str, Parameter],
    found: Mapping[str, Path],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Loads the optimizer at ZeRO 0."""
    optimizer = engine.optimizer
    names = {param: name for name, param in parameters.items()}
    own_groups = optimizer.state_dict()[PARAM_GROUPS]
    state = {}
    for group, own in zip(optimizer.param_groups, own_groups, strict=True):
        for param, index in zip(group["params"], own["params"], strict=True):
            path = found[names[param]]
            state[index] = {key: _own_shard(engine, param, path, key).clone() for key in MOMENTS}
            state[index][STEP] = read_step(path)
    new_groups = [
        {**own, **_hyperparameters(group)} for own, group in zip(own_groups, groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, PARAM_GROUPS: new_groups})


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a param group without its Parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _mend_zero3(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Gives each param group its own hyperparameters, and each state its own step. DeepSpeed gives
    all groups the hyperparameters of the first, and all states one shared step tensor, which then
    counts each step several times."""
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        own.update(_hyperparameters(group))
    for state in optimizer.state.values():
        if isinstance(state[STEP], Tensor):
            state[STEP] = state[STEP].clone()
