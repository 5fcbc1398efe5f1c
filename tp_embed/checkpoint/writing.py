"""Converts checkpoints between formats, tensor-parallel sizes and dtypes, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .choices import NanPolicy
from .compare import check_same
from .contents import MASTER, Checkpoint, Key, ReadOptions
from .conversion import Plan, Request, identity_of, plan
from .errors import CheckpointError
from .files.arrays import Array
from .files.copying import copy
from .files.derived import NoNan
from .files.hashes import checked
from .staging import check_free, staged


def convert(
    source: str | Path,
    output: str | Path,
    request: Request,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Plan:
    """Converts the checkpoint at ``source`` to ``output``: all tensors, bit for bit unless
    ``request`` changes the dtype.

    Holds two boxes of at most 16 MiB in memory. ``output`` appears complete or not at all, even if
    the process is killed; see :func:`~tp_embed.checkpoint.staging.staged`.

    :param resume: continue a killed run of the same request.
    :param overwrite: replace an existing ``output``.
    :param verify: compare the result with the source before renaming it to ``output``.
    :param progress: called with the number of bytes written, or compared, since the last call.
    :raises CheckpointError: the source is damaged, or cannot be written as requested.
    :raises UnsafeCheckpointError: reading the source would run code.
    :raises FileExistsError: ``output`` exists and ``overwrite`` is false.
    """
    check_free(Path(output), overwrite)
    work = plan(source, request)
    write(work, output, resume=resume, overwrite=overwrite, verify=verify, progress=progress)
    return work


def write(
    work: Plan,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Executes ``work``, with the options of :func:`convert`."""
    output = Path(output)
    check_output(work.source, output, overwrite)
    with staged(output, request=work.identity, resume=resume, overwrite=overwrite) as stage:
        if not work.format.IS_FILE:
            stage.path.mkdir(exist_ok=True)
        written = work.format.lay_out(work.checkpoint, work.target, stage.path)
        stage.laid_out()
        with checked(work.source.hashes):
            tensors = (
                (key, _checked(key, work.checkpoint.tensors[key], work.request.nan), array)
                for key, array in written.arrays.items()
            )
            for copied in copy(tensors, stage.is_done):
                stage.done(*copied)
                progress(copied[-1])
        stage.flush()
        written.finish()  # Overlaps the flush.
        stage.wait()
        if verify:
            _verify(work, stage.path, progress)
        if identity_of(work.source, work.request) != work.identity:
            raise CheckpointError(
                f"`{work.source.path}` must not change while it is converted, but has. Convert it "
                "again when nothing writes to it."
            )


def _verify(work: Plan, path: Path, progress: Callable[[int], object]) -> None:
    """Compares the written checkpoint at ``path`` with the source."""
    expected = work.checkpoint
    sizes = {expected.shape(name)[0] for name in work.target.tables}
    options = ReadOptions(
        cuts=work.target.cuts, vocab_size=sizes.pop() if len(sizes) == 1 else None
    )
    written = work.format.read(path, options)
    # Some formats add fp32 copies that the source lacks.
    tensors = {
        key: array
        for key, array in written.tensors.items()
        if key in expected.tensors or key.state != MASTER or Key(key.name) not in written.tensors
    }
    check_same(expected, replace(written, tensors=tensors), progress)


def _checked(key: Key, array: Array, nan: NanPolicy) -> Array:
    can_be_nan = array.dtype.is_floating_point or array.dtype.is_complex
    return NoNan(str(key), array) if nan == "refuse" and can_be_nan else array


def check_output(source: Checkpoint, output: Path, overwrite: bool) -> None:
    """Checks that ``output`` may be written.

    :raises CheckpointError: ``output`` is, contains or lies in the source.
    :raises FileExistsError: ``output`` exists and ``overwrite`` is false.
    """
    check_free(output, overwrite)
    inner, outer = output.resolve(), source.path.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise CheckpointError(
            f"The output must not be the source, nor in it, nor around it, but `{output}` is, with "
            f"the source `{source.path}`. Choose another place."
        )
