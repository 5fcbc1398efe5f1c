"""The options of ``tp-embed doctor``."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping
from typing import Any

from tp_embed.command import Command, Report

_EPILOG = """\
Start it like the job, by the same launcher on the same nodes:
  deepspeed --hostfile=hosts --module tp_embed doctor --tp 8
  torchrun --nnodes=2 --nproc-per-node=8 --rdzv-endpoint=node1:29500 ... -m tp_embed doctor --tp 8
  mpirun -np 16 --hostfile hosts python -m tp_embed doctor --tp 8
  srun --ntasks-per-node=8 python -m tp_embed doctor --tp 8
or alone, to check this machine. Rank 0 prints the findings: errors make a job fail or hang,
warnings make it slow or may make it fail, and notes. All ranks have the same exit code.
"""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tp", type=_positive, metavar="N", help="the tensor-parallel size, of adjacent ranks"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a DeepSpeed config, or YAML, to compare over the ranks"
    )
    parser.add_argument(
        "--shared", metavar="DIR", help="a directory that all nodes must share, for checkpoints"
    )
    parser.add_argument(
        "--no-bench",
        action="store_false",
        dest="bench",
        help="skip slow checks: timing collectives, or, alone, importing extras",
    )
    parser.add_argument("--fix", action="store_true", help="remove stale locks of extensions")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds to wait for other ranks; by default %(default)g",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 after warnings, too")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _run(values: Mapping[str, Any]) -> Report:
    # Silences torch's logs of errors that become findings. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from .exam import Options, examine

    return examine(Options(**values))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"must be 1 or more, but is {value} instead")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise ArgumentTypeError(f"must be in [1, 3600], but is {value:g} instead")
    return value


DOCTOR = Command(
    "doctor",
    "check the nodes of a job before it starts",
    "Checks this machine, or the nodes of a job.",
    _add_arguments,
    _run,
    epilog=_EPILOG,
)
