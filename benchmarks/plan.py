"""Compares the predictions of `tp-embed plan` with engines and layers.

    deepspeed --num_gpus 4 --no_local_rank benchmarks/plan.py

For each case, trains a table and its head, with nothing between them, on an engine (TP 2 x DP 2),
and prints the bytes it holds after a backward and the bytes its data-parallel ranks put into
collectives. Then times the collectives of each strategy (TP 4), using latencies and bandwidths
measured for each collective alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tp_embed import ProcessGroupGang, shard_embeddings
from tp_embed.integrations.deepspeed import initialize
from tp_embed.nn.loss import cross_entropy
from tp_embed.plan import Cost, Network, Setup, Strategy, cost, costs
from tp_embed.plan.lookups import auto_dedup
from tp_embed.plan.report import name_of
from tp_embed.plan.tokens import distinct
from tp_embed.plan.traffic import Operation, Transfer

RANKS: dict[str, Any] = {
    "tp_size": 2,
    "dp_size": 2,
    "tokens": 300,  # All distinct, and all of the first shard.
    "unique_share": 1.0,
    "owner_share": 1.0,
    "device": "cpu",
}
EVEN: dict[str, Any] = {"vocab_size": 1200, "embed_dim": 64, **RANKS}
UNEVEN: dict[str, Any] = {"vocab_size": 1201, "embed_dim": 63, **RANKS}
FP32: dict[str, Any] = {"dtype": "fp32"}
SUMS: dict[str, Any] = {"grad_dtype": "fp32"}
CASES: list[tuple[Setup, Strategy]] = [
    (Setup(**EVEN, **FP32, zero_stage=0), "none"),
    (Setup(**EVEN, **FP32, zero_stage=0, tied=True, optimizer="momentum"), "embed"),
    (Setup(**EVEN, **FP32, zero_stage=0, optimizer="sgd", sparse=True), "vocab"),
    (Setup(**EVEN, **FP32, zero_stage=1, accumulation_steps=2), "embed"),
    (Setup(**EVEN, **SUMS, zero_stage=1, tied=True), "vocab"),
    (Setup(**UNEVEN, zero_stage=1, accumulation_steps=2), "none"),
    (Setup(**EVEN, zero_stage=2, accumulation_steps=2), "vocab"),
    (Setup(**EVEN, **FP32, zero_stage=2, tied=True), "embed"),
    (Setup(**UNEVEN, **SUMS, zero_stage=2), "embed"),
    (Setup(**EVEN, **FP32, zero_stage=3, optimizer="momentum"), "none"),
    (Setup(**EVEN, **SUMS, zero_stage=3, accumulation_steps=2), "embed"),
    (Setup(**UNEVEN, zero_stage=3, tied=True), "vocab"),
]
SMALL = 2048  # Smaller tensors are no tables: scalars, a bucket, padding.


class Model(nn.Module):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.embed = nn.Embedding(setup.vocab_size, setup.embed_dim, sparse=setup.sparse)
        self.head = nn.Linear(setup.embed_dim, setup.vocab_size, bias=False)
        if setup.tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.embed(ids)).float(), ids)


def config(setup: Setup, strategy: Strategy) -> dict[str, Any]:
    """Returns the config of DeepSpeed and tp_embed."""
    optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}
    if setup.optimizer in ("sgd", "momentum"):
        momentum = 0.9 if setup.optimizer == "momentum" else 0.0
        optimizer = {"type": "SGD", "params": {"lr": 0.1, "momentum": momentum}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setup.accumulation_steps,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": setup.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": setup.grad_dtype},
        "optimizer": optimizer,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": setup.zero_stage,
            "reduce_bucket_size": 100,
            "stage3_param_persistence_threshold": 0,
            # Release unused Parameters, as in a model with many layers.
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "tensor_parallel": {
            "autotp_size": setup.tp_size,
            "partition_config": {  # AutoTP itself changes nothing.
                "use_default_specs": False,
                "layer_specs": [{"patterns": ["^$"], "partition_type": "skip"}],
            },
        },
        "tp_embed": {"strategy": strategy, "check_ids": False},
    }


def measure_engine(setup: Setup, strategy: Strategy) -> dict[str, Any]:
    """Measures the bytes a rank holds, and the bytes it puts into DeepSpeed's collectives."""
    ids = torch.arange(setup.tokens)
    before = tensors()
    known = storages(before)
    torch.manual_seed(0)
    engine, *_ = initialize(model=Model(setup), config=config(setup, strategy))
    held: list[int] = []
    for _ in range(2):  # The first step creates the moments.
        with collectives_of_deepspeed() as sent:
            for _ in range(setup.accumulation_steps):
                engine.backward(engine(ids))
                now = storages(tensors())
                held.append(sum(n for address, n in now.items() if address not in known))
                engine.step()
    inner = engine.optimizer if setup.zero_stage == 0 else engine.optimizer.optimizer
    values = [value for state in inner.state.values() for value in state.values()]
    moments = [value for value in values if isinstance(value, Tensor) and value.ndim]
    engine.destroy()
    return {
        "setup": asdict(setup),
        "strategy": strategy,
        "held": max(held),
        "moments": sum(value.nbytes for value in moments),
        "sent": dict(sent),
    }


def tensors() -> list[Tensor]:
    """Returns all tensors, and gradients of Parameters, which may have no Python object yet."""
    time.sleep(0.1)  # Gloo's threads release tensors shortly after a collective returns.
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some objects warn on access.
        found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
        return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def storages(found: Sequence[Tensor]) -> dict[int, int]:
    """Maps addresses of the tensors' storages to their sizes."""
    sizes: dict[int, int] = {}
    for tensor in found:
        if tensor.is_sparse:
            sizes |= storages([tensor._indices(), tensor._values()])
        elif tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= SMALL:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sizes


@contextmanager
def collectives_of_deepspeed() -> Iterator[dict[str, int]]:
    """Counts the bytes that this rank puts into collectives, by operation."""
    payloads: dict[str, int] = defaultdict(int)
    backend = type(deepspeed.comm.comm.cdb)
    names = {
        "all_reduce": "all_reduce",
        "all_gather": "all_gather",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
    }
    originals = {name: getattr(backend, name) for name in names}

    def counting(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            *_, payload = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            if payload.numel() > 1:  # Skips norms and other scalars.
                payloads[names[name]] += payload.nbytes
            return originals[name](self, *args, **kwargs)

        return call

    for name in names:
        setattr(backend, name, counting(name))
    try:
        yield payloads
    finally:
        for name, original in originals.items():
            setattr(backend, name, original)


def plan(setup: Setup, strategy: Strategy) -> Cost:
    """Plans a case, with the de-duplication that layers choose."""
    return cost(setup, strategy, dedup=auto_dedup(setup, strategy))


def payloads(planned: Cost) -> dict[str, int]:
    """Returns the planned bytes a rank puts into collectives of its data-parallel group."""
    found: dict[str, int] = defaultdict(int)
    for transfer in planned.transfers:
        if transfer.over == "dp":
            found[transfer.operation] += transfer.count * transfer.payload
    return dict(found)


class Stopwatch:
    """Sums the time in collectives of a gang."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def __call__(self, operation: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        dist.barrier()  # Excludes waiting for another rank's computation.
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def measure_networks(gang: ProcessGroupGang, runs: int) -> dict[Operation, Network]:
    """Fits a network to each collective's times on the slowest rank, with 4 KiB to 16 MiB."""
    networks: dict[Operation, Network] = {}
    for operation in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all"):
        transfers, seconds = [], []
        for nbytes in (1 << 12, 1 << 20, 1 << 24):
            whole = torch.zeros(gang.size, nbytes // 4 // gang.size)
            other, piece = torch.zeros_like(whole), whole[0].clone()
            calls: dict[Operation, tuple[int, Callable[[], None]]] = {
                "all_gather": (piece.nbytes, partial(gang.all_gather, whole, piece)),
                "all_reduce": (whole.nbytes, partial(gang.all_reduce, whole)),
                "reduce_scatter": (whole.nbytes, partial(gang.reduce_scatter, piece, whole)),
                "all_to_all": (whole[1:].nbytes, partial(gang.all_to_all, other, whole)),
            }
            payload, call = calls[operation]
            transfers.append(Transfer("", "forward", operation, "tp", gang.size, payload))
            seconds.append(time_call(call, runs))
        took = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        networks[operation] = fit(transfers, took)
    return networks


def time_call(call: Callable[[], None], runs: int) -> float:
    times = []
    for _ in range(runs):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def fit(transfers: Sequence[Transfer], seconds: Tensor) -> Network:
    """Fits a network to the ``seconds`` of transfers, by least squares of relative errors."""
    counts = torch.tensor([[t.messages, t.sent] for t in transfers], dtype=torch.float64)
    rows = counts / seconds[:, None]
    latency, per_byte = torch.linalg.lstsq(rows, torch.ones_like(rows)).solution[:, 0].tolist()
    if latency < 0:  # Caches make small messages faster than any link.
        latency, per_byte = 0.0, float(rows[:, 1].sum() / rows[:, 1].square().sum())
    return Network(1 / per_byte, latency)


def ids_of(setup: Setup) -> Tensor:
    """Returns ids from all over the table, with as many distinct ones as planned for."""
    count = distinct(setup)
    rows = torch.linspace(0, setup.vocab_size - 1, count).long()
    return rows[torch.arange(setup.tokens) % count]


def measure_time(gang: ProcessGroupGang, setup: Setup, planned: Cost, runs: int) -> float:
    """Returns the seconds in collectives of a forward and a backward."""
    torch.manual_seed(0)
    model = Model(setup)
    shard_embeddings(model, gang, strategy=planned.strategy)
    head: Any = model.head
    if planned.shard_logits:
        head.output = "shard"
    if planned.strategy != "none":
        embed: Any = model.embed
        embed.dedup = planned.dedup
    ids, found = ids_of(setup), []
    for _ in range(runs):
        watch = Stopwatch()
        handle = gang.register_collective_hook(watch)
        logits = head(model.embed(ids))
        if planned.shard_logits:
            loss = cross_entropy(logits, ids, gang, head.partition)
        else:
            loss = nn.functional.cross_entropy(logits, ids)
        loss.backward()
        handle.remove()
        found.append(watch.seconds)
    return min(found)


def name(setup: Setup, strategy: Strategy) -> str:
    parts = [f"ZeRO {setup.zero_stage}", strategy, setup.dtype]
    parts += [f"sums in {setup.grad_dtype}"] if setup.grad_dtype else []
    parts += ["tied"] if setup.tied else []
    parts += ["uneven"] if setup.vocab_size % 2 else []
    parts += ["sparse"] if setup.sparse else []
    steps = setup.accumulation_steps
    return ", ".join(parts + ([f"{steps} micro-batches"] if steps > 1 else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("engines", "times"), help="run only this part")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--json", metavar="DIR", help="write the engines' results, one file per rank"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    if arguments.part != "times":
        compare_engines(arguments.json)
    if arguments.part != "engines":
        compare_times(arguments.runs)


def compare_engines(directory: str | None) -> None:
    """Prints the bytes that engines hold and send. With ``directory``, writes them there too."""
    found, rank = [measure_engine(*case) for case in CASES], dist.get_rank()
    if directory:
        with open(f"{directory}/{rank}.json", "w") as file:
            json.dump(found, file)
    if rank == 0:
        print("bytes of a rank, planned / measured")
        for case, row in zip(CASES, found, strict=True):
            planned = plan(*case)
            sent = sum(payloads(planned).values())
            print(
                f"  {name(*case)}: held {planned.states} / {row['held']}, "
                f"put into collectives {sent} / {sum(row['sent'].values())}"
            )


def compare_times(runs: int) -> None:
    """Prints the time in collectives of a forward and a backward."""
    rank = dist.get_rank()
    gang = ProcessGroupGang(None, "cpu")
    networks = measure_networks(gang, runs)
    if rank == 0:
        links = (
            f"{operation} {network.bandwidth / 1e9:.2f} GB/s, {1e6 * network.latency:.0f} us"
            for operation, network in networks.items()
        )
        print("ms in collectives, planned / measured:", "; ".join(links))
    for tied in (False, True):
        setup = Setup(
            16_000, 512, tied=tied, dtype="fp32", tp_size=gang.size, tokens=512, unique_share=0.3
        )
        for planned in costs(setup):
            took = measure_time(gang, setup, planned, runs)
            if rank == 0:
                label = f"{'tied' if tied else 'untied'}, {name_of(planned)}"
                expected = sum(networks[t.operation].seconds(setup, t) for t in planned.transfers)
                print(f"  {label}: {1e3 * expected:.2f} / {1e3 * took:.2f}")


if __name__ == "__main__":
    main()
