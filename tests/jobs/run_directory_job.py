"""A third-party Hydra app with its own config and timestamps in its directories. Rank 1 is in
another time zone and starts later."""

from __future__ import annotations

import logging
import os
import sys
import time

from tp_embed.launch.environment import find_place

if find_place().rank == 1:
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    time.sleep(1.5)

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from tp_embed.integrations.hydra import main, register_schemas
from tp_embed.watchdog import Watchdog

register_schemas()
log = logging.getLogger("job")


@main(config_path=".", config_name="run_directory_job")
def job(config):
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # At the address of the store where the ranks agreed.
    if config.watch:
        Watchdog.start(config.watch)
    rank = dist.get_rank()
    hydra = HydraConfig.get()
    place = find_place()
    own = [place.launcher, place.size, hydra.runtime.output_dir, config.run_id, config.started]
    assert (place.rank, place.local_rank) == (rank, int(os.environ["LOCAL_RANK"]))
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    log.info("x is %s on rank %s", config.x, rank)
    logging.getLogger("DeepSpeed").info("said by DeepSpeed on rank %s", rank)
    if rank == 0:
        print("AGREED", all(other == own for other in of_all), *own, flush=True)
    dist.barrier()
    if config.fail_on == rank:
        raise RuntimeError("this rank fails")
    dist.barrier()
    return OmegaConf.select(config, "x")


if __name__ == "__main__":
    logging.getLogger("DeepSpeed").propagate = False  # As DeepSpeed does.
    job()
    sys.exit(0)
