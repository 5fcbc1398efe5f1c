"""Reads and writes checkpoints of Megatron-LM in its format ``torch``: one file per tensor-parallel
rank and pipeline stage, as ``save_checkpoint()`` of ``megatron/training/checkpointing.py`` writes::

    latest_checkpointed_iteration.txt           # an iteration, or `release`
    iter_0000100/mp_rank_00/model_optim_rng.pt  # with pipeline stages: mp_rank_00_000
        {"args", "checkpoint_version", "iteration", "model", ...}

Tables are padded to a multiple of ``make_vocab_size_divisible_by`` (128) x TP rows
(``vocab_size_with_padding()``) and cut into equal shards, for ``VocabParallelEmbedding`` and
``output_layer``. Megatron does not record the number of real rows: its own converter also needs
``--true-vocab-size``. Our files record it, and all other cuts, under the key ``tp_embed``, which
Megatron ignores.

Megatron does not record cuts either. In Megatron Core they are ``*.linear_qkv.*=0``,
``*.linear_proj.weight=1``, ``*.linear_fc1.*=0`` (``0/2`` if the MLP is gated, as in SwiGLU),
``*.linear_fc2.weight=1`` and ``*=replicated``.

``args`` are written only if they come from Megatron: ``check_checkpoint_args()`` needs all
arguments of the model, or no ``args`` at all. Optimizer state is indexed by number in an
unrecorded order, and is left out: load with ``--no-load-optim --no-load-rng``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...contents import WEIGHT, Checkpoint, Key, Output, ReadOptions, Target
from ...cuts import Cut, find_rule, is_table, join
from ...errors import CheckpointError, shown
from ...files.arrays import Array, Joined, Tile
from ...files.derived import Copies
from ...files.torch_file import lay_out as lay_out_file
from ..rank_files import check_even, join_ranks, shard_placeholders, written_shards
from .files import (
    FILE,
    OURS,
    TRACKER,
    RankFile,
    directory_of,
    is_root,
    merge_stages,
    open_ranks,
)

NAME = "megatron"
IS_FILE = False
HAS_RANKS = True
HAS_OPTIMIZER = False
HAS_EXTRA = True
MAIN = WEIGHT

# The key of the source's `args` in `Checkpoint.extra`.
ARGS = "megatron_args"
_DIVISOR = "make_vocab_size_divisible_by"


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is a checkpoint directory of Megatron-LM."""
    return path.is_dir() and is_root(path)


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Joins the files of all tensor-parallel ranks and pipeline stages."""
    grid = open_ranks(directory_of(path, options.tag), options.allow_unsafe_pickle)
    first = grid[0][0]
    shards, ties, notes = merge_stages(grid)
    _check_version(first, shards)
    tied = _drop_copies(shards, grid)
    sizes, known = _recorded(first, shards)
    tables, padded = {}, []
    for name, arrays in shards.items():
        if name in sizes or _is_vocab(name, arrays[0], options):
            rows = sizes.get(name, options.vocab_size)
            tables[name] = _without_padding(name, arrays, rows)
            if rows is None:
                padded.append(f"`{name}` ({tables[name].shape[0]} rows)")
    rest = {name: arrays for name, arrays in shards.items() if name not in tables}
    others, cuts = join_ranks(rest, options, known)
    for name, table in tables.items():
        cuts[name] = Cut.even(0, table.shape[:1], len(grid[0]))
    if padded:
        notes += (
            f"{', '.join(padded)} may end with rows of padding, since the checkpoint does not say "
            "the size of the vocabulary. Say it with `--vocab-size`.",
        )
    left_out = sorted(first.keys & {"optimizer", "opt_param_scheduler", "rng_state"})
    if left_out:
        notes += (f"{left_out} were left out: they are indexed by number, or differ by rank.",)
    args = {name: value for name, value in first.args.items() if _is_plain(value)}
    return Checkpoint(
        format=NAME,
        path=path,
        tensors={Key(n): tables[n] if n in tables else others[Key(n)] for n in shards},
        tp_size=len(grid[0]),
        cuts=cuts,
        ties=ties,
        step=None if first.path.parent.parent.name == "release" else first.iteration,
        extra={ARGS: args} if args else {},
        notes=notes + tied,
        files=tuple(file.path for row in grid for file in row),
    )


def _check_version(file: RankFile, names: Iterable[str]) -> None:
    """Checks the version.

    :raises CheckpointError: the file would need ``fix_query_key_value_ordering()``.
    """
    fused = {"query_key_value", "key_value"}
    if file.version < 2 and any(fused & set(name.split(".")) for name in names):
        raise CheckpointError(
            f"`{file.path}` must have the `checkpoint_version` 2.0 or later, but has "
            f"{file.version}, which orders queries, keys and values differently. Load and save it "
            "with Megatron-LM first."
        )


def _drop_copies(
    shards: dict[str, list[Array]], grid: Sequence[Sequence[RankFile]]
) -> tuple[str, ...]:
    """Drops the last pipeline stage's copy of the table, its output head, if the two are tied.
    Reading the table compares them."""
    embeddings = [name for name in shards if name.endswith("embedding.word_embeddings.weight")]
    heads = ["word_embeddings_for_head.weight"]
    if grid[0][0].args.get("untie_embeddings_and_output_weights") is False:
        heads.append("output_layer.weight")
    found = [name for name in heads if name in shards]
    if len(grid) == 1 or len(embeddings) != 1 or not found:
        return ()
    what = f"{embeddings[0]} of the first and the last pipeline stage"
    copies = zip(shards[embeddings[0]], shards.pop(found[0]), strict=True)
    shards[embeddings[0]] = [Copies(what, pair) for pair in copies]
    return (f"`{found[0]}` is a copy of `{embeddings[0]}` for the last pipeline stage.",)


def _recorded(
    file: RankFile, shards: Mapping[str, Sequence[Array]]
) -> tuple[dict[str, int], dict[str, Cut | None]]:
    """Returns the recorded numbers of rows of tables without padding, and other cuts. Empty if
    Megatron wrote the file."""
    sizes: dict[str, int] = {}
    cuts: dict[str, Cut | None] = {}
    for name, arrays in shards.items():
        match file.ours.get(name):
            case None:
                pass
            case {"vocab_size": int(rows)} if 0 < rows <= sum(sum(a.shape[:1]) for a in arrays):
                sizes[name] = rows
            case {"dim": None}:
                cuts[name] = None
            case {"dim": int(dim), "blocks": [*blocks]} if dim >= 0 and all(
                isinstance(block, int) and block >= 0 for block in blocks
            ):
                cuts[name] = Cut.even(dim, blocks, len(arrays))
            case other:
                raise CheckpointError(
                    f"`{OURS}` of `{file.path}` must say how `{name}` is cut, but says "
                    f"{shown(other)}. The file is damaged: copy it again."
                )
    return sizes, cuts


def _is_vocab(name: str, array: Array, options: ReadOptions) -> bool:
    """Returns whether ``name`` is a table with padding, which Megatron cuts along dimension 0."""
    rule = find_rule(options.rules, name)
    if rule is None:
        return is_table((), name) and len(array.shape) == 2
    return is_table(options.rules, name) and rule.dim == 0


def _without_padding(name: str, shards: Sequence[Array], rows: int | None) -> Array:
    """Joins equal shards and keeps the first ``rows`` rows; all if it is ``None`` or larger."""
    shapes = {shard.shape for shard in shards}
    shape = shards[0].shape
    if len(shapes) != 1 or not shape:
        raise CheckpointError(
            f"`{name}` must be cut over the vocabulary into shards of one shape, but has "
            f"{[shard.shape for shard in shards]}. If it is no such table, say how it is cut with "
            "`--rules`."
        )
    block = shape[0]
    total = block * len(shards)
    rows = total if rows is None else min(rows, total)
    tiles = []
    for rank, shard in enumerate(shards):
        own = range(rank * block, min((rank + 1) * block, rows))
        start = (0,) * (len(shape) - 1)
        tiles.append(Tile((own.start, *start), shard, (0, *start), (len(own), *shape[1:])))
    return Joined((rows, *shape[1:]), shards[0].dtype, tiles)


def _is_plain(value: Any) -> bool:
    scalars = bool | int | float | str | None
    if isinstance(value, list):
        return all(isinstance(each, scalars) for each in value)
    return isinstance(value, scalars)


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out one file for each tensor-parallel rank, with the vocabulary padded for Megatron."""
    source_args = checkpoint.extra.get(ARGS)
    args = dict(source_args) if isinstance(source_args, Mapping) else {}
    divisor = args.get(_DIVISOR, 128)
    if not isinstance(divisor, int) or not 0 < divisor <= 2**16:
        raise CheckpointError(f"`{_DIVISOR}` must be a positive number, but is {divisor!r}.")
    ours: dict[str, Any] = {}
    shapes = {}
    for name in checkpoint.names:
        cut, shape = target.cuts[name], checkpoint.shape(name)
        if name in target.tables and (len(shape) == 2 or cut is not None):
            if target.tp_size > 1 and (cut is None or cut.dim):
                raise CheckpointError(
                    f"`{name}` must be cut over the vocabulary for Megatron-LM, but would be "
                    f"{'replicated' if cut is None else f'cut along dimension {cut.dim}'}. Pass "
                    "`--dim vocab`."
                )
            block = -(-shape[0] // (divisor * target.tp_size)) * divisor
            shapes[name] = (block, *shape[1:])
            ours[name] = {"vocab_size": shape[0]}
        elif cut is None:
            ours[name] = {"dim": None}
        else:
            check_even(name, cut, "Megatron-LM")
            ours[name] = {"dim": cut.dim, "blocks": list(cut.blocks)}
    root: dict[str, Any] = {
        "checkpoint_version": 3.0,
        "iteration": checkpoint.step or 0,
        OURS: ours,
    }
    if args:
        root["args"] = _new_args(args, checkpoint, target, shapes)
    release = checkpoint.step is None
    directory = path / ("release" if release else f"iter_{checkpoint.step:07d}")
    files = []
    for rank, model in enumerate(shard_placeholders(checkpoint, target, shapes)):
        file = directory / f"mp_rank_{rank:02d}" / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        saved = lay_out_file(file, {**root, "model": model}, {"argparse.Namespace": Namespace})
        files.append(saved)
    (path / TRACKER).write_text("release" if release else str(checkpoint.step))
    shards = written_shards(files, [file.root["model"] for file in files], checkpoint)
    return Output(
        {
            key: _without_padding(key.name, shards[key.name], checkpoint.shape(key.name)[0])
            if key.name in shapes
            else join(key.name, target.cuts[key.name], shards[key.name])
            for key in checkpoint.tensors
        }
    )


def _new_args(
    args: Mapping[str, Any],
    checkpoint: Checkpoint,
    target: Target,
    shapes: Mapping[str, Sequence[int]],
) -> Namespace:
    """Returns the source's ``args``, updated for the target."""
    new: dict[str, Any] = {
        "iteration": checkpoint.step or 0,
        "tensor_model_parallel_size": target.tp_size,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
    }
    sizes = {shape[0] * target.tp_size for shape in shapes.values()}
    if len(sizes) == 1:
        new["padded_vocab_size"] = sizes.pop()
    dtypes = {array.dtype for array in checkpoint.tensors.values() if array.dtype.is_floating_point}
    if len(dtypes) == 1:
        new["params_dtype"] = dtypes.pop()
    return Namespace(**{**args, **new})
