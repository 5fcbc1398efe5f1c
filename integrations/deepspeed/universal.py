"""Converts DeepSpeed checkpoints of every ZeRO stage to one universal format.

For ZeRO 1 to 3, DeepSpeed's own converter merges the fragments. It gets a copy of the source in
which the model's files hold no tensors, but the shapes of empty shards, without which it fails, and
what it leaves out is completed after it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CLIP_GRAD,
    FROZEN_PARAM_FRAGMENTS,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    UNIVERSAL_CHECKPOINT_INFO,
)
from torch import Tensor

from .saved import SavedCheckpoint, optimizer_shapes
from .staging import staged, write_text
from .universal_format import (
    MOMENTS,
    STEP,
    check_adam,
    load,
    write_model_files,
    write_optimizer_state,
    write_step,
    write_tensor,
)
from .universal_zero0 import convert_zero0


def to_universal(
    source: str | Path,
    output: str | Path,
    *,
    workers: int = 1,
    optimizer_names: Sequence[str] | None = None,
) -> None:
    """Converts a checkpoint that ``engine.save_checkpoint()`` has written to a universal one,
    which an engine of any ZeRO stage and any tensor- and data-parallel size loads with
    :func:`load_universal`: Parameters, both moments of Adam and its step, exact.

    It runs in one process, on the CPU, and unpickles the files of the source, so take checkpoints
    that you trust. As DeepSpeed's converter does, it names the new checkpoint in the file
    ``latest_universal`` beside it.

    :param source: the directory of one tag. Not of a pipeline or of experts.
    :param output: the directory to write.
    :param workers: the number of processes that extract fragments, and that merge them; each holds
        the fragments of one rank, or one Parameter.
    :param optimizer_names: for ZeRO 0: the names of the Parameters of the optimizer, in its order,
        which the checkpoint does not hold. Needed unless DeepSpeed has made the optimizer by its
        config; then it is the order of the model, if it was given no other `model_parameters`.
    :raises FileNotFoundError: ``source`` is not such a directory, or lacks the file of a rank.
    :raises FileExistsError: ``output`` is there already.
    :raises ValueError: the checkpoint holds something that cannot be converted exactly.
    """
    checkpoint = SavedCheckpoint.read(Path(source).absolute())
    output = Path(output).absolute()
    with staged(output) as universal:
        if checkpoint.optimizer_files:
            _convert_zero(checkpoint, universal, workers)
        else:
            convert_zero0(checkpoint.states, checkpoint.layout, universal, optimizer_names)
        write_model_files(universal, checkpoint.states)
    write_text(output.parent / "latest_universal", output.name)


def _convert_zero(checkpoint: SavedCheckpoint, universal: Path, workers: int) -> None:
    """Converts a checkpoint of ZeRO 1 to 3."""
    optimizer = load(checkpoint.optimizer_files[0])[OPTIMIZER_STATE_DICT]
    base = optimizer.get(BASE_OPTIMIZER_STATE) or optimizer[OPTIMIZER_STATE_DICT]
    if not isinstance(base, dict) or not base["state"]:
        raise ValueError(
            "The checkpoint must hold the state of an optimizer that has made a step, and not be "
            "an elastic one, but does not. Save it after a step, with `elastic_checkpoint` off."
        )
    for state in base["state"].values():
        check_adam(state)

    source = universal.parent / "source"
    _write_source(checkpoint, source)
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(universal),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=False,
            inject_missing_state=False,
        )
    )
    for file in universal.glob("*_model_states.pt"):
        file.unlink()

    step = base["state"][0][STEP]
    _complete(checkpoint, universal, step)
    scalars = {
        key: optimizer[key]
        for key in (LOSS_SCALER, "dynamic_loss_scale", "overflow", CLIP_GRAD)
        if key in optimizer
    }
    write_optimizer_state(universal, base[PARAM_GROUPS], step, scalars)


def _write_source(checkpoint: SavedCheckpoint, source: Path) -> None:
    """What DeepSpeed's converter is given."""
    source.mkdir()
    for file in checkpoint.optimizer_files:
        (source / file.name).symlink_to(file)
    info, layout = checkpoint.info, checkpoint.layout
    for tp_rank, files in enumerate(checkpoint.model_files):
        state = checkpoint.states[tp_rank]
        held = optimizer_shapes(state)
        empty = {
            name: torch.Size(layout.shard_shape(name, tp_rank))
            for name in checkpoint.trained
            if name not in held
        }
        first, *others = state[PARAM_SHAPES]
        light = {
            **state,
            "module": {},
            FROZEN_PARAM_FRAGMENTS: None,
            PARAM_SHAPES: [{**first, **empty}, *others],
            UNIVERSAL_CHECKPOINT_INFO: info,
        }
        for file in files:
            torch.save(light, source / file.name)


def _complete(checkpoint: SavedCheckpoint, universal: Path, step: Any) -> None:
    """Adds what DeepSpeed's converter has left out, and checks what it has written."""
    layout = checkpoint.layout
    shapes = optimizer_shapes(checkpoint.states[0])
    for name in checkpoint.trained:
        directory = universal / "zero" / name
        cut = layout.map_of(name)
        shape = tuple(cut.logical_shape) if cut else shapes[name]
        for key in ("fp32", *MOMENTS):
            file = directory / f"{key}.pt"
            if not file.is_file():
                raise ValueError(
                    f"`{name}` must have a state `{key}` in the checkpoint, but DeepSpeed's "
                    "converter has found none. Save the checkpoint after a step."
                )
            entry = load(file)
            if isinstance(entry, Tensor):  # Of ZeRO 3 without tensor parallelism.
                write_tensor(directory, key, entry.view(shape))
            elif cut and tuple(entry[PARAM].shape) != shape:
                raise ValueError(
                    f"`{name}` must have the shape {shape}, but DeepSpeed's converter has merged "
                    f"its `{key}` to {tuple(entry[PARAM].shape)}."
                )
        if not (directory / f"{STEP}.pt").is_file():
            write_step(directory, step)
    for name, shards in checkpoint.frozen().items():
        write_tensor(universal / "zero" / name, "fp32", layout.merge(name, "fp32", shards).float())
