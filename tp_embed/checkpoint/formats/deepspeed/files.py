"""Finds and opens the files of one tag. Checks all content except tensors."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...contents import ReadOptions
from ...errors import CheckpointError, UnsafeCheckpointError, shown
from ...files.arrays import Array, Index
from ...files.torch_file import TorchFile

T = TypeVar("T")

_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,9})_)?mp_rank_(\d{1,9})_model_states\.pt")
_OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_optim_states\.pt"
)

# Files of pipeline stages and experts.
_OTHER = re.compile(r"layer_\d+.*\.pt|.*_expert_\d+_.*\.pt|expp_rank_.*\.pt")

# Keys of a model file that `Checkpoint` holds elsewhere, or that describe files and ranks.
STRUCTURE = frozenset(
    (
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "sparse_tensor_module_names",
        "csr_tensor_module_names",
        "universal_checkpoint_info",
        "global_steps",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_version",
    )
)
# Keys that are kept from ZeRO's optimizers and other wrappers around torch's optimizer. The loss
# scale is not: it is an object, and an engine has its own.
SCALARS = ("clip_grad",)


class _Record:
    """Holds the attributes of an instance, without its code."""


# The classes in DeepSpeed's own files. They are read as `_Record`, not imported. Apart from them,
# only what `torch.load(weights_only=True)` knows is allowed: tensors and plain values.
STAND_INS: Mapping[str, type] = {
    "deepspeed.utils.tensor_fragment.fragment_address": _Record,  # `numel` and `start`
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Record,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Record,
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape": _Record,
}


@dataclass(frozen=True)
class ModelFile:
    """A file ``*_model_states.pt``.

    :param module: tensors by name; at ZeRO 3, Parameters are empty.
    :param shapes: the shapes of the rank's shards by name, for each group of Parameters that the
        optimizer flattens; ``None`` at ZeRO 0.
    :param frozen_shapes: the shapes of Parameters outside the optimizer, from ZeRO 2 on.
    """

    file: TorchFile
    state: Mapping[str, Any]
    module: Mapping[str, Tensor]
    buffers: frozenset[str]
    shapes: list[dict[str, Index]] | None
    frozen_shapes: dict[str, Index]

    @property
    def is_zero3(self) -> bool:
        """Whether weights are in the optimizer's files."""
        return self.file.path.name.startswith("zero_pp_rank")

    @cached_property
    def trained(self) -> dict[str, Index]:
        return {name: shape for group in self.shapes or () for name, shape in group.items()}

    @cached_property
    def same(self) -> list[list[str]]:
        """The names in ``module``, grouped by tensor."""
        places: dict[Hashable, list[str]] = {}
        for name, tensor in self.module.items():
            array_of(self.file, tensor, f"`{name}`")
            places.setdefault(self.file.place(tensor), []).append(name)
        return list(places.values())

    @property
    def shared(self) -> dict[str, str]:
        """Maps other names of Parameters to stored names, as DeepSpeed records them."""
        what, path = "A name in `shared_params`", self.file.path
        shared = optional(self.state.get("shared_params"), dict, "`shared_params`", path)
        return {
            expect(alias, str, what, path): expect(name, str, what, path)
            for alias, name in shared.items()
        }

    def shape(self, name: str) -> Index:
        """Returns the shape of the rank's shard of a Parameter.

        :raises CheckpointError: the file lacks the Parameter.
        """
        for shapes in (self.trained, self.frozen_shapes):
            if name in shapes:
                return shapes[name]
        if name not in self.module:
            raise CheckpointError(
                f"`{self.file.path}` must have `{name}`, as other ranks do, but does not. Its "
                "files are from different models: copy the whole directory again."
            )
        return tuple(self.module[name].shape)


@dataclass(frozen=True)
class Saved:
    """The files of a tag.

    :param models: the model files of each tensor-parallel rank: one, or at ZeRO 3 one per
        data-parallel rank.
    :param optimizers: the optimizer files of each tensor-parallel rank, one per data-parallel rank;
        may be empty.
    """

    directory: Path
    models: list[list[ModelFile]]
    optimizers: list[list[TorchFile]]

    @property
    def tp_size(self) -> int:
        return len(self.models)

    @property
    def paths(self) -> tuple[Path, ...]:
        models = [model.file.path for row in self.models for model in row]
        return (*models, *(file.path for row in self.optimizers for file in row))


def is_tag(directory: Path) -> bool:
    """Returns whether ``directory`` has files of a tag."""
    endings = ("_model_states.pt", "_optim_states.pt")
    return any(path.name.endswith(endings) for path in directory.iterdir())


def find_tag(path: Path, tag: str | None) -> Path:
    """Returns the directory of a tag in the checkpoint at ``path``, or ``path`` if it is one.

    :raises CheckpointError: the tag does not exist, or none is selected.
    :raises UnsafeCheckpointError: the file ``latest`` points outside ``path``.
    """
    if not path.is_dir():
        raise CheckpointError(f"`{path}` must be a directory of DeepSpeed, but is a file.")
    latest = path / "latest"
    if tag is None and is_tag(path):
        return path
    if tag is None and latest.is_file():
        tag = read_latest(latest)
    found = sorted(d.name for d in path.iterdir() if d.is_dir() and is_tag(d))
    if not tag or not (path / tag).is_dir():
        named = f"there is no `{tag}`" if tag else "neither `--tag` nor a file `latest` says which"
        raise CheckpointError(
            f"`{path}` must have the checkpoint to read, but {named}. Its tags are {found}: choose "
            "one with `--tag`."
        )
    return path / tag


def read_latest(file: Path) -> str:
    """Returns the tag that a file ``latest`` names.

    :raises UnsafeCheckpointError: it is no name of a directory next to the file.
    """
    with file.open("rb") as opened:
        tag = opened.read(4096).decode(errors="replace").strip()
    if not tag or tag != Path(tag).name or tag == ".." or "\0" in tag:
        raise UnsafeCheckpointError(
            f"`{file}` must be the name of a directory in `{file.parent}`, but is {shown(tag)!r}."
        )
    return tag


def open_tag(directory: Path, options: ReadOptions, names: Sequence[str] | None = None) -> Saved:
    """Opens all files of a tag.

    :param names: the names of the files. Default: all in ``directory``.
    :raises CheckpointError: files are missing, damaged, from a pipeline or experts, or from
        different steps.
    """
    if names is None:
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
    refuse_others(directory, names)
    model_paths = _grid(directory, names, _MODEL, "_model_states.pt")
    if not model_paths:
        raise CheckpointError(
            f"`{directory}` must have a file `mp_rank_*_model_states.pt` for each tensor-parallel "
            "rank, but has none. Pass the directory of a tag, or its parent."
        )
    optimizer_paths = _grid(directory, names, _OPTIMIZER, "_optim_states.pt")
    if optimizer_paths and len(optimizer_paths) != len(model_paths):
        raise CheckpointError(
            f"`{directory}` must have optimizer files for {len(model_paths)} "
            f"tensor-parallel ranks, but has them for {len(optimizer_paths)}. Copy all of them."
        )
    models = [[_model_file(_open(path, options)) for path in row] for row in model_paths]
    optimizers = [[_open(path, options) for path in row] for row in optimizer_paths]
    saved = Saved(directory, models, optimizers)
    _check_alike(saved)
    return saved


def refuse_others(directory: Path, names: Sequence[str]) -> None:
    """Refuses files of pipeline stages and experts.

    :raises CheckpointError: ``names`` contains one.
    """
    others = [name for name in names if _OTHER.fullmatch(name)]
    if others:
        raise CheckpointError(
            f"`{directory}` must hold a model without pipeline stages and experts, but has "
            f"`{others[0]}`. Convert it with DeepSpeed's `ds_to_universal`."
        )


def scalars(file: TorchFile, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the :data:`SCALARS` in the state of a wrapper, and notes."""
    kept, notes = file.plain_entries({key: state[key] for key in SCALARS if key in state})
    if state.get("dynamic_loss_scale") is True or getattr(
        state.get("loss_scaler"), "dynamic", False
    ):
        notes.append("The dynamic loss scale was left out: it starts afresh.")
    return kept, notes


def expect(value: Any, kind: type[T], what: str, path: Path) -> T:
    """Returns ``value``, checked to be a ``kind``.

    :raises CheckpointError: it has another type.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"{what} in `{path}` must be of type {kind.__name__}, but is of type "
            f"{type(value).__name__}. The file is damaged, or not from DeepSpeed."
        )
    return value


def optional(value: Any, kind: type[T], what: str, path: Path) -> T:
    """Does :func:`expect`, but returns an empty ``kind`` for ``None``."""
    return kind() if value is None else expect(value, kind, what, path)


def array_of(file: TorchFile, tensor: Any, what: str) -> Array:
    """Returns the array behind ``tensor`` in ``file``.

    :raises CheckpointError: ``tensor`` is no dense tensor.
    """
    if expect(tensor, Tensor, what, file.path).layout != torch.strided:
        raise CheckpointError(f"{what} in `{file.path}` must be dense, but is {tensor.layout}.")
    return file.array(tensor)


def _open(path: Path, options: ReadOptions) -> TorchFile:
    file = TorchFile(path, stand_ins=STAND_INS, allow_unsafe=options.allow_unsafe_pickle)
    expect(file.root, dict, "The content", path)
    return file


def _grid(
    directory: Path, names: Sequence[str], pattern: re.Pattern[str], suffix: str
) -> list[list[Path]]:
    """Returns the files by tensor-parallel and data-parallel rank."""
    grid: dict[tuple[int, int], Path] = {}
    for name in names:
        if not name.endswith(suffix):
            continue
        match = pattern.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"`{directory}` must have files of tensor- and data-parallel ranks, but "
                f"`{name}` belongs to neither."
            )
        rank = int(match[2]), int(match[1] or 0)
        if rank in grid:
            raise CheckpointError(
                f"`{directory}` must have one file `*{suffix}` for a rank, but has "
                f"`{grid[rank].name}` and `{name}`. Remove what an older run has left."
            )
        grid[rank] = directory / name
    if not grid:
        return []
    tp_size, dp_size = (max(ranks) + 1 for ranks in zip(*grid, strict=True))
    if len(grid) != tp_size * dp_size:
        ranks = ((tp, dp) for tp in range(tp_size) for dp in range(dp_size))
        missing = next(rank for rank in ranks if rank not in grid)
        raise CheckpointError(
            f"`{directory}` must have a file `*{suffix}` for each of {tp_size} tensor-parallel x "
            f"{dp_size} data-parallel ranks, but lacks the file of tensor-parallel rank "
            f"{missing[0]} and data-parallel rank {missing[1]}. Copy all of them."
        )
    return [[grid[tp, dp] for dp in range(dp_size)] for tp in range(tp_size)]


def _model_file(file: TorchFile) -> ModelFile:
    state, path = file.root, file.path
    module = expect(state.get("module"), dict, "The model, `module`,", path)
    names = optional(state.get("buffer_names"), list, "`buffer_names`", path)
    groups = state.get("param_shapes")
    shapes = None
    if groups is not None:
        shapes = [_shapes(group, path) for group in expect(groups, list, "`param_shapes`", path)]
        count = sum(len(group) for group in shapes)
        if len({name for group in shapes for name in group}) != count:
            raise CheckpointError(f"`param_shapes` in `{path}` must not have a name twice.")
    frozen = state.get("frozen_param_shapes")
    return ModelFile(
        file=file,
        state=state,
        module={
            expect(name, str, "The name of a Parameter", path): value
            for name, value in module.items()
            if isinstance(value, Tensor)
        },
        buffers=frozenset(expect(name, str, "A name of a buffer", path) for name in names),
        shapes=shapes,
        frozen_shapes={} if frozen is None else _shapes(frozen, path),
    )


def _shapes(value: Any, path: Path) -> dict[str, Index]:
    shapes = {}
    for name, shape in expect(value, dict, "The shapes of Parameters", path).items():
        sizes = tuple(expect(shape, tuple, f"The shape of `{name}`", path))
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise CheckpointError(f"The shape of `{name}` in `{path}` must be sizes: {sizes}.")
        shapes[expect(name, str, "The name of a Parameter", path)] = sizes
    return shapes


def _step(model: ModelFile) -> int | None:
    path, step = model.file.path, model.state.get("global_steps")
    if step is not None and expect(step, int, "`global_steps`", path) < 0:
        raise CheckpointError(f"`global_steps` in `{path}` must be at least 0, but is {step}.")
    return step


def _check_alike(saved: Saved) -> None:
    """Checks that the files are from one step and stage, and cover all ranks."""
    first = saved.models[0][0]
    for model in (model for row in saved.models for model in row):
        steps = [_step(each) for each in (first, model)]
        if steps[0] != steps[1]:
            raise CheckpointError(
                f"The files of `{saved.directory}` must be from one step, but `global_steps` is "
                f"{steps[0]} in `{first.file.path.name}` and {steps[1]} in "
                f"`{model.file.path.name}`. Copy all files of one checkpoint."
            )
        if (model.shapes is None) != (first.shapes is None):
            raise CheckpointError(
                f"The files of `{saved.directory}` must be from one ZeRO stage, but "
                f"`{first.file.path.name}` and `{model.file.path.name}` are not."
            )
    size = first.state.get("mp_world_size")
    if isinstance(size, int) and size > saved.tp_size:
        raise CheckpointError(
            f"`{saved.directory}` must have model files of {size} tensor-parallel ranks, as its "
            f"`mp_world_size` says, but has files of {saved.tp_size}. Copy all of them."
        )
