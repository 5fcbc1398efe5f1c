"""``tp-embed plan``: its options, and what it reads of the config of a model."""

from __future__ import annotations

import json
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tp_embed.command import Command, CommandError, Report, WrongUsageError
from tp_embed.partition import Partition

from .estimate import Cost, auto_strategy, costs, recommend
from .report import as_data, as_lines, name_of
from .setup import GIB, ITEM_BYTES, MOMENTS, Setup, refuse
from .traffic import Network

STRATEGIES = ("auto", "none", "embed", "vocab")

_EPILOG = """\
A column is a strategy, of the rank that holds the largest shard. `none`: every rank has the whole
table and head. `embed`, `vocab`: the table is cut over its columns, or its rows; a head that shares
no table is cut over the vocabulary. `local logits`: the loss is computed from the logits of each
rank (`shard_logits`). Not counted: the rest of the model, temporaries of the optimizer's step, and
the buckets of ZeRO. docs/planning.md has the formulas.
"""

# In the config of a model, the width of the table: what is more special comes first.
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size", "n_embd", "d_model")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def _add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the table")
    group.add_argument("--hf-config", metavar="PATH", help="a config.json, or its directory")
    group.add_argument("--vocab-size", type=int, metavar="V", help="rows; goes before the config")
    group.add_argument("--embed-dim", type=int, metavar="E", help="columns")
    group.add_argument(
        "--tied", action=BooleanOptionalAction, help="whether the output head shares the table"
    )
    group.add_argument("--no-head", action="store_false", dest="head", help="there is none")
    group.add_argument("--strategy", choices=STRATEGIES, default="auto", help="your choice")
    group.add_argument("--shard-logits", action="store_true", help="as in the DeepSpeed config")

    group = parser.add_argument_group("how it is trained")
    group.add_argument("--tp", type=int, default=1, metavar="P", help="tensor-parallel ranks")
    group.add_argument("--dp", type=int, default=1, metavar="D", help="data-parallel ranks")
    group.add_argument("--zero-stage", type=int, choices=range(4), default=1)
    group.add_argument("--dtype", choices=tuple(ITEM_BYTES), help="of weights; by default bf16")
    group.add_argument(
        "--grad-dtype", choices=tuple(ITEM_BYTES), help="`grad_accum_dtype`; as the weights"
    )
    group.add_argument("--optimizer", choices=tuple(MOMENTS), default="adamw")
    group.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="on each rank in a micro-batch"
    )
    group.add_argument("--accumulation-steps", type=int, default=1, metavar="K")
    group.add_argument("--sparse", action="store_true", help="sparse gradients of the table")
    group.add_argument(
        "--unique-share", type=float, default=1.0, metavar="X", help="distinct tokens, for --sparse"
    )

    group = parser.add_argument_group("the machines")
    group.add_argument(
        "--memory", type=float, metavar="GiB", help="what a GPU has for table, head and logits"
    )
    group.add_argument("--bandwidth", type=float, metavar="GB/s", help="of a GPU inside a node")
    group.add_argument("--latency", type=float, default=0.0, metavar="us", help="of a message")
    group.add_argument("--gpus-per-node", type=int, metavar="G", help="by default all are in one")
    group.add_argument("--inter-bandwidth", type=float, metavar="GB/s", help="between nodes")
    group.add_argument("--inter-latency", type=float, metavar="us", help="between nodes")
    parser.add_argument("--json", action="store_true", help="print a JSON object, in bytes")


def _run(values: Mapping[str, Any]) -> Report:
    try:
        setup = Setup(
            **_table(values),
            head=values["head"],
            shard_head=values.get("shard_head", True),
            tp_size=values["tp"],
            dp_size=values["dp"],
            zero_stage=values["zero_stage"],
            grad_dtype=values["grad_dtype"],
            optimizer=values["optimizer"],
            tokens=values["tokens"],
            accumulation_steps=values["accumulation_steps"],
            sparse=values["sparse"],
            unique_share=values["unique_share"],
        )
        network = _network(values)
        memory = values["memory"]
        if memory is not None and not memory > 0:
            refuse("memory", "greater than 0", memory)
        memory = None if memory is None else memory * GIB
        return _report(setup, network, memory, values["strategy"], values["shard_logits"])
    except ValueError as e:
        raise WrongUsageError(str(e)) from e


def _table(values: Mapping[str, Any]) -> dict[str, Any]:
    """The table, from the config of a model where there is one; options go before it."""
    config = {} if values["hf_config"] is None else _read_config(Path(values["hf_config"]))
    given = {name: values[name] for name in ("vocab_size", "embed_dim", "tied", "dtype")}
    table = config | {name: value for name, value in given.items() if value is not None}
    if not values["head"]:
        table["tied"] = bool(given["tied"])
    options = {"vocab_size": "--vocab-size", "embed_dim": "--embed-dim"}
    if config:  # What does not say so may be either: it depends on the class of the model.
        options["tied"] = "--tied or --no-tied"
    missing = [option for name, option in options.items() if name not in table]
    if missing:
        raise WrongUsageError(f"{' and '.join(missing)} must be given.")
    if table.get("dtype", "bf16") not in ITEM_BYTES:
        raise WrongUsageError(
            "The dtype of the config must be float32 or bfloat16, but is "
            f"{table['dtype']!r} instead. Give --dtype, in which it will be trained."
        )
    return table


def _read_config(path: Path) -> dict[str, Any]:
    """What the config of a model of transformers says of its table."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CommandError(f"`{path}` must be JSON, but is not: {e}") from e
    if not isinstance(config, dict):
        raise CommandError(f"`{path}` must hold a JSON object, but does not.")
    text = config.get("text_config")
    merged = config | text if isinstance(text, dict) else config
    width = next((merged[name] for name in _WIDTHS if merged.get(name) is not None), None)
    dtype = merged.get("dtype", merged.get("torch_dtype"))
    found = {
        "vocab_size": merged.get("vocab_size"),
        "embed_dim": width,
        "tied": config.get("tie_word_embeddings", merged.get("tie_word_embeddings")),
        "dtype": None if dtype is None else _DTYPES.get(str(dtype), str(dtype)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _network(values: Mapping[str, Any]) -> Network | None:
    if values["bandwidth"] is None:
        for name in ("latency", "gpus_per_node", "inter_bandwidth", "inter_latency"):
            # Which is 0 where it is left out.
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


def _report(
    setup: Setup, network: Network | None, memory: float | None, strategy: str, shard_logits: bool
) -> Report:
    found = costs(setup)
    wanted = (auto_strategy(setup) if strategy == "auto" else strategy, shard_logits)
    chosen = next((cost for cost in found if (cost.strategy, cost.shard_logits) == wanted), None)
    if chosen is None:
        raise ValueError(
            "`shard_logits` must be false for a head that is not cut over the vocabulary, but is "
            f"true instead, and the strategy is {wanted[0]!r}. "
            + ("Take 'vocab'." if setup.head else "There is no head: leave it out.")
        )
    best, reason = recommend(setup, found, network, memory)
    warnings = list(_warnings(setup, chosen, network, memory))
    data = {
        "setup": asdict(setup),
        "strategies": [as_data(cost, setup, network, memory) for cost in found],
        "chosen": found.index(chosen),
        "recommended": found.index(best),
        "reason": reason,
        "warnings": warnings,
    }
    marks = [
        " ".join(
            mark
            for mark, of in (("auto" if strategy == "auto" else "yours", chosen), ("best", best))
            if of is cost
        )
        for cost in found
    ]
    lines = [*as_lines(setup, found, marks, network), f"best: {name_of(best)}: {reason}"]
    return Report(data, lines, warnings)


def _warnings(
    setup: Setup, chosen: Cost, network: Network | None, memory: float | None
) -> Iterator[str]:
    if memory is not None and chosen.peak > memory:
        need, have = chosen.peak / GIB, memory / GIB
        yield f"{name_of(chosen)} needs {need:.2f} GiB at the peak of a step, but there are {have}."
    if chosen.strategy != "none":
        name = "vocab_size" if chosen.strategy == "vocab" else "embed_dim"
        size = getattr(setup, name)
        holders = -(-size // Partition(size, setup.tp_size).block)
        if holders < setup.tp_size:
            idle = setup.tp_size - holders
            yield f"{idle} of {setup.tp_size} ranks hold nothing of the table."
    if network is None:
        return
    if network.crosses_nodes(setup, "tp"):
        yield (
            f"{setup.tp_size} tensor-parallel ranks are on several nodes of "
            f"{network.gpus_per_node}: what they send waits for the slower links."
        )
    if network.crosses_nodes(setup, "dp") and network.inter_bandwidth is None:
        yield "Links between nodes are taken to be as fast as those inside: --inter-bandwidth."


PLAN = Command(
    "plan",
    help="say what each strategy costs, before there are GPUs",
    description="Says what a table costs each rank by each strategy: memory, bytes, and time.",
    add_arguments=_add_arguments,
    run=_run,
    epilog=_EPILOG,
)
