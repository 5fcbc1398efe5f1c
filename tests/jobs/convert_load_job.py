"""Run by the `deepspeed` launcher: trains engines and saves them, or loads checkpoints into them as
a user would, saves them again at once, and continues training.

    deepspeed convert_load_job.py OUT CASES

CASES is a JSON file of cases as for `convert_job.py`, but `load` is a directory with a file
`latest`, and `args` are arguments of `load_checkpoint()`. Saves to OUT/NAME. Each rank writes
OUT/CASES.RANK.pt: the later `losses`, and the loaded client state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from convert_job import make_engine
from universal_job import batches, train


def run(name: str, case: dict[str, Any], out: Path) -> dict[str, Any]:
    engine = make_engine(case)
    seen: dict[str, Any] = {}
    if "load" in case:
        _, client_state = engine.load_checkpoint(case["load"], **case.get("args", {}))
        seen["client"] = client_state.get("client")
    else:
        for ids in batches()[:2]:
            train(engine, ids)
    engine.save_checkpoint(str(out / name), client_state={"client": "kept"})
    seen["steps"] = engine.global_steps
    seen["losses"] = [train(engine, ids) for ids in batches()[2:]]
    return seen


def main(out: Path, cases: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen = {name: run(name, case, out) for name, case in json.loads(cases.read_text()).items()}
    torch.save(seen, out / f"{cases.stem}.{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
