"""Writes checkpoints as DeepSpeed's ``engine.save_checkpoint()`` does, for ZeRO 0 to 3.

Without an optimizer in the source, load the result with
``load_checkpoint(load_optimizer_states=False)``: ZeRO 1 and 2 then need no optimizer files. Flat
partitions follow the order of the param groups, else of the checkpoint. They are laid out for the
source's ``ds_config``, so the loading engine must have the same ``round_robin_gradients`` and
``sub_group_size``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...contents import MASTER, Arrays, Checkpoint, Output, Target
from ...cuts import join
from ...errors import CheckpointError
from ..apart import lay_out_apart
from .cut_info import write_info
from .model_states import check_plain, lay_out_model
from .optim_states import lay_out_optimizers
from .shards import Places, Shards, step_of
from .trained import Trained, find_trained


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out the files, see :class:`~tp_embed.checkpoint.formats.Format`. ZeRO 3 stores no weight
    that has an fp32 copy: an engine casts the copy."""
    return lay_out_apart(checkpoint, target, lambda rest: _lay_out(rest, target, path))


def _lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> tuple[Path, Arrays]:
    trained = find_trained(checkpoint, is_flat=target.zero_stage > 0)
    _check(target, trained)
    info = write_info(
        {name: checkpoint.shape(name) for name in checkpoint.names},
        target.cuts,
        target.tp_size,
        {name for group in trained.groups for name in group.names},
    )
    directory = path / f"global_step{step_of(checkpoint)}"
    directory.mkdir(exist_ok=True)
    has_optimizer = checkpoint.optimizer is not None or any(
        key.state == MASTER for key in checkpoint.tensors
    )
    found = []
    for tp_rank in range(target.tp_size):
        shards = Shards(checkpoint, target, trained, directory, info, tp_rank)
        places = Places(shards)
        lay_out_model(shards, places)
        if target.zero_stage == 3 or (target.zero_stage and has_optimizer):
            lay_out_optimizers(shards, places)
        found.append(places.arrays())
    (path / "latest").write_text(directory.name)
    return directory, {
        key: join(str(key), target.cuts[key.name], [arrays[key] for arrays in found])
        for key in checkpoint.tensors
        if all(key in arrays for arrays in found)
    }


def _check(target: Target, trained: Trained) -> None:
    stage = target.zero_stage
    if stage not in range(4) or target.dp_size < 1:
        raise CheckpointError(
            "`--zero-stage` must be 0, 1, 2 or 3, and the data-parallel size greater than or equal "
            f"to 1, but they are {stage} and {target.dp_size}."
        )
    if stage == 0 and trained.dtype != torch.float32:
        raise CheckpointError(
            f"At ZeRO 0 the weights must be in float32, but are in {trained.dtype}: DeepSpeed's "
            "16-bit optimizers save in another form. Write for ZeRO 1, or pass `--dtype float32`."
        )
    if stage == 3 and trained.dtype == torch.float16:
        raise CheckpointError(
            "At ZeRO 3 the weights must not be in float16, since an engine would take the scale of "
            "its loss from the checkpoint. Write for ZeRO 1 or 2, or choose another `--dtype`."
        )
    for group in trained.groups:
        check_plain(group.hyperparameters, "The hyperparameters of the optimizer")
