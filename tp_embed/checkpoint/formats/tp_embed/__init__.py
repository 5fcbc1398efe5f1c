"""Reads and writes our own format: a directory with one file per tensor-parallel rank, and a
manifest.

``rank-00000-of-00002.safetensors`` holds everything that rank 0 of 2 needs: its shards and all
replicated tensors. Replicated tensors take space in every file, but a rank opens one file and waits
for no other, and differing copies are detected. Weights have their names as keys, so that
``safetensors.torch.load_file()`` returns the state dict of the rank. Other states have the key
``.STATE/NAME``: no name in torch begins with a dot.

``manifest.json`` describes the files; see ``docs/manifest.md``. It is written last: a directory
without it is no checkpoint. Sizes, headers and SHA-256 of the files are compared with it before a
tensor is used. That reads each file once more, at 1 to 2 GB/s per core with one file per core, and
finds damage before training does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...contents import WEIGHT, Checkpoint, Output, ReadOptions, Target
from ...errors import CheckpointError
from ...files import safetensors_file
from ...files.arrays import Array
from ...files.hashes import RunningHash, finish_all
from ...files.plain_values import damaged
from ...files.text_files import inside, read_json
from ...staging import write_text
from .manifest import FORMAT, Manifest, manifest_json, text_of

NAME = FORMAT
IS_FILE = False
HAS_RANKS = True
HAS_OPTIMIZER = True
HAS_EXTRA = True
MAIN = WEIGHT

_MANIFEST = "manifest.json"


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is a directory with safetensors files of ranks."""
    return path.is_dir() and any(path.glob("rank-*-of-*.safetensors"))


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Reads a checkpoint. Cuts come from the manifest alone: ``options`` do not change them."""
    manifest_path = path / _MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(
            f"`{path}` must have a `{_MANIFEST}`, which is written last, but has none. It was not "
            "finished, or not copied completely."
        )
    value = read_json(manifest_path)
    try:
        manifest = Manifest.from_json(f"`{manifest_path}`", value)
    except RecursionError as e:
        raise CheckpointError(
            f"`{manifest_path}` must not be nested so deep, but is. The checkpoint is damaged: "
            "copy it again."
        ) from e
    files, digests = _check_files(path, manifest.tp_size, value.get("files"))
    ranks = [_read_rank(file, manifest, rank) for rank, file in enumerate(files)]
    arrays = manifest.join(ranks)
    return Checkpoint(
        format=NAME,
        path=path,
        tensors=arrays,
        tp_size=manifest.tp_size,
        cuts={name: entry.cut for name, entry in manifest.entries.items() if entry.is_known},
        ties=manifest.ties,
        buffers=frozenset(name for name, entry in manifest.entries.items() if entry.is_buffer),
        step=manifest.step,
        optimizer=manifest.optimizer,
        extra=manifest.extra,
        files=(manifest_path, *files),
        hashes=dict(zip(files, digests, strict=True)),
    )


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out one safetensors file for each rank, and the manifest.

    :raises CheckpointError: param groups or extra state are no plain values.
    """
    try:
        value = manifest_json(checkpoint, target)
        # Refuse to write what could not be read back.
        manifest = Manifest.from_json(f"the manifest for `{checkpoint.path}`", value)
    except RecursionError as e:
        raise CheckpointError(
            f"The values in `{checkpoint.path}` other than tensors must be plain, but are nested "
            "too deeply, or in themselves."
        ) from e
    (path / _MANIFEST).unlink(missing_ok=True)
    files = [path / name for name in _file_names(target.tp_size)]
    hashes = [RunningHash(file) for file in files]
    ranks = [
        safetensors_file.lay_out(file, manifest.layout(rank), manifest.ties, hashing)
        for rank, (file, hashing) in enumerate(zip(files, hashes, strict=True))
    ]

    def finish() -> None:
        described = {
            file.name: {"size": file.stat().st_size, "sha256": digest}
            for file, digest in zip(files, finish_all(hashes), strict=True)
        }
        write_text(path / _MANIFEST, text_of({**value, "files": described}))

    arrays = manifest.join(ranks)
    # In file order, so that the hashes are computed on the way.
    return Output(dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)), finish)


def _check_files(path: Path, tp_size: int, value: Any) -> tuple[list[Path], list[str]]:
    """Returns the files of the ranks and their recorded hashes. Checks that they exist and have the
    recorded sizes."""
    manifest = path / _MANIFEST
    what = f"`files` in `{manifest}`"
    if not isinstance(value, dict):
        raise damaged(what, "an object", value)
    for name in value:
        inside(path, name, manifest)
    if tp_size != len(value) or value.keys() != set(_file_names(tp_size)):
        raise damaged(what, f"the files of {tp_size} ranks, as `tp_size` says", list(value))
    files, digests = [], []
    for name in _file_names(tp_size):
        match value[name]:
            case {"size": int(size), "sha256": str(digest), **rest} if not rest:
                files.append(path / name)
                digests.append(digest)
            case other:
                raise damaged(f"`{name}` in {what}", "a size and a SHA-256", other)
        found = files[-1].stat().st_size
        if found != size:
            raise CheckpointError(
                f"`{files[-1]}` must have {size} bytes, as `{_MANIFEST}` says, but has {found} "
                "instead. It is truncated, or from another checkpoint: copy it again."
            )
    return files, digests


def _read_rank(file: Path, manifest: Manifest, rank: int) -> dict[str, Array]:
    """Returns the tensors of a rank. Checks them against the manifest."""
    arrays, metadata = safetensors_file.read(file)
    if metadata != manifest.ties:
        raise CheckpointError(
            f"The metadata of `{file}` must be the ties {manifest.ties} of `{_MANIFEST}`, but is "
            f"{metadata} instead. It is from another checkpoint: copy it again."
        )
    layout = manifest.layout(rank)
    for key in [*layout, *arrays]:
        array = arrays.get(key)
        found = array and (array.shape, array.dtype)
        if found != layout.get(key):
            raise CheckpointError(
                f"`{key}` in `{file}` must have the shape and dtype {layout.get(key)}, as "
                f"`{_MANIFEST}` says, but has {found} instead. One of the two is damaged, or from "
                "another checkpoint: copy both again."
            )
    return arrays


def _file_names(tp_size: int) -> list[str]:
    return [f"rank-{rank:05}-of-{tp_size:05}.safetensors" for rank in range(tp_size)]
