"""Converts DeepSpeed checkpoints of every ZeRO stage to one universal format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tp_embed.checkpoint import ReadOptions, Request, convert

_logger = logging.getLogger(__name__)


def to_universal(
    source: str | Path,
    output: str | Path,
    *,
    optimizer_names: Sequence[str] | None = None,
) -> None:
    """Converts a checkpoint that ``engine.save_checkpoint()`` has written to a universal one,
    which an engine of any ZeRO stage and any tensor- and data-parallel size loads with
    :func:`load_universal`: Parameters, both moments of Adam and its step, exact. The same as
    ``tp-embed convert SOURCE OUTPUT --to universal``.

    It runs in one process, on the CPU, in little memory, and runs no code out of the source. What
    cannot be kept, such as objects in the client's state, is logged as a warning.

    :param source: the directory of one tag, or the one around it: then the latest is taken. Not of
        a pipeline or of experts.
    :param output: the directory to write; it gets the file ``latest_universal``, and a directory
        for the tag.
    :param optimizer_names: for ZeRO 0: the names of the Parameters of the optimizer, in its order,
        which the checkpoint does not hold. Needed unless DeepSpeed has made the optimizer by its
        config; then it is the order of the model, if it was given no other `model_parameters`.
    :raises FileExistsError: ``output`` is there already.
    :raises CheckpointError: ``source`` is not such a directory, lacks the file of a rank, is
        damaged, asks to run code, or holds something that cannot be converted exactly.
    """
    names = None if optimizer_names is None else tuple(optimizer_names)
    request = Request(
        to="universal", source_format="deepspeed", read=ReadOptions(optimizer_names=names)
    )
    work = convert(source, output, request)
    for note in (*work.source.notes, *work.dropped):
        _logger.warning("`%s`: %s", source, note)
