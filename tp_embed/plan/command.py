"""The options of ``tp-embed plan``."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from tp_embed.command import Command, Report, WrongUsageError

from .answer import Dedup, Options, check, make_report
from .engine_config import options_of, read_engine_config
from .model_config import read_table
from .setup import (
    GIB,
    ITEM_BYTES,
    MOMENTS,
    Device,
    Output,
    Placement,
    Setup,
    Strategy,
    TableOptimizer,
    refuse,
)
from .traffic import Network

_EPILOG = """\
Each column is a strategy, for the rank with the largest shard. `none`: every rank has the whole
table and head. `embed`, `vocab`: the table is cut over its columns, or its rows; an untied head is
cut over the vocabulary. `world`: the table is cut over its rows and all ranks, each with ids of its
own; shown for tables with an optimizer of their own, and at ZeRO 0. `dedup`: repeated ids are sent
once. `local logits`: the loss is computed
from each rank's own logits (`--shard-logits`; also shown if it is the best choice). With
`--fuse-loss`, sharded heads compute the loss from hidden states, and no rank holds logits.

Not counted: the rest of the model, temporaries of the optimizer's step, and the buckets of ZeRO.
docs/planning.md has the formulas.
"""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="PATH", help="a DeepSpeed config with a section `tp_embed`"
    )
    parser.add_argument(
        "--table", metavar="NAME", help="of the table in the model, for patterns of that section"
    )
    group = parser.add_argument_group("the table")
    group.add_argument("--hf-config", metavar="PATH", help="a config.json, or its directory")
    group.add_argument(
        "--vocab-size", "--vocab", type=int, metavar="V", help="rows; overrides the config"
    )
    group.add_argument("--embed-dim", "--dim", type=int, metavar="E", help="columns")
    group.add_argument(
        "--tied", action=BooleanOptionalAction, help="whether the output head shares the table"
    )
    group.add_argument("--no-head", action="store_false", dest="head", help="no output head")
    group.add_argument(
        "--strategy", choices=("auto", *get_args(Strategy)), help="your choice; by default auto"
    )
    group.add_argument(
        "--placement", choices=get_args(Placement), help="of rows with `world`; by default block"
    )
    group.add_argument("--shard-logits", action="store_true", help="as in the DeepSpeed config")
    group.add_argument("--fuse-loss", action="store_true", help="as in the DeepSpeed config")
    group.add_argument(
        "--dedup", choices=get_args(Dedup), help="send repeated ids once; by default auto"
    )
    group.add_argument(
        "--output", choices=get_args(Output), help="layout of the lookup; by default replicated"
    )

    group = parser.add_argument_group("how it is trained")
    group.add_argument("--tp", type=int, metavar="P", help="tensor-parallel ranks; by default 1")
    group.add_argument("--dp", type=int, default=1, metavar="D", help="data-parallel ranks")
    group.add_argument("--zero-stage", "--zero", type=int, choices=range(4), help="by default 1")
    group.add_argument("--dtype", choices=tuple(ITEM_BYTES), help="of weights; by default bf16")
    group.add_argument(
        "--grad-dtype", choices=tuple(ITEM_BYTES), help="`grad_accum_dtype`; by default of weights"
    )
    group.add_argument("--optimizer", choices=tuple(MOMENTS), help="by default adamw")
    group.add_argument(
        "--table-optimizer",
        choices=get_args(TableOptimizer),
        help="of the table alone, `tables` of the DeepSpeed config",
    )
    group.add_argument("--table-decay", action="store_true", help="weight decay of the table")
    group.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="per rank and micro-batch"
    )
    group.add_argument("--accumulation-steps", type=int, metavar="K", help="by default 1")
    group.add_argument("--sparse", action="store_true", help="sparse gradients of the table")
    group.add_argument(
        "--unique-share", type=float, metavar="X", help="of distinct tokens; by default Zipf's law"
    )
    group.add_argument(
        "--block-unique-share", type=float, metavar="X", help="in a rank's block of the sequence"
    )
    group.add_argument(
        "--owner-share", type=float, metavar="X", help="of these on one rank; by default 1/P"
    )

    group = parser.add_argument_group("the machines")
    group.add_argument("--device", choices=get_args(Device), default="cuda")
    group.add_argument(
        "--memory", type=float, metavar="GiB", help="of a GPU, for table, head and logits"
    )
    group.add_argument("--bandwidth", type=float, metavar="GB/s", help="of a GPU inside a node")
    group.add_argument("--latency", type=float, default=0.0, metavar="us", help="of a message")
    group.add_argument("--gpus-per-node", type=int, metavar="G", help="by default all")
    group.add_argument("--inter-bandwidth", type=float, metavar="GB/s", help="between nodes")
    group.add_argument("--inter-latency", type=float, metavar="us", help="between nodes")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="draw costs over P, as .svg or .png"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object; sizes in bytes")


def _run(values: Mapping[str, Any]) -> Report:
    try:
        return _plan(values)
    except ValueError as e:
        raise WrongUsageError(str(e)) from e


# Not in the parser, where the options could not tell whether they were given.
_DEFAULTS: Mapping[str, Any] = {
    "strategy": "auto",
    "placement": "block",
    "dedup": "auto",
    "output": "replicated",
    "tp": 1,
    "zero_stage": 1,
    "optimizer": "adamw",
    "accumulation_steps": 1,
    "shard_head": True,
}


def _with_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Adds what the DeepSpeed config says to the options, and then the defaults."""
    config, found = given["config"], {}
    if isinstance(config, str):
        config = read_engine_config(Path(config))
    if config is not None:
        found = options_of(config, given["table"])
    elif given["table"] is not None:
        raise WrongUsageError("--table must come with --config, but does not.")
    flags = ("shard_logits", "fuse_loss", "sparse", "table_decay")
    chosen = {k: v for k, v in given.items() if v is not None and (v or k not in flags)}
    return {**dict.fromkeys(given), **_DEFAULTS, **found, **chosen}


def _plan(given: Mapping[str, Any]) -> Report:
    values = _with_config(given)
    table = read_table(values)
    if table.get("tied") and not values.get("tie_head", True):
        values["strategy"] = "none"
    setup = Setup(
        **table,
        head=values["head"],
        shard_head=values["shard_head"],
        tp_size=values["tp"],
        dp_size=values["dp"],
        zero_stage=values["zero_stage"],
        grad_dtype=values["grad_dtype"],
        optimizer=values["optimizer"],
        tokens=values["tokens"],
        accumulation_steps=values["accumulation_steps"],
        sparse=bool(values["sparse"]),
        unique_share=values["unique_share"],
        block_unique_share=values["block_unique_share"],
        owner_share=values["owner_share"],
        output=values["output"],
        fuse_loss=bool(values["fuse_loss"]),
        table_optimizer=values["table_optimizer"],
        table_decay=bool(values["table_decay"]),
        placement=values["placement"],
        device=values["device"],
    )
    memory = values["memory"]
    if memory is not None and not memory > 0:
        refuse("memory", "greater than 0", memory)
    options = Options(
        None if memory is None else memory * GIB,
        values["strategy"],
        values["dedup"],
        bool(values["shard_logits"]),
        None if values["chart"] is None else Path(values["chart"]),
    )
    network = _network(values)
    check(setup, options)
    return make_report(setup, options, network)


def _network(values: Mapping[str, Any]) -> Network | None:
    if values["bandwidth"] is None:
        for name in ("latency", "gpus_per_node", "inter_bandwidth", "inter_latency"):
            # The default of latency is 0, not None.
            if values[name] is not None and (name != "latency" or values[name]):
                option = name.replace("_", "-")
                raise WrongUsageError(f"--{option} must come with --bandwidth, but does not.")
        return None
    inter, lag = values["inter_bandwidth"], values["inter_latency"]
    return Network(
        values["bandwidth"] * 1e9,
        values["latency"] * 1e-6,
        values["gpus_per_node"],
        None if inter is None else inter * 1e9,
        None if lag is None else lag * 1e-6,
    )


PLAN = Command(
    "plan",
    help="estimate the cost of each strategy, without GPUs",
    description="Estimates the cost of a table per rank and strategy: memory, bytes, and time.",
    add_arguments=_add_arguments,
    run=_run,
    epilog=_EPILOG,
)
