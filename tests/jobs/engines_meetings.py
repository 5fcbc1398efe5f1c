"""A part of engines_job.py: ranks meet before tables are sharded, and fail together."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from engines_job import AUTOTP, build, config
from tp_embed import GangError, shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.surgery.strategies import choose_strategies


def fail_alone_at_zero_3() -> list[str]:
    """One rank of four fails, before tables are fetched or while they are drawn. The other
    tensor-parallel group fetches with the first one."""
    found = []
    for what in ("hook", "draw"):
        data_group = groups.get_data_parallel_group()
        with deepspeed.zero.Init(config_dict_or_path=config(3), data_parallel_group=data_group):
            model = build()
        if what == "hook" and dist.get_rank() == 2:
            model.embed.weight.register_hook(lambda grad: grad.flip(0))
        init_fn = run_out_of_memory if what == "draw" else None
        try:
            shard_embeddings(model, DeepSpeedGang.from_groups(), init_fn=init_fn)
            found.append("no error")
        except (GangError, MemoryError, ValueError) as e:
            found.append(f"{type(e).__name__}: {e}")
        assert type(model.embed) is nn.Embedding
        dist.barrier()  # No rank is left in another collective.
    return found


def run_out_of_memory(embed: Any) -> None:
    if dist.get_rank() == 2:
        raise MemoryError("no memory")


def meetings() -> dict[str, Any]:
    """Returns the collectives of `initialize()`, and how often it chooses strategies."""
    chosen = []

    def count(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is choose_strategies.__code__:
            chosen.append(1)

    with torch.profiler.profile() as profile:
        sys.setprofile(count)
        initialize(model=build(), config=config() | AUTOTP)
        sys.setprofile(None)
    sent = [event.name for event in profile.events() if event.name.startswith("tp_embed.")]
    return {"sent": sent, "chosen": len(chosen)}
