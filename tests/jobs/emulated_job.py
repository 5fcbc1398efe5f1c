"""Runs all checks on an emulated device, in a separate process. Prints a JSON object of failures by
check. With a file where ranks meet, prints what one rank of a gang finds."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import test_accelerator as cases
import torch

import accelerator_ranks
from accelerator_checks import checks_of
from emulated import WaitedError, capturing, emulated, no_waiting
from tp_embed import BatchLayout, FakeGang, VocabShardedEmbedding
from tp_embed.monitor import Traffic

failures: dict[str, str | None] = {}


def run(name: str, function: Callable[..., object], *args: object) -> None:
    torch.manual_seed(0)
    try:
        function(*args)
        failures[name] = None
    except Exception:
        lines = [x for x in traceback.format_exc().splitlines() if "registered at" not in x]
        failures[name] = "\n".join(lines)[-3000:]


def nothing_waits(device: str, kind: str, options: dict, shape: tuple[int, ...]) -> None:
    embed = cases.build(kind, device, **options)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    layout = BatchLayout.of(ids)
    for _ in range(4):
        with no_waiting():
            output = embed(ids, layout)
            output.backward(torch.ones_like(output))
    assert embed.weight.grad.shape == embed.weight.shape


def a_second_backward_waits_for_nothing(device: str) -> None:
    for size in (1, 2):
        gang = FakeGang(device, size=size)
        embed = VocabShardedEmbedding(gang, 9, 4, pad_idx=1, device=device)
        ids = torch.zeros(5, dtype=torch.int64, device=device)
        with no_waiting():
            output = embed(ids).pow(2).sum()
            (gradient,) = torch.autograd.grad(output, embed.weight, create_graph=True)
            gradient.square().sum().backward()


def waiting_is_noticed(device: str) -> None:
    embed = cases.build("vocab", device, dedup=True)
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    for wait in (lambda: embed(ids), ids.tolist, ids.sum().item, ids.cpu, lambda: ids[ids == 0]):
        try:
            with no_waiting():
                wait()
        except WaitedError:
            continue
        raise AssertionError(f"{wait} did not wait")


def capture_checks_no_ids(device: str) -> None:
    """Nor are collectives timed."""
    embed = VocabShardedEmbedding(FakeGang(device, size=2), 9, 4, device=device)
    with Traffic(embed.gang) as traffic, capturing():
        for ids in ([99], [0], [0], [0]):
            embed(torch.tensor(ids).to(device, non_blocking=True))
            with embed.gang._observed("all_reduce", ()):
                pass
    embed.check_ids()
    assert traffic.by_operation()["all_reduce"].calls == 4
    assert traffic.by_operation()["all_reduce"].seconds == 0


def main() -> None:
    with emulated() as device:
        if sys.argv[1:]:
            rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            print(json.dumps(accelerator_ranks.run(rank, size, device, Path(sys.argv[1]))))
            return
        for name, check in checks_of(device).items():
            run(name, check, device)
        for kind, options in cases.CASES:
            for shape in [(2, 5), (3, 2048)]:
                name = f"nothing waits: {kind} {options} {shape}"
                run(name, nothing_waits, device, kind, options, shape)
            name = f"agrees with the CPU: {kind} {options}"
            run(name, cases.agree_with_the_cpu, device, kind, options)
        run("a second backward waits for nothing", a_second_backward_waits_for_nothing, device)
        run("waiting is noticed", waiting_is_noticed, device)
        run("no check of ids while a graph is captured", capture_checks_no_ids, device)
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
