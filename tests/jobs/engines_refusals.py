"""A part of engines_job.py: what `initialize()` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

from engines_job import AUTOTP, SPECS, E, V, build, config, error
from tp_embed import VocabShardedEmbedding, shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang

SHARDED_HEAD = AUTOTP["tensor_parallel"] | {"vocab_parallel_lm_head": True}


def refusals(directory: Path) -> dict[str, str]:
    """The errors of `initialize()`, by what is wrong."""
    gang = DeepSpeedGang.from_groups()
    return {
        **of_gradients(gang),
        **of_engines(),
        **of_values(directory),
        **of_ranks(),
        **of_other_layers(gang),
    }


def section(**keys: Any) -> dict[str, Any]:
    return config(**AUTOTP, tp_embed=keys)


def of_gradients(gang: DeepSpeedGang) -> dict[str, str]:
    unclipped = config(0, **AUTOTP, tp_embed={"sparse": True})
    tied = TiedLayerSpec("embed", VocabShardedEmbedding, gang, V, E, reuse_grad=True)
    reused = PipelineModule([VocabShardedEmbedding(gang, V, E, reuse_grad=True)], num_stages=1)
    return {
        "bf16": error(build(), config(0, **AUTOTP, bf16={"enabled": True})),
        "local storage": error(
            build(), config(1, **AUTOTP, checkpoint={"use_node_local_storage": True})
        ),
        "sparse": error(build(), section(sparse=True)),
        "sparse clipped": error(build(), unclipped | {"gradient_clipping": 1.0}),
        "sparse clipped by default": error(
            build(), {k: v for k, v in unclipped.items() if k != "gradient_clipping"}
        ),
        "reuse": error(build(), config(0, **AUTOTP, tp_embed={"reuse_grad": True})),
        "reuse alone": error(build(), config(0, tp_embed={"reuse_grad": True})),
        "reuse sparse": error(
            build(), config(0, **AUTOTP, tp_embed={"reuse_grad": True, "sparse": True})
        ),
        "reuse pipeline": error(reused, config(0)),
        "reuse tied": error(PipelineModule([tied, tied], num_stages=2), config(1)),
    }


def of_engines() -> dict[str, str]:
    sliced = [*SPECS, {"patterns": [r"embed\.weight$"], "partition_type": "row"}]
    partition = {"use_default_specs": False, "layer_specs": sliced}
    spec = {"tensor_parallel": {"autotp_size": 2, "partition_config": partition}}
    parsed = build()
    parsed.ds_autotp_parsed = True
    return {
        "dedup": error(build(), section(dedup="on")),
        "lamb": error(build(), config(1, **AUTOTP, optimizer={"type": "Lamb"})),
        "adafactor": error(
            build(), config(1, **AUTOTP, optimizer={"type": "Adafactor", "params": {"lr": 1.0}})
        ),
        "spec": error(build(), config(**spec, tp_embed={"strategy": "none"})),
        "head": error(build(), config(tensor_parallel=SHARDED_HEAD)),
        "parsed": error(parsed, config() | AUTOTP),
    }


def of_values(directory: Path) -> dict[str, str]:
    path = directory / f"config{dist.get_rank()}.json"
    path.write_text(json.dumps(section(strategy="rows")))
    return {
        "key": error(build(), section(stratgy="vocab")),
        "value": error(build(), section(rules={"embed": "columns"})),
        "type": error(build(), section(tie_head="yes")),
        "init": error(build(), section(init="normale")),
        "module": error(build(), section(init="no_such_module.normal")),
        "path": error(build(), str(path)),
        "args": error(build(), None, args=SimpleNamespace(deepspeed_config=str(path))),
        "no config": error(build(), None),
        "no model": error(None, config()),
    }


def of_ranks() -> dict[str, str]:
    return {
        "section": error(build(), section(strategy="vocab" if dist.get_rank() % 2 else "embed")),
        "seed": error(build(dist.get_rank()), config() | AUTOTP),
        "alone": error(build(sparse=dist.get_rank() % 2 == 1), section()),
        "sparse table": error(build(sparse=True), section()),
        "logits": error(build(), section(shard_logits=True)),
    }


def of_other_layers(gang: DeepSpeedGang) -> dict[str, str]:
    found = {}
    pipeline = PipelineModule([nn.Embedding(V, E), nn.Linear(E, V)], num_stages=1)
    try:
        shard_embeddings(pipeline, gang)
    except ValueError as e:
        found["pipeline"] = str(e)
    model = build()
    error(model, config(tensor_parallel=SHARDED_HEAD))
    found["model after"] = type(model.embed).__name__
    inference = build()
    inference.up = deepspeed.module_inject.layers.LinearLayer(inference.up)
    deepspeed.set_autotp_mode(training=False)
    torch.manual_seed(0)
    found["inference"] = error(inference, config() | AUTOTP)
    deepspeed.set_autotp_mode(training=True)
    return found
