"""Runs the commands, from the command line or through Hydra. Reports are plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tp_embed.command import MISMATCH, Report, WrongUsageError

from . import formats, report
from .compare import Difference, differences
from .contents import MASTER, WEIGHT, Checkpoint, Key, ReadOptions, tables_of
from .conversion import Plan, Request, plan, without_padding
from .inspect import describe, describe_plan
from .options import build_request, read_options
from .staging import check_free
from .writing import check_output, write

# Takes the total number of bytes; the block calls the yielded function with bytes done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]

SHOWN_DIFFERENCES = 20


def no_progress(total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Shows no progress."""
    return nullcontext(lambda nbytes: None)


def inspect(
    path: str, *, source_format: str | None = None, show_all: bool = False, **reading: Any
) -> Report:
    """Reports what is in a checkpoint.

    :param reading: arguments of :func:`read_options`.
    """
    options = read_options(**reading)
    data = describe(formats.read(Path(path), options, source_format), options.rules)
    return Report(data, report.inspection(data, show_all))


def convert(
    source: str,
    output: str,
    *,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    show_all: bool = False,
    progress: Progress = no_progress,
    **values: Any,
) -> Report:
    """Converts a checkpoint, or with ``dry_run`` only reports what would be written.

    :param values: arguments of :func:`build_request`.
    """
    began = time.perf_counter()
    request = build_request(**values)
    check_free(Path(output), overwrite)
    work = plan(source, request)
    if dry_run:
        check_output(work.source, Path(output), overwrite)
    else:
        with progress((1 + verify) * work.checkpoint.nbytes) as done:
            write(
                work,
                output,
                resume=resume,
                overwrite=overwrite,
                verify=verify,
                progress=done,
            )
    name = work.format.NAME
    warnings = [f"{note}." for note in work.source.notes]
    warnings += [f"`{name}` cannot hold {what}: dropped." for what in work.dropped]
    warnings += [
        f"`{name}` has no use for `{option}`: it has no effect." for option in _unused(work)
    ]
    warnings += [
        f"`{table}` will be whole on each of the {work.target.tp_size} ranks: cut it with `--dim`."
        for table in sorted(work.target.tables)
        if work.target.tp_size > 1 and work.target.cuts[table] is None
    ]
    data = describe_plan(work) | {
        "output": output,
        "dry_run": dry_run,
        "verified": verify and not dry_run,
        "seconds": round(time.perf_counter() - began, 3),
        "warnings": warnings,
    }
    lines = report.conversion(data, show_all)
    return Report(data, lines, tuple(warnings))


def verify(
    first: str,
    second: str,
    *,
    source_format: str | None = None,
    other_format: str | None = None,
    tag: str | None = None,
    other_tag: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    show_all: bool = False,
    progress: Progress = no_progress,
    **reading: Any,
) -> Report:
    """Reports the differences between two checkpoints.

    :param reading: arguments of :func:`read_options`.
    """
    began = time.perf_counter()
    for option, value in (("--rtol", rtol), ("--atol", atol)):
        if value is not None and not 0 <= value < math.inf:
            raise WrongUsageError(f"`{option}` must be a number from 0 on, but is {value}.")
    both = [
        _read(path, read_options(tag=which, **reading), name)
        for path, which, name in ((first, tag, source_format), (second, other_tag, other_format))
    ]
    compared, weights_only = 0, bool(reading.get("weights_only"))
    with progress(_bytes_to_compare(both[0], weights_only)) as done:

        def count(nbytes: int) -> None:
            nonlocal compared
            compared += nbytes
            done(nbytes)

        found = list(
            differences(*both, rtol=rtol, atol=atol, weights_only=weights_only, progress=count)
        )
    data = {
        "same": not found,
        "first": {"path": first, "format": both[0].format, "tp_size": both[0].tp_size},
        "second": {"path": second, "format": both[1].format, "tp_size": both[1].tp_size},
        "bytes": compared,
        "seconds": round(time.perf_counter() - began, 3),
        "differences": [_difference(each) for each in found],
        "notes": [note for checkpoint in both for note in checkpoint.notes],
    }
    how = "bit for bit" if rtol is None and atol is None else "within the tolerances"
    if found:
        shown = found if show_all else found[:SHOWN_DIFFERENCES]
        lines = [str(each) for each in shown]
        if len(shown) < len(found):
            lines.append(f"... and {len(found) - len(shown)} more; `--all` lists them")
        lines.append(f"`{first}` and `{second}` differ in {len(found)} places")
    else:
        lines = [f"`{first}` and `{second}` are the same {how}: {report.size(compared)}"]
    return Report(data, [*lines, *_notes(*both)], code=MISMATCH if found else 0)


def _unused(work: Plan) -> Iterator[str]:
    """Yields the given options that the format does not use."""
    request, default, name = work.request, Request(to=work.request.to), work.format.NAME
    uses = {
        "--tp": (request.tp_size, None, work.format.HAS_RANKS),
        "--dim": (request.dim, None, work.format.HAS_RANKS),
        "--dtype": (request.dtype, None, work.format.MAIN == WEIGHT),
        "--zero-stage": (request.zero_stage, default.zero_stage, name == "deepspeed"),
        "--dp": (request.dp_size, default.dp_size, name == "deepspeed"),
        "--max-shard-size": (request.max_shard_size, default.max_shard_size, name == "hf"),
        "--hf-config": (request.hf_config, None, name == "hf"),
    }
    for option, (value, default_value, is_used) in uses.items():
        if value != default_value and not is_used and (option, value) != ("--tp", 1):
            yield option


def _read(path: str, options: ReadOptions, name: str | None) -> Checkpoint:
    """Reads a checkpoint and drops the padding of its tables."""
    checkpoint = formats.read(Path(path), options, name)
    return without_padding(checkpoint, tables_of(checkpoint, options.rules), options.vocab_size)


def _difference(found: Difference) -> dict[str, Any]:
    largest = found.largest
    return {
        "name": found.key.name,
        "state": found.key.state,
        "what": found.what,
        # JSON has no infinity.
        "largest": largest if largest is not None and math.isfinite(largest) else None,
    }


def _bytes_to_compare(checkpoint: Checkpoint, weights_only: bool) -> int:
    tensors = checkpoint.tensors
    return sum(
        array.nbytes
        for key, array in tensors.items()
        if not weights_only
        or key.state == WEIGHT
        or (key.state == MASTER and Key(key.name) not in tensors)
    )


def _notes(*checkpoints: Checkpoint) -> list[str]:
    return [f"note: {note}" for checkpoint in checkpoints for note in checkpoint.notes]
