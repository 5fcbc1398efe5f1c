"""Runs a program whose DeepSpeed engines shard their tables, without a change to its code.

    deepspeed --module tp_embed.run train.py --deepspeed ds_config.json
    accelerate launch --use_deepspeed -m tp_embed.run train.py
    torchrun --nproc-per-node 8 -m tp_embed.run -m package.train

Calls the functions of the entry points ``tp_embed.install`` first; the one for DeepSpeed is
`tp_embed.integrations.deepspeed.install()`. The section ``"tp_embed"`` of the DeepSpeed config says
how to shard.
"""

from __future__ import annotations

import re
import runpy
import sys
from importlib.metadata import entry_points
from pathlib import Path

_USAGE = "usage: python -m tp_embed.run (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main() -> None:
    """Runs the program that ``sys.argv`` names, as ``python`` would."""
    arguments = sys.argv[1:]
    # DeepSpeed's launcher puts it first; it is for the program.
    own = 1 if arguments and re.fullmatch(r"--local[-_]rank=\d+", arguments[0]) else 0
    ranks, arguments = arguments[:own], arguments[own:]
    is_module = arguments[:1] == ["-m"]
    program = arguments[1:] if is_module else arguments
    if not program or program[0].startswith("-"):
        given = " ".join(arguments) or "nothing"
        sys.exit(f"{_USAGE}\nExpected a script or `-m` and a module, but got {given}.")
    for entry in entry_points(group="tp_embed.install"):
        entry.load()()
    name, rest = program[0], program[1:]
    sys.argv = [name, *ranks, *rest]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main()
