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
    """Converts a checkpoint of ``engine.save_checkpoint()`` to a universal one, which
    :func:`load_universal` loads at any ZeRO stage and any tensor- and data-parallel size. Keeps
    Parameters, both moments of Adam and its step exactly. The same as
    ``tp-embed convert SOURCE OUTPUT --to universal``.

    Runs in one process, on the CPU, in little memory, and runs no code from the source. Warns of
    anything it cannot keep, such as objects in the client state.

    :param source: the directory of a tag, or its parent, which stands for the latest tag. Not of a
        pipeline or of experts.
    :param output: the directory to write; it gets the file ``latest_universal``, and a directory
        for the tag.
    :param optimizer_names: for ZeRO 0, the names of the optimizer's Parameters in its order, which
        the checkpoint does not hold. Required unless DeepSpeed made the optimizer from its config;
        then it is the order of the model, if no other `model_parameters` were passed.
    :raises FileExistsError: ``output`` already exists.
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
