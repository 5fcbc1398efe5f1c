"""Run by the `deepspeed` launcher on two ranks for test_deepspeed.py: trains small Llamas with and
without the plugin on real engines, and saves the results by case and rank."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import TensorParallel_Layer
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from deepspeed.utils import groups

from llama import DIM, VOCAB, build
from tp_embed import GangError, OutputHead, VocabShardedEmbedding, shard_embeddings
from tp_embed.checkpoint import hook_state_dict
from tp_embed.integrations.deepspeed import DeepSpeedGang

LR, STEPS = 1e-2, 4

CASES: dict[str, dict[str, Any]] = {
    "autotp alone": {"strategy": None, "tied": False},
    "embed": {"strategy": "embed", "tied": False},
    "vocab": {"strategy": "vocab", "tied": False},
    "tied, vocab": {"strategy": "auto", "tied": True},
    "tied, embed": {"strategy": "embed", "tied": True},
    "mpu, embed": {"strategy": "embed", "tied": False, "mpu": True},
    "mpu, tied, vocab": {"strategy": "vocab", "tied": True, "mpu": True},
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (2, 16), generator=generator) for _ in range(STEPS)]


def train_alone(tied: bool) -> dict[str, Any]:
    """Runs the same training in one process of plain torch."""
    model = build(tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    losses, norms = [], []
    for ids in batches():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    moments = optimizer.state[model.get_input_embeddings().weight]
    return {"losses": losses, "norms": norms, "state": model.state_dict(), "moments": moments}


CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


def train(strategy: Any, tied: bool, checkpoint: Path, mpu: bool = False) -> dict[str, Any]:
    """Trains with AutoTP, or with a Megatron-style ``mpu``, where only we cut Parameters."""
    model = build(tied)
    gang = DeepSpeedGang.from_groups(tp_size=2)
    report = shard_embeddings(model, gang, strategy=strategy) if strategy else None
    if mpu:
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG, mpu=megatron_mpu())
    else:
        config = {**CONFIG, "tensor_parallel": {"autotp_size": 2}}
        engine, *_ = deepspeed.initialize(model=model, config=config)
    seen: dict[str, Any] = {"report": str(report), "losses": [], "norms": []}

    table = engine.module.get_input_embeddings()
    seen["is layer"] = isinstance(table, TensorParallel_Layer)
    seen["copy is layer"] = all(
        getattr(copy.deepcopy(table).weight, name, False) == (strategy is not None)
        for name in ("tensor_model_parallel", "ds_is_replaced_module")
    )
    seen["table"] = type(table).__name__, tuple(table.weight.shape)
    # As `_consolidated_16bit_state_dict()` at ZeRO 0 to 2, which requires AutoTP.
    seen["start"] = clone(engine._replace_module_consolidated_state_dict())

    for ids in batches():
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        seen["losses"].append(loss.item())
        seen["norms"].append(float(engine.get_global_grad_norm()))
    seen["state"] = clone(engine._replace_module_consolidated_state_dict())
    with hook_state_dict(engine.module):
        state = engine.module.state_dict()
    seen["hooked table"] = state["model.embed_tokens.weight"].clone()
    seen["table after gathering"] = tuple(table.weight.shape)
    seen["from engine"] = DeepSpeedGang.from_engine(engine).global_ranks
    engine.save_checkpoint(str(checkpoint), tag="end")
    return seen


def megatron_mpu() -> SimpleNamespace:
    names = [
        f"get_{kind}_parallel_{what}"
        for kind in ("model", "data")
        for what in ("group", "rank", "world_size")
    ]
    return SimpleNamespace(**{name: getattr(groups, name) for name in names})


def clone(state: Any) -> Any:
    return state and {name: tensor.clone() for name, tensor in state.items()}


def fused_losses() -> list[list[torch.Tensor]]:
    """Returns the losses of our head and DeepSpeed's, each with the gradients of its inputs."""
    torch.manual_seed(0)
    gang = DeepSpeedGang.from_groups(tp_size=2)
    embed = VocabShardedEmbedding(gang, VOCAB, DIM)
    target = torch.randint(VOCAB, (64,))
    target[:5] = -100
    hidden = torch.randn(64, DIM)
    results = []
    for by_us in (True, False):
        embed.zero_grad()
        x = hidden.clone().requires_grad_()
        if by_us:
            loss = OutputHead(embed).loss(x, target)
        else:
            loss = vocab_parallel_linear_cross_entropy(
                x,
                embed.weight.to_local(),  # type: ignore[attr-defined]
                target,
                tp_group=gang.as_process_group(),
                vocab_start_index=embed.rows.start,
                vocab_end_index=embed.rows.stop,
                chunk_size=16,
            )
        loss.backward()
        results.append([loss.detach(), x.grad, embed.weight.grad])
    return results


def gangs() -> dict[str, Any]:
    """Returns gangs made in all ways, and their errors."""
    group = groups.get_tensor_model_parallel_group()
    own = SimpleNamespace(get_tensor_model_parallel_group=lambda: group)
    old = SimpleNamespace(get_model_parallel_group=lambda: group)
    return {
        "mpu": repr(DeepSpeedGang.from_mpu(own)),
        "old mpu": repr(DeepSpeedGang.from_mpu(old)),
        "no mpu": error(lambda: DeepSpeedGang.from_mpu(object())),
        "no tp": error(lambda: DeepSpeedGang.from_engine(SimpleNamespace(mpu=None))),
        "not a divisor": error(lambda: DeepSpeedGang.from_groups(tp_size=3)),
        "other size": error(lambda: DeepSpeedGang.from_groups(tp_size=1)),
    }


def error(call: Any) -> str:
    try:
        call()
    except (GangError, TypeError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen: dict[str, Any] = {"too early": error(DeepSpeedGang.from_groups)}
    for name, case in CASES.items():
        seen[name] = train(**case, checkpoint=out / name)
    seen["gangs"] = gangs()
    seen["fused losses"] = fused_losses()
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
