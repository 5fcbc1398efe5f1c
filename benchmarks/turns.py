"""Times the ways of a case in turns, on one rank of its group."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import embedding

from checks import Reference, block_of
from peers import Setting
from token_ids import draw
from tp_embed import ProcessGroupGang
from tp_embed.parameter.sharded import local
from tp_embed.partition import Partition
from ways import WAYS, Way
from wire import bytes_sent, most_over

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One case to measure.

    :param tokens: N, in ``batch`` sequences of the same length.
    :param ways: names in ``WAYS``.
    :param seconds: the approximate time: at least three rounds, and at most ``rounds``.
    :param axis: "vocab", "tokens" or "ranks" for a point of a growth curve.
    """

    ranks: int
    vocab: int
    dim: int
    tokens: int
    dtype: str
    ids: str
    ways: tuple[str, ...]
    batch: int = 1
    seconds: float = 30.0
    rounds: int = 15
    axis: str = ""

    def __post_init__(self) -> None:
        for name, divisor in (
            ("vocab", self.ranks),
            ("dim", self.ranks),
            ("tokens", self.batch * self.ranks),
        ):
            size = getattr(self, name)
            if size % divisor:
                raise ValueError(
                    f"`{name}` must be divisible by {divisor}, as most peers need it, but is "
                    f"{size} instead."
                )

    def __str__(self) -> str:
        return (
            f"P = {self.ranks}, V = {self.vocab}, E = {self.dim}, N = {self.tokens}, "
            f"{self.dtype}, {self.ids} ids"
        )


@dataclass
class Turn:
    """A timed way and its results: milliseconds of each round on this rank."""

    name: str
    who: str
    forward: Callable[[], object]
    both: Callable[[], object] | None = None
    output: str = "replicated"
    gradient: str = "dense"
    sent_forward: float = 0.0
    sent_backward: float = 0.0
    error: float = 0.0
    times: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "both": []})


def measure(case: Case, gang: ProcessGroupGang) -> dict[str, Any]:
    """Measures a case. All ranks of the gang call it and get the results of the slowest rank.

    :raises AssertionError: a layer differs from ``torch.nn.Embedding``.
    """
    generator = torch.Generator().manual_seed(1)
    dtype, shape = DTYPES[case.dtype], (case.batch, case.tokens // case.batch)
    table = torch.empty(case.vocab, case.dim, dtype=dtype).uniform_(-1, 1, generator=generator)
    ids = draw(case.ids, case.vocab, shape)
    grad = torch.randn(*shape, case.dim, generator=generator).to(dtype)
    blocks = {
        name: (
            Partition(case.vocab, gang.size).shard(gang.rank)
            if name == "vocab"
            else range(case.vocab),
            Partition(case.dim, gang.size).shard(gang.rank) if name == "embed" else range(case.dim),
        )
        for name in ("whole", "embed", "vocab")
    }
    shards = {
        name: table[rows.start : rows.stop, columns.start : columns.stop].contiguous()
        for name, (rows, columns) in blocks.items()
    }
    setting = Setting(gang, shards)
    reference = Reference(table, ids, grad)
    turns = [_checked(WAYS[name], setting, ids, grad, reference, blocks) for name in case.ways]
    found: dict[str, Any] = {
        **{key: value for key, value in vars(case).items() if key != "ways"},
        "unique": len(reference.used),
        "torch_error": reference.error,
        "rounding_error": reference.rounding,
    }
    del reference
    turns += _lower_bounds(case, setting, ids, found["unique"])

    found["measured_rounds"], found["rows"] = _take_turns(turns, setting, case), []
    for turn in turns:
        times = torch.tensor(list(turn.times.values()), dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX, setting.group)
        forward, both = ([round(ms, 3) for ms in each] for each in (times * 1000).tolist())
        found["rows"].append(
            {
                "name": turn.name,
                "who": turn.who,
                "output": turn.output.removesuffix("-first"),
                "gradient": turn.gradient,
                "forward": forward,
                "both": both if turn.both else [],
                "sent_forward": turn.sent_forward,
                "sent_backward": turn.sent_backward,
                "error": turn.error,
            }
        )
    return found


def _checked(
    way: Way,
    setting: Setting,
    ids: Tensor,
    grad: Tensor,
    reference: Reference,
    blocks: dict[str, tuple[range, range]],
) -> Turn:
    """Builds the layer of ``way``, and checks a step of it."""
    gang, group = setting.gang, setting.group
    layer: Module = way.build(setting)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    grad = way.cut_output(grad, gang.rank, gang.size).contiguous()

    outputs: list[Tensor] = []
    sent_forward = bytes_sent(group, lambda: outputs.append(layer(ids)))
    output = outputs.pop()
    reference.check_output(
        way.name, output.detach(), way.cut_output(reference.output, gang.rank, gang.size)
    )
    sent_backward = bytes_sent(group, lambda: output.backward(grad))
    assert weight.grad is not None
    error = reference.check_gradient(
        way.name,
        block_of(local(weight.grad), weight),
        *blocks[way.cut],
        None if way.cut == "whole" else group,
    )
    weight.grad = None

    def forward_and_backward() -> None:
        layer(ids).backward(grad)
        weight.grad = None

    return Turn(
        way.name,
        way.who,
        lambda: layer(ids),
        forward_and_backward,
        way.output,
        way.gradient,
        most_over(group, sent_forward),
        most_over(group, sent_backward),
        error,
    )


def _lower_bounds(case: Case, setting: Setting, ids: Tensor, unique: int) -> list[Turn]:
    """Returns lower bounds for all layers: copies, exchanges and lookups of the same bytes, and
    zeros of a dense gradient in new memory."""
    table, size, group = setting.table, setting.gang.size, setting.group
    block = Partition(case.dim, size).block
    source = table.new_zeros(case.tokens, case.dim)
    target = torch.empty_like(source).zero_()

    def exchange(rows: int) -> Callable[[], object]:
        sent, received = (table.new_zeros(size, rows, block) for _ in range(2))
        return lambda: dist.all_to_all_single(received, sent, group=group)

    return [
        Turn("memcpy of N x E", "floor", lambda: target.copy_(source)),
        Turn("exchange of N rows", "floor", exchange(case.tokens)),
        Turn("exchange of U rows", "floor", exchange(unique)),
        Turn("lookup of N rows", "floor", lambda: embedding(ids, table)),
        Turn("zeros of V x E/P", "floor", lambda: table.new_empty(case.vocab, block).zero_()),
    ]


def _take_turns(turns: list[Turn], setting: Setting, case: Case) -> int:
    """Times all turns, and returns the number of rounds."""
    group, rounds = setting.group, 1
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        _round(turns, 0, group)
        seconds = most_over(group, time.perf_counter() - start)
        rounds = max(3, min(case.rounds, int(case.seconds / seconds)))
        if rounds > 4:  # Enough time for a warm-up round.
            for turn in turns:
                turn.times = {"forward": [], "both": []}
        while len(turns[0].times["forward"]) < rounds:
            _round(turns, len(turns[0].times["forward"]), group)
    finally:
        gc.enable()
    return rounds


def _round(turns: list[Turn], number: int, group: dist.ProcessGroup) -> None:
    """Runs each turn once. Each round starts with another one."""
    first = number * len(turns) // 3 % len(turns)
    for turn in turns[first:] + turns[:first]:
        turn.times["forward"].append(_seconds(turn.forward, group))
        turn.times["both"].append(_seconds(turn.both, group) if turn.both else 0.0)


def _seconds(work: Callable[[], object], group: dist.ProcessGroup) -> float:
    dist.barrier(group)
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds
