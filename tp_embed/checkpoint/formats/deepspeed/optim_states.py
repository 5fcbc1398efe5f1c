"""Writes the files ``*_optim_states.pt`` of an engine at ZeRO 1 to 3: fp32 weights and optimizer
states, as flat partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...contents import MASTER, WEIGHT, Key
from ...files.arrays import Array
from ...files.torch_file import TorchFile, lay_out, placeholder
from .shards import DS_VERSION, Places, Shards, ds_config

_ROOT = "optimizer_state_dict"


@dataclass
class FragmentAddress:
    """The position of a Parameter in a flat tensor of ZeRO 1 or 2."""

    numel: int
    start: int


class LossScaler:
    """A loss scale of 1. ZeRO 3 loads it from the checkpoint."""

    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dynamic = False


# Class names of DeepSpeed -> stand-ins. DeepSpeed is not imported.
_WRITTEN: dict[str, type] = {
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
}


def lay_out_optimizers(shards: Shards, places: Places) -> None:
    """Lays out the files of a tensor-parallel rank, one per data-parallel rank."""
    files = [_lay_out_one(shards, dp_rank) for dp_rank in range(shards.dp_size)]
    for index, flat in enumerate(shards.flats):
        for state, arrays in _flat_arrays(shards, files, index):
            for name in flat.fragments:
                key = shards.master_key(name) if state == MASTER else Key(name, state)
                places.add_fragments(key, flat, arrays)
    # These files have no entries for empty shards.
    for name in shards.empty:
        for state in (
            WEIGHT,
            MASTER,
            *(s for group in shards.trained.groups for s in group.states),
        ):
            places.add_empty(Key(name, state))


def _lay_out_one(shards: Shards, dp_rank: int) -> TorchFile:
    root = {
        _ROOT: _zero3(shards) if shards.stage == 3 else _zero12(shards, dp_rank),
        "ds_config": ds_config(shards.checkpoint, shards.target),
        "ds_version": DS_VERSION,
    }
    prefix = "bf16_" if shards.trained.dtype == torch.bfloat16 else ""
    name = f"{prefix}zero_pp_rank_{dp_rank}_mp_rank_{shards.tp_rank:02d}_optim_states.pt"
    return lay_out(shards.directory / name, root, _WRITTEN)


def _zero12(shards: Shards, dp_rank: int) -> dict[str, Any]:
    """Builds what ``DeepSpeedZeroOptimizer.state_dict()`` returns. If loss scale or clipping are
    missing, an engine keeps its configured ones."""
    flats, dtype = shards.flats, shards.trained.master_dtype
    extra = shards.checkpoint.extra
    # The source does not say enough about dynamic scales.
    is_scaled = shards.trained.dtype == torch.float16
    return {
        **({} if is_scaled else {"dynamic_loss_scale": False, "overflow": False}),
        **({"clip_grad": extra["clip_grad"]} if "clip_grad" in extra else {}),
        "single_partition_of_fp32_groups": [
            placeholder((flat.size - flat.paddings[dp_rank],), dtype) for flat in flats
        ],
        "zero_stage": shards.stage,
        "group_paddings": [flat.paddings[dp_rank] for flat in flats],
        "param_alignment_paddings": [[0] * len(flat.fragments) for flat in flats],
        "partition_count": [shards.dp_size] * len(flats),
        "ds_version": DS_VERSION,
        "param_slice_mappings": [
            {
                name: FragmentAddress(fragment.size, fragment.start)
                for name, fragments in flat.fragments.items()
                for fragment in fragments
                if fragment.dp_rank == dp_rank
            }
            for flat in shards.mapped
        ],
        "base_optimizer_state": _basic(shards),
    }


def _zero3(shards: Shards) -> dict[str, Any]:
    """Builds what ``DeepSpeedZeroOptimizer_Stage3.state_dict()`` returns."""
    dtype = shards.trained.master_dtype
    return {
        "zero_stage": 3,
        "loss_scaler": LossScaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": shards.dp_size,
        "fp32_flat_groups": [placeholder((flat.size,), dtype) for flat in shards.flats],
        _ROOT: _basic(shards),
    }


def _basic(shards: Shards) -> dict[str, Any]:
    """Builds the state dict of torch's optimizer, whose Parameters are the flat tensors."""
    groups = shards.trained.groups
    if shards.checkpoint.optimizer is None:
        return {"state": {}, "param_groups": []}  # An engine refuses to load it: it has groups.
    state: dict[int, dict[str, Any]] = {}
    for index, flat in enumerate(shards.flats):
        group = groups[flat.group]
        # A number suits all optimizers: torch's convert it to a tensor, DeepSpeed's need a number.
        own: dict[str, Any] = {} if group.step is None else {"step": group.step}
        own |= {key: placeholder((flat.size,), dtype) for key, dtype in group.states.items()}
        if own:
            state[index] = own
    indices = [
        [index for index, flat in enumerate(shards.flats) if flat.group == number]
        for number in range(len(groups))
    ]
    return {
        "state": state,
        "param_groups": [
            {**group.hyperparameters, "params": own}
            for group, own in zip(groups, indices, strict=True)
        ],
    }


def _flat_arrays(
    shards: Shards, files: list[TorchFile], index: int
) -> Iterator[tuple[str, list[Array]]]:
    """Yields each state with its flat tensor ``index`` of all data-parallel ranks."""
    is_zero3 = shards.stage == 3
    fp32 = "fp32_flat_groups" if is_zero3 else "single_partition_of_fp32_groups"
    basic = _ROOT if is_zero3 else "base_optimizer_state"
    yield MASTER, [file.array(file.root[_ROOT][fp32][index]) for file in files]
    for key in shards.trained.groups[shards.flats[index].group].states:
        states = [file.root[_ROOT][basic]["state"][index] for file in files]
        yield key, [file.array(own[key]) for file, own in zip(files, states, strict=True)]
