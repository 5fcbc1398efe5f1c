"""Trainers of TRL that sample or have a reference model: the ranks of a gang must sample the same,
and the head of the reference must be whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.nn import Module

from tp_embed.gang import Gang
from tp_embed.integrations.deepspeed.private import PartitionType, get_tensor_parallel_config
from tp_embed.nn.gang_layer import GangLayer
from tp_embed.nn.head import OutputHead

_COPIES = "it is a statistic of all processes, which counts each completion several times"
# Options of GRPO and RLOO: values that are right with tensor parallelism, and why others are not.
_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_vllm": ((False,), "each rank would send its shards to vLLM as if they were tables"),
    "sync_ref_model": ((False,), "the reference model has whole tables"),
    "scale_rewards": (("group", "none", True, False), _COPIES),
    "multi_objective_aggregation": (("sum_then_normalize",), _COPIES),
    "normalize_advantages": ((False,), _COPIES),
    "top_entropy_quantile": ((1.0,), _COPIES),
}


def gang_of(model: Module) -> Gang | None:
    """Returns the gang of the sharded layers of ``model``, if there are any over several ranks."""
    layers = (module for module in model.modules() if isinstance(module, GangLayer))
    return next((layer.gang for layer in layers if layer.gang.size > 1), None)


def share_random_state(gang: Gang) -> None:
    """Gives all ranks of ``gang`` the random state of its first. TRL seeds each process
    differently, so that data-parallel ranks sample different tokens."""
    device = get_accelerator()
    states: list[Any] = [
        torch.get_rng_state(),
        device.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    ]
    gang.broadcast_objects(states)
    torch.set_rng_state(states[0])
    device.set_rng_state(states[1])
    random.setstate(states[2])
    np.random.set_state(states[3])


def fit_generations(args: Any, gang: Gang) -> None:
    """Fits the arguments of a trainer that samples several completions of each prompt to the
    data-parallel ranks. TRL counts all processes, and compares completions in groups of
    ``num_generations`` rows of all of them, but the ranks of a gang have the same rows.

    :param args: of a Trainer; does nothing unless they are for TRL's GRPO or RLOO.
    :raises ValueError: groups or statistics would hold copies of the same completions, or the
        trainer would read shards as tables.
    """
    if not {"num_generations", "generation_batch_size"} <= vars(args).keys():
        return
    for name, size, count in _groups(args):
        if size % count:
            raise ValueError(
                f"`{name}` must be divisible by the {count} generations of a prompt, since the "
                f"{gang.size} tensor-parallel ranks have the same batches, but is {size} instead. "
                "Change either."
            )
    for name, (allowed, why) in _OPTIONS.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"`{name}` of the Trainer's arguments must be {allowed[0]!r} with tensor "
                f"parallelism, but is {value!r} instead: {why}."
            )
    per_rank = args.per_device_train_batch_size * args.steps_per_generation
    args.generation_batch_size = per_rank * (args.world_size // gang.size)


def _groups(args: Any) -> Iterator[tuple[str, int, int]]:
    """Yields the batches of a process whose rows are compared, and how many are."""
    size = args.per_device_train_batch_size * args.steps_per_generation
    yield "per_device_train_batch_size * steps_per_generation", size, args.num_generations
    if args.do_eval and args.eval_strategy != "no":
        count = args.num_generations_eval or args.num_generations
        yield "per_device_eval_batch_size", args.per_device_eval_batch_size, count


def check_reference(model: Any, args: Any, ds_config: dict[str, Any]) -> None:
    """Checks the config for the reference model that TRL builds later, with the same config.

    :raises ValueError: AutoTP would cut the head of the reference, and TRL would multiply by the
        part of a rank.
    """
    # TRL's DPO and KTO have one, and its GRPO and RLOO with a penalty. With PEFT it is the base.
    is_trl = type(args).__module__.partition(".")[0] == "trl"
    if not is_trl or not getattr(args, "beta", 0.0) or hasattr(model, "peft_config"):
        return
    heads = [name for name, found in model.named_modules() if isinstance(found, OutputHead)]
    config = get_tensor_parallel_config(ds_config)
    partition = config.get_partition_config_object()
    model_type = getattr(model.config, "model_type", None)
    for name in heads:
        spec = partition and partition.find_matching_spec(f"{name}.weight", model_type)
        is_left = partition and (spec is None or spec.partition_type == PartitionType.SKIP)
        if not is_left or getattr(config, "vocab_parallel_lm_head", False):
            raise ValueError(
                "`tensor_parallel` must name the layers to cut, without the output head, for a "
                f"trainer with a reference model, but AutoTP would cut `{name}` of the reference, "
                'and TRL would use the part of a rank. Set `"preset_model"`, such as "llama", or '
                '`"partition_config"`.'
            )
