"""Trains small Llamas on engines of all kinds, and compares each with plain torch in one process.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/engine_parity.py --markdown docs/parity.md

Two ranks are one gang; four are two gangs with different batches. Gradients are accumulated over
two micro-batches and clipped. Fails if a difference is larger than its tolerance.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tp_embed.integrations.deepspeed import DeepSpeedGang, export, initialize

VOCAB, DIM, TP = 101, 36, 2  # 101 rows do not divide by two ranks.
STEPS, MICRO_BATCHES, CLIP = 3, 2, 0.5
# With the default `eps`, Adam takes full-size steps even if gradients are only rounding errors.
ADAM: Any = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-3}

# The largest difference of losses, norms and Parameters, relative to the largest value. AutoTP and
# sharded heads sum in another order than one process. A table alone is bitwise equal, except at
# ZeRO 3, which differs as much with whole tables.
TOLERANCES = {
    "fp32": (5e-7, 1e-6, 5e-6),
    "bf16": (2e-4, 4e-3, 1e-1),
    "table only": (0.0, 5e-7, 0.0),
    "table only, ZeRO 3": (0.0, 5e-7, 5e-6),
}

LAYER_SPECS: Any = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.(o_proj|down_proj)\.weight$"], "partition_type": "row"},
        {
            "patterns": [r".*\.([qkv]|gate|up)_proj\.weight$", r".*embed_tokens\.weight$"],
            "partition_type": "column",
        },
    ],
}


@dataclass(frozen=True)
class Case:
    """An engine: ``by`` says who cuts the rest of the model, AutoTP by the plan of transformers, by
    a ``partition_config`` that matches the table too, or by a preset, or nobody (``mpu``).
    ``table_only`` leaves an untied head whole too, and clips nothing."""

    stage: int
    strategy: str
    tied: bool
    dtype: str
    by: str = "plan"
    shard_logits: bool = False
    checkpointing: bool = False
    table_only: bool = False

    @property
    def tolerances(self) -> tuple[float, float, float]:
        if not self.table_only:
            return TOLERANCES[self.dtype]
        return TOLERANCES["table only, ZeRO 3" if self.stage == 3 else "table only"]

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in asdict(self).items())


def all_cases() -> list[Case]:
    cases = [
        Case(stage, strategy, tied, dtype, by, shard_logits=strategy == "vocab" and by == "mpu")
        for stage, strategy, tied, dtype, by in itertools.product(
            range(4), ("embed", "vocab"), (False, True), ("fp32", "bf16"), ("plan", "mpu")
        )
        if (stage, dtype) != (0, "bf16")  # Refused: DeepSpeed's norm is wrong.
    ]
    for by in ("partition_config", "preset"):
        cases += [Case(1, "embed", False, "fp32", by), Case(2, "auto", True, "fp32", by)]
    cases += [Case(stage, "auto", True, "fp32", "plan", True, True) for stage in (1, 3)]
    for strategy in ("embed", "vocab"):
        cases += [
            Case(stage, strategy, False, "fp32", "mpu", table_only=True) for stage in range(4)
        ]
    return cases


def few_cases() -> list[Case]:
    """Returns one case for each stage."""
    return [
        Case(0, "embed", False, "fp32", "plan"),
        Case(1, "vocab", True, "fp32", "mpu", shard_logits=True),
        Case(2, "auto", True, "bf16", "plan"),
        Case(3, "vocab", False, "fp32", "plan"),
        Case(3, "embed", True, "fp32", "mpu"),
    ]


@dataclass(frozen=True)
class Run:
    """Results of a training: losses by step, gradient norms, and Parameters."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def build(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def batches(dp_rank: int) -> list[list[Tensor]]:
    """Returns the micro-batches of each step."""
    generator = torch.Generator().manual_seed(dp_rank)
    shape = STEPS, MICRO_BATCHES, 2, 16
    steps = torch.randint(VOCAB, shape, generator=generator)
    return [list(step) for step in steps]


@cache
def train_alone(tied: bool, dtype: str, clip: float, dp_size: int) -> Run:
    """Trains on all batches with plain torch in this process. bf16 has fp32 master weights."""
    model = build(tied)
    if dtype == "bf16":
        model = model.bfloat16()
    masters = copy.deepcopy(model).float()
    pairs = list(zip(model.parameters(), masters.parameters(), strict=True))
    optimizer = torch.optim.AdamW(masters.parameters(), **ADAM)
    losses, norms = [], []
    for step in zip(*map(batches, range(dp_size)), strict=True):
        micro_batches = [ids for rank in step for ids in rank]
        model.zero_grad()
        total = 0.0
        for ids in micro_batches:
            loss = model(input_ids=ids, labels=ids).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        for parameter, master in pairs:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), clip)))
        optimizer.step()
        with torch.no_grad():
            for parameter, master in pairs:
                parameter.copy_(master)
        losses.append(total)
    return Run(losses, norms, {name: p.detach() for name, p in masters.named_parameters()})


def config_of(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0 if case.table_only else CLIP,
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage},
        "bf16": {"enabled": case.dtype == "bf16"},
        "tp_embed": {
            "strategy": case.strategy,
            "shard_logits": case.shard_logits,
            "shard_head": not case.table_only,
        },
    }
    if case.by != "mpu":
        config["tensor_parallel"] = {"autotp_size": TP}
    if case.by == "partition_config":
        config["tensor_parallel"]["partition_config"] = LAYER_SPECS
    if case.by == "preset":
        config["tensor_parallel"]["preset_model"] = "llama"
    return config


def train(case: Case) -> Run:
    model = build(case.tied)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    DeepSpeedGang.from_groups(tp_size=TP)
    # DeepSpeed treats its own groups as any `mpu`.
    mpu = groups if case.by == "mpu" else None
    engine, *_ = initialize(model=model, config=config_of(case), mpu=mpu)
    losses, norms = [], []
    for micro_batches in batches(groups.get_data_parallel_rank()):
        total = torch.zeros(())
        for ids in micro_batches:
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / MICRO_BATCHES
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        norm = engine.get_global_grad_norm()
        if norm is not None:  # At ZeRO 0, fp32, the engine clips but does not say by what.
            norms.append(float(norm))
    with tempfile.TemporaryDirectory() as directory:
        export(engine, f"{directory}/model", dtype=torch.float32)
        parameters = load_file(f"{directory}/model/model.safetensors") if is_first() else {}
    engine.destroy()
    return Run(losses, norms, parameters)


def is_first() -> bool:
    return dist.get_rank() == 0


def difference(found: Any, expected: Any) -> float:
    """Returns the largest difference, relative to the largest value."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max())


def compare(case: Case) -> dict[str, Any]:
    run = train(case)
    clip = math.inf if case.table_only else CLIP
    alone = train_alone(case.tied, case.dtype, clip, dist.get_world_size() // TP)
    gc.collect()
    row: dict[str, Any] = {
        **asdict(case),
        "losses": difference(run.losses, alone.losses),
        "norms": difference(run.norms, alone.norms) if run.norms else None,
        "parameters": 0.0,
    }
    if is_first():
        missing = set(run.parameters) ^ set(alone.parameters)
        assert not missing, missing
        row["parameters"] = max(
            difference(run.parameters[name], alone.parameters[name]) for name in run.parameters
        )
    row["ok"] = all(
        (row[name] or 0.0) <= tolerance
        for name, tolerance in zip(("losses", "norms", "parameters"), case.tolerances, strict=True)
    )
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as a page."""
    script = "benchmarks/engine_parity.py --markdown docs/parity.md"
    lines = [
        "# Parity with one process",
        "",
        f"Made by `deepspeed --num_gpus {dist.get_world_size()} --no_local_rank {script}` on the "
        f"CPU with gloo: Llamas of two layers, V = {VOCAB}, E = {DIM}, TP {TP}, {STEPS} steps of "
        f"AdamW, gradients accumulated over {MICRO_BATCHES} micro-batches and clipped to {CLIP}, "
        "against one process of plain torch. Given are the largest differences of the losses, of "
        "the norms of the gradients (ZeRO 0 does not report them) and of the Parameters after the "
        "last step, relative to the largest value of each. `by` says who cuts the other layers: "
        "AutoTP by the plan of transformers, by a `partition_config` that names the table too, or "
        "by the preset, or nobody (`mpu`).",
        "",
        "| ZeRO | strategy | tied | dtype | by | sharded loss | losses | norms | Parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        yes_no = {True: "yes", False: "no"}
        by = row["by"] + (", activation checkpointing" if row["checkpointing"] else "")
        norms = "-" if row["norms"] is None else f"{row['norms']:.1e}"
        by += ", table only, no clipping" if row["table_only"] else ""
        lines.append(
            f"| {row['stage']} | {row['strategy']} | {yes_no[row['tied']]} | {row['dtype']} "
            f"| {by} | {yes_no[row['shard_logits']]} | {row['losses']:.1e} "
            f"| {norms} | {row['parameters']:.1e} |"
        )
    lines += ["", "Tolerances of losses, norms and Parameters:", ""]
    lines += [f"- {name}: {', '.join(f'{t:.0e}' for t in ts)}" for name, ts in TOLERANCES.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true", help="one case per stage")
    parser.add_argument("--json", type=Path, help="write the rows")
    parser.add_argument("--markdown", type=Path, help="write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rows = []
    for case in few_cases() if arguments.few else all_cases():
        rows.append(compare(case))
        if is_first():
            print(case, {name: rows[-1][name] for name in ("losses", "norms", "parameters", "ok")})
    if is_first():
        if arguments.json:
            arguments.json.write_text(json.dumps(rows))
        if arguments.markdown:
            arguments.markdown.write_text(markdown(rows))
        failed = [row for row in rows if not row["ok"]]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(rows)} are out of tolerance: {failed}")


if __name__ == "__main__":
    main()
