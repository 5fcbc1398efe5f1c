"""Refuses what DeepSpeed would silently get wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch.nn import Module

from tp_embed.gang import Gang
from tp_embed.gang.agreement import of_all_ranks
from tp_embed.nn.head import ShardedLayer
from tp_embed.parameter.optimizers import needs_matrix, refuse
from tp_embed.parameter.sharded import ShardedParameter
from tp_embed.partition import Partition
from tp_embed.surgery.strategies import Choices

from .private import (
    PartitionType,
    TensorParallel_Layer,
    get_gradient_clipping,
    get_tensor_parallel_config,
    is_autotp_training_mode,
    layer_specs_of,
)

PIPELINE = (
    "The tables of a `PipelineModule` must be sharded by its specs, since it would go on calling "
    "the old ones. Use `LayerSpec(VocabShardedEmbedding, gang, ...)` or, tied to the head, "
    "`TiedLayerSpec('embed', VocabShardedEmbedding, gang, ...)`."
)


def _is_on(value: Any) -> bool:
    return bool(value.get("enabled", False)) if isinstance(value, Mapping) else bool(value)


def _above_1(value: Any) -> bool:
    return isinstance(value, int) and value > 1


@dataclass(frozen=True)
class _Option:
    """Refuses values of ``key``, a dotted path in the DeepSpeed config, with tensor parallelism if
    ``is_wrong`` says so. The other fields complete the error message."""

    key: str
    is_wrong: Callable[[Any], bool]
    expected: str
    reason: str
    fix: str

    def check(self, config: Mapping[str, Any]) -> None:
        value: Any = config
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and self.is_wrong(value):
            raise ValueError(
                f"`{self.key}` must be {self.expected} with tensor parallelism, but is {value!r} "
                f"instead: {self.reason}. {self.fix}."
            )


# From the source of DeepSpeed 0.19.8; tests cover the options that run on the CPU.
_OPTIONS = (
    _Option(
        "checkpoint.use_node_local_storage",
        _is_on,
        "false",
        "DeepSpeed would save the model states of the first rank of each node only",
        "Set it to false and save to a directory that all nodes share, or to one on each node, and "
        "join these before loading",
    ),
    _Option(
        "zero_optimization.zero_hpz_partition_size",
        _above_1,
        "1",
        "hpZ keeps its second copies over neighbouring ranks, which are the tensor-parallel ones, "
        "and would mix their shards",
        "Set it to 1, or leave it out",
    ),
    _Option(
        "zero_optimization.zero_quantized_gradients",
        _is_on,
        "false",
        "qgZ reduces gradients over all ranks of a node and over nodes, and would sum gradients of "
        "different shards",
        "Set it to false; `zero_quantized_weights` gathers over data-parallel ranks and may stay",
    ),
    _Option(
        "zero_optimization.zenflow",
        lambda value: True,
        "left out",
        "ZenFlow picks the columns that it updates at once by their gradient norms, and would pick "
        "different columns for each shard",
        "Leave it out; `offload_optimizer` without it works",
    ),
    _Option(
        "sequence_parallel_size",
        _above_1,
        "1",
        "DeepSpeed makes groups for sequence parallelism of neighbouring ranks, which are the "
        "tensor-parallel ones, and averages gradients over others",
        'Leave it out, with `data_parallel_size`; `"output": "sequence"` of `tp_embed` gives each '
        "tensor-parallel rank its positions",
    ),
    _Option(
        "compile.passes",
        lambda value: "autosp" in value,
        "without 'autosp'",
        "AutoSP cuts sequences over neighbouring ranks, which are the tensor-parallel ones",
        "Take it out",
    ),
    _Option(
        "hybrid_engine",
        _is_on,
        "left out",
        "the hybrid engine passes weights to inference kernels, which would take a shard for the "
        "whole table",
        "Leave it out, and generate with the engine itself",
    ),
)


def check_config(config: Mapping[str, Any]) -> None:
    """Checks a DeepSpeed config for an engine with tensor parallelism. ``initialize()`` calls it.

    :raises ValueError: with this config, DeepSpeed would silently train wrongly or save only a part
        of the model.
    """
    stage = _stage(config)
    for name in ("bf16", "fp16"):
        # "auto" is for transformers to fill in.
        if stage == 0 and (config.get(name) or {}).get("enabled", False) is True:
            raise ValueError(
                f"`zero_optimization.stage` must be 1, 2 or 3 for `{name}` with tensor "
                "parallelism, but is 0 instead: there DeepSpeed's norm of the gradients leaves out "
                "shards, and clips by a wrong norm. Set it to 1."
            )
    for option in _OPTIONS:
        option.check(config)


def check_clipping(config: Mapping[str, Any]) -> None:
    """Checks a DeepSpeed config for an engine with pipeline stages.

    :raises ValueError: DeepSpeed would clip gradients by a wrong norm.
    """
    stage = _stage(config)
    is_fp32 = not any((config.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16"))
    if stage == 0 and is_fp32 and get_gradient_clipping(config) > 0.0:
        raise ValueError(
            "`zero_optimization.stage` must be 1 for clipping with pipeline stages, but is 0 "
            "instead: there DeepSpeed's norm of fp32 gradients leaves out Parameters of later "
            "stages. Set it to 1, or `gradient_clipping`, which is 1.0 by default, to 0."
        )


def check_sparse(config: Mapping[str, Any]) -> None:
    """
    :raises ValueError: DeepSpeed's optimizer takes no sparse gradients, or clips only dense ones.
    """
    stage = _stage(config)
    if stage > 0:
        raise ValueError(
            "`zero_optimization.stage` must be 0 for sparse gradients, which ZeRO cannot keep in "
            f"its flat buffers, but is {stage} instead. Set it to 0, or `tp_embed.sparse` to "
            "false."
        )
    clipping: Any = get_gradient_clipping(config)
    if clipping == "auto" or clipping > 0.0:
        raise ValueError(
            "`gradient_clipping`, which is 1.0 by default, must be 0 for sparse gradients, but is "
            f"{clipping!r} instead: DeepSpeed counts them in the norm, and scales only the dense "
            "ones. Set it to 0, or `tp_embed.sparse` to false."
        )


def check_reuse_grad(config: Mapping[str, Any], dp_size: int) -> None:
    """
    :param dp_size: the number of data-parallel ranks.
    :raises ValueError: DeepSpeed would write to gradients without bumping their version, so their
        memory could not be reused safely.
    """
    stage = _stage(config)
    if stage == 0 and dp_size > 1:
        raise ValueError(
            "`zero_optimization.stage` must be 1, 2 or 3 for `reuse_grad` with data-parallel "
            "ranks, but is 0 instead: there DeepSpeed writes rows of other ranks to a gradient "
            "through `.data`, which torch does not count, and the next gradient would keep them. "
            "Set it to 1, or `tp_embed.reuse_grad` to false."
        )


def check_tied_stages(model: PipelineModule) -> None:
    """
    :raises ValueError: as :func:`check_reuse_grad`, for pipeline stages that share a table.
    """
    tied = [spec.key for spec in layer_specs_of(model) if isinstance(spec, TiedLayerSpec)]
    if tied and model.num_stages > 1:
        raise ValueError(
            f"`reuse_grad` must be False for the tables of pipeline stages with tied layers, "
            f"{sorted(set(tied))}, but is True instead: DeepSpeed all-reduces their gradients in "
            "place, which torch does not count, and the next gradient would keep rows of this one."
        )


def check_model(model: Module) -> None:
    """Checks a model before its tables are sharded.

    :raises ValueError: AutoTP has already processed the model, its layers were built for
        inference, or the model would keep calling its old tables.
    """
    if isinstance(model, PipelineModule):
        raise ValueError(PIPELINE)
    if getattr(model, "ds_autotp_parsed", False):
        raise ValueError(
            "`model` must not have been processed by AutoTP, which may have sliced its tables, but "
            "it was. Shard the tables before `deepspeed.initialize()`."
        )
    theirs = [
        name
        for name, module in model.named_modules()
        if isinstance(module, TensorParallel_Layer) and not isinstance(module, ShardedLayer)
    ]
    if theirs and not is_autotp_training_mode():
        raise ValueError(
            f"AutoTP's mode must be TRAINING, but is INFERENCE instead, which builds its layers, "
            f"such as '{theirs[0]}', without gradients. Call "
            "`deepspeed.set_autotp_mode(training=True)` before they are built."
        )


def check_optimizer_type(config: Mapping[str, Any], choices: Choices) -> None:
    """Checks the optimizer in the DeepSpeed config against the sharded tables.

    :raises ValueError: the optimizer needs whole matrices, as LAMB, Muon and Adafactor do.
    """
    name = str((config.get("optimizer") or {}).get("type"))
    for group, chosen in choices:
        # DeepSpeed's Muon leaves Parameters with these names to Adam.
        left_to_adam = any(part in group.names[0].lower() for part in ("embed", "lm_head"))
        is_fit = not needs_matrix(name) or (name.lower() == "muon" and left_to_adam)
        if chosen != "none" and not is_fit:
            raise refuse(name, f"the table '{group.names[0]}'")


def check_made_optimizer(engine: Any) -> None:
    """Checks the optimizer that the user's function built for an engine.

    :raises ValueError: as :func:`check_optimizer_type`.
    """
    made = engine.basic_optimizer
    for name, parameter in engine.module.named_parameters():
        if isinstance(parameter, ShardedParameter) and needs_matrix(made):
            raise refuse(type(made).__name__, f"the table '{name}'")


def check_sub_groups(engine: Any) -> None:
    """Checks the sub-groups of ZeRO 3. DeepSpeed sums one norm per sub-group over the
    tensor-parallel ranks. All ranks must call it; the ranks of a gang gather two numbers.

    :raises ValueError: shards differ in size, so some ranks have more sub-groups than others and
        would wait forever.
    """
    layers = (layer for layer in engine.module.modules() if isinstance(layer, ShardedLayer))
    gang = next((layer.gang for layer in layers), None)
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if gang is None or groups is None or engine.zero_optimization_stage() != 3:
        return
    items = sum(parameter.partition_numel() for group in groups for parameter in group)
    counts, all_items = zip(*of_all_ranks(gang, [len(groups), items]), strict=True)
    if len(set(counts)) > 1:
        raise ValueError(
            "`zero_optimization.sub_group_size` must make the same number of sub-groups on each "
            f"tensor-parallel rank, but is {engine.zero_sub_group_size()} and makes "
            f"{list(counts)} instead, since shards differ in size: DeepSpeed would wait forever "
            f"for the norms of the missing ones. Set it to {max(all_items)} or more, which makes "
            "one, or try another size."
        )


def check_empty_shards(
    model: Module, gang: Gang, config: Mapping[str, Any], choices: Choices
) -> None:
    """Checks that each rank of ``gang`` holds a part of each table at ZeRO 3. Decides by sizes
    alone: either all ranks raise, or none.

    :raises ValueError: a rank would hold an empty shard. DeepSpeed fails on that rank in the first
        forward, and the other ranks wait.
    """
    if _stage(config) != 3 or gang.size == 1:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, ShardedLayer) and 0 in layer.partition.sizes:
            raise _empty_shard(name, layer.partition, layer.shard_dim, "Shard it over fewer ranks")
    for group, chosen in choices:
        if chosen == "none":
            continue
        shape = gang.whole_shape(group.weight)
        cuts = {"vocab": Partition(shape[0], gang.size), "embed": Partition(shape[-1], gang.size)}
        if 0 in cuts[chosen].sizes:
            name = group.names[0]
            fix = f'Leave it whole, `"tp_embed": {{"rules": {{"{name}": "none"}}}}`'
            fitting = [strategy for strategy, cut in cuts.items() if 0 not in cut.sizes]
            if group.embeddings and fitting:
                fix += f", or shard it with {fitting[0]!r}"
            raise _empty_shard(name, cuts[chosen], int(chosen == "embed"), fix)


def _empty_shard(name: str, partition: Partition, dim: int, fix: str) -> ValueError:
    items = ("row", "column")[dim]
    return ValueError(
        f"The table '{name}' must have a {items} on each of {partition.num_shards} tensor-parallel "
        f"ranks at ZeRO 3, but its shards have {list(partition.sizes)} {items}s instead: DeepSpeed "
        f"cannot gather an empty one. {fix}."
    )


def check_choices(
    model: Module, config: Mapping[str, Any], choices: Choices, per_head: Collection[str] = ()
) -> None:
    """Checks the chosen strategies against the options of AutoTP.

    :param per_head: the names of tables that AutoTP cuts over the attention heads.
    :raises ValueError: AutoTP would shard an output head too; a ``partition_config`` matches a
        table that stays whole, which AutoTP would slice without gathering; or a rule shards one of
        ``per_head``, whose columns belong to the heads.
    """
    for group, chosen in choices:
        for name in group.names if chosen != "none" else []:
            if name in per_head:
                raise ValueError(
                    f"The strategy for '{name}' must be 'none', but is {chosen!r} instead: AutoTP "
                    "cuts its columns with the attention heads, but each rank would get all "
                    "columns. Leave it out of `tp_embed.rules`."
                )
    tensor_parallel = get_tensor_parallel_config(config)
    heads = [group.names[0] for group, chosen in choices if group.heads and chosen != "none"]
    if heads and tensor_parallel.vocab_parallel_lm_head:
        raise ValueError(
            "`tensor_parallel.vocab_parallel_lm_head` must not be true where `tp_embed` shards the "
            f"output head of {heads}. Set `tp_embed.shard_logits` to true instead, or "
            "`tp_embed.tie_head` and `tp_embed.shard_head` to false."
        )
    partition = tensor_parallel.get_partition_config_object()
    if partition is None:
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for group, chosen in choices:
        left = group.names if group.embeddings and chosen == "none" else []
        for name in [name for name in left if name not in per_head]:
            spec = partition.find_matching_spec(f"{name}.weight", model_type)
            if spec is not None and spec.partition_type != PartitionType.SKIP:
                raise ValueError(
                    f"The table '{name}' must not match `tensor_parallel.partition_config` if it "
                    f"is left whole, but matches {spec.patterns}: AutoTP would slice it and "
                    "gather nothing. Let `tp_embed` shard it, or give it "
                    '`"partition_type": "skip"`.'
                )


def _stage(config: Mapping[str, Any]) -> int:
    stage: int = (config.get("zero_optimization") or {}).get("stage", 0)
    return stage
