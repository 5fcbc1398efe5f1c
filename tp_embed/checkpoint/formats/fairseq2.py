"""Reads and writes fairseq2 checkpoints: one file per pipeline, tensor and (sharded) data parallel
rank, as ``StandardCheckpointManager`` of ``fairseq2/checkpoint/manager.py`` writes them::

    step_100/model/pp_00/tp_00/sdp_00.pt  # {"decoder_frontend.embed.weight": tensor, ...}

They are joined as in ``fairseq2/model_checkpoint/native.py`` and ``common.py``. Data parallel
shards come from FSDP: they are cut along dimension 0, and may be empty or missing at the end.
Pipeline stages have different names. Only the modules know how tensor parallel shards are cut
(``Sharded.get_shard_dims()``): along dimension 0 in ``VocabShardedEmbedding`` and
``ColumnShardedLinear``, 1 in ``ShardedEmbedding`` and the weights of ``RowShardedLinear``, always
into shards of one size.

We write one data parallel shard. To load it as a model, set the ``checkpoint`` of its asset card to
the directory with ``pp_00``. Optimizer state, which is indexed by number in other files
(``optimizer/``), is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..contents import WEIGHT, Checkpoint, Output, ReadOptions, Target
from ..cuts import join
from ..errors import CheckpointError
from ..files.arrays import Array, Joined, Tile
from ..files.torch_file import TorchFile
from ..files.torch_file import lay_out as lay_out_file
from .pt import state_dict_arrays
from .rank_files import check_even, join_ranks, shard_placeholders, transpose, written_shards

NAME = "fairseq2"
IS_FILE = False
HAS_RANKS = True
HAS_OPTIMIZER = False
HAS_EXTRA = False
MAIN = WEIGHT

_STEP = re.compile(r"step_(\d{1,18})", re.ASCII)
_PLACE = re.compile(r"pp_(\d{1,9})/tp_(\d{1,9})/sdp_(\d{1,9})\.pt", re.ASCII)


def recognises(path: Path) -> bool:
    """Returns whether ``path`` has a directory ``pp_00/tp_00``."""
    if not path.is_dir():
        return False
    return any(any(path.glob(f"{inner}pp_00/tp_00")) for inner in ("", "model/", "step_*/model/"))


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Joins the shards of all tensor-parallel ranks and pipeline stages."""
    directory, step = _model_directory(path, options.tag)
    grid = _find_files(directory)
    shards: dict[str, list[Array]] = {}
    ties: dict[str, str] = {}
    for stage in grid:
        ranks = []
        for files in stage:
            arrays, aliases = _join_data_parallel(files, options.allow_unsafe_pickle)
            ranks.append(arrays)
            ties |= aliases
        merged = transpose(ranks, [files[0] for files in stage])
        twice = sorted(shards.keys() & merged.keys())
        if twice:
            raise CheckpointError(
                f"`{twice[0]}` must be in one pipeline stage, but is in several of `{directory}`."
            )
        shards |= merged
    tensors, cuts = join_ranks(shards, options, {})
    left_out = [
        each.name
        for each in (directory.parent.iterdir() if directory.name == "model" else ())
        if each.name in ("optimizer", "trainer", "data_reader")
    ]
    return Checkpoint(
        format=NAME,
        path=path,
        tensors=tensors,
        tp_size=len(grid[0]),
        cuts=cuts,
        ties=ties,
        step=step,
        notes=(f"{sorted(left_out)} were left out.",) if left_out else (),
        files=tuple(file for stage in grid for files in stage for file in files),
    )


def _model_directory(path: Path, tag: str | None) -> tuple[Path, int | None]:
    """Returns the directory with ``pp_00``, and its step."""
    if not path.is_dir():
        raise CheckpointError(f"`{path}` must be a directory of fairseq2, but is a file.")
    steps = {}
    for each in path.iterdir():
        if (match := _STEP.fullmatch(each.name)) and each.is_dir():
            steps[int(match[1])] = each
    if steps and not (path / "pp_00").is_dir():
        wanted = _STEP.fullmatch(f"step_{tag.removeprefix('step_')}") if tag else None
        step = int(wanted[1]) if wanted else max(steps)
        if step not in steps or (tag and not wanted):
            raise CheckpointError(
                f"`{path}` must hold the step `{tag}`, but holds {sorted(steps)[:16]}. Say which "
                "with `--tag step_N`."
            )
        path = steps[step]
    if not (path / "pp_00").is_dir():
        path = path / "model"
    parent = path.parent.name if path.name == "model" else path.name
    match = _STEP.fullmatch(parent)
    return path, int(match[1]) if match else None


def _find_files(directory: Path) -> list[list[list[Path]]]:
    """Returns the files by pipeline, tensor and data parallel rank.

    :raises CheckpointError: files are missing.
    """
    places = {}
    for file in directory.glob("pp_*/tp_*/sdp_*.pt"):
        if match := _PLACE.fullmatch(file.relative_to(directory).as_posix()):
            places[int(match[1]), int(match[2]), int(match[3])] = file
    sizes = [1 + max((place[axis] for place in places), default=-1) for axis in range(3)]
    if not places or len(places) != sizes[0] * sizes[1] * sizes[2]:
        raise CheckpointError(
            f"`{directory}` must hold `pp_*/tp_*/sdp_*.pt` for each of the ranks {sizes}, but "
            f"holds {len(places)} of them. Copy the whole directory."
        )
    return [
        [[places[pp, tp, sdp] for sdp in range(sizes[2])] for tp in range(sizes[1])]
        for pp in range(sizes[0])
    ]


def _join_data_parallel(
    paths: list[Path], allow_unsafe: bool
) -> tuple[dict[str, Array], dict[str, str]]:
    """Joins the data parallel shards of one tensor parallel rank. Returns arrays and ties."""
    held = []
    ties: dict[str, str] = {}
    for path in paths:
        file = TorchFile(path, allow_unsafe=allow_unsafe)
        root = file.root
        if not isinstance(root, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in root.items()
        ):
            raise CheckpointError(
                f"`{path}` must hold a dict of tensors, as fairseq2 0.5 or newer writes it, but "
                "holds something else."
            )
        tensors, aliases = state_dict_arrays(file, root)
        if path == paths[0]:
            ties = aliases
        # Empty shards look untied, even if they are tied in the first file.
        held.append({key.name: array for key, array in tensors.items() if key.name not in ties})
    for path, arrays in zip(paths, held, strict=True):
        if odd := sorted(arrays.keys() - held[0].keys()):
            raise CheckpointError(
                f"`{path}` must hold no other names than `{paths[0]}`, but holds `{odd[0]}`. All "
                "files must be of one checkpoint."
            )
    return {name: _stacked(name, held, paths) for name in held[0]}, ties


def _stacked(name: str, held: list[dict[str, Array]], paths: list[Path]) -> Array:
    """Concatenates the shards of FSDP."""
    shards = [arrays[name] for arrays in held if name in arrays]
    if any(name in arrays for arrays in held[len(shards) :]):
        raise CheckpointError(
            f"`{name}` may be missing only in the last data parallel shards, but is missing before "
            f"a shard that has it, among the {len(paths)} next to `{paths[0]}`."
        )
    first = shards[0]
    if len(shards) == 1:
        return first
    if len({(shard.dtype, shard.shape[1:], len(shard.shape)) for shard in shards}) != 1 or (
        not first.shape
    ):
        raise CheckpointError(
            f"`{name}` must be cut along dimension 0 over the data parallel shards, but next to "
            f"`{paths[0]}` they are {shards[:16]}."
        )
    tiles, rows = [], 0
    for shard in shards:
        tiles.append(Tile.whole((rows, *(0,) * (len(shard.shape) - 1)), shard))
        rows += shard.shape[0]
    return Joined((rows, *first.shape[1:]), first.dtype, tiles)


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out one file for each tensor-parallel rank.

    :raises CheckpointError: a tensor does not divide evenly among the ranks.
    """
    for name in checkpoint.names:
        if (cut := target.cuts[name]) is not None:
            check_even(name, cut, "fairseq2")
    step = checkpoint.step
    directory = path if step is None else path / f"step_{step}" / "model"
    files = []
    for rank, model in enumerate(shard_placeholders(checkpoint, target, {})):
        file = directory / "pp_00" / f"tp_{rank:02d}" / "sdp_00.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        files.append(lay_out_file(file, model))
    shards = written_shards(files, [file.root for file in files], checkpoint)
    return Output(
        {key: join(key.name, target.cuts[key.name], shards[key.name]) for key in checkpoint.tensors}
    )
