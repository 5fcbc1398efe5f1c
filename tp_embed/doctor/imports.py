"""Checks that the optional parts of this package can be imported, each in its own process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from .findings import Finding

# The package that each optional part needs.
PARTS = {
    "tp_embed.integrations.deepspeed": "deepspeed",
    "tp_embed.integrations.hydra": "hydra-core",
    "tp_embed.integrations.transformers": "transformers",
}
_TIMEOUT = 120.0


def judge() -> Iterator[Finding]:
    """Yields findings on optional parts that cannot be imported, and how to install them."""
    processes = {}
    for module, package in PARTS.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            what = f"{module} cannot be used: {package} is not installed"
            extra = module.rpartition(".")[2]
            fix = (
                f"pip install {package}" if extra == package else f"pip install 'tp-embed[{extra}]'"
            )
            yield Finding("note", "imports", what, (0,), fix)
            continue
        processes[module] = subprocess.Popen(
            [sys.executable, "-c", f"import {module}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    good = []
    for module, process in processes.items():
        try:
            _, errors = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            what = f"importing {module} took over {_TIMEOUT:.0f} s"
            yield Finding("error", "imports", what, (0,), "check the file system of packages")
            continue
        if process.returncode:
            last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            yield Finding(
                "error",
                "imports",
                f"{module} cannot be imported: {last}",
                (0,),
                f"run `python -c 'import {module}'` for the traceback",
            )
        else:
            good.append(module)
    if good:
        yield Finding("ok", "imports", f"{', '.join(good)} can be imported", (0,))
