"""Times training steps in which the rows of the next micro-batch travel while this one is computed.

    python benchmarks/prefetch.py --mbits 0 400 100

A prototype of such a prefetch, and its limits, against the layers as they are: a step of two ranks
is four micro-batches through a small transformer, and SGD; its loss is that of no head, so that a
lookup has a large share of it. With a rate the ranks are in networks of their own, with a link that
is as fast as that (root only): as on a real machine, cores have nothing to do with what is under
way. With 0 it is the loopback, where the copies of each rank compete with its computations.

Ways take turns; printed is the median step, and the median ratio of a step to that of the same
round as it is, with minimum and maximum. What a lookup gives is compared bit for bit before.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from token_ids import draw
from tp_embed import Gang, ProcessGroupGang, ShardedEmbedding, VocabShardedEmbedding
from tp_embed.gang import ReduceOperation
from tp_embed.gang.collectives import copy_to_gang, reduce_partial
from tp_embed.lookup.exchange import ColumnsToAll, Exchange, Place, RowsToAll, Staging
from tp_embed.lookup.gradient import as_sparse, sum_by_id
from wire import bytes_sent

Embed = ShardedEmbedding | VocabShardedEmbedding

VOCAB, HEADS, BATCH, SEQ, MICRO_BATCHES = 1 << 15, 8, 4, 256, 4
CLASSES: dict[str, type[Embed]] = {"embed": ShardedEmbedding, "vocab": VocabShardedEmbedding}
AS_IT_IS = "as it is"
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Case:
    """
    :param cut: of the table: "embed" or "vocab".
    :param body: what the layers are: "parallel" (Megatron's, four all-reduces each in a step), or
        "whole" on each rank, so that nothing but the lookup is sent.
    :param gflops: if not 0, nothing is computed in the layers: each sleeps for as long as what it
        would compute takes at this speed, as the host of an accelerator does.
    """

    cut: str
    body: str
    layers: int
    gflops: float = 0.0
    dim: int = 256


CASES = (
    Case("embed", "whole", 1, 40),
    Case("vocab", "whole", 1, 40),
    Case("embed", "whole", 4, 40),
    Case("embed", "parallel", 1, 40),
    Case("embed", "parallel", 4, 40),
    Case("embed", "whole", 1),
    Case("embed", "parallel", 1),
)


class Early:
    """A lookup whose rows are on the way.

    What was sent is kept. Before it is used each rank compares it with its block as it is now, bit
    for bit, and one all-reduce tells all whether any has changed: then all fetch anew. No rank can
    decide that alone, since a rank whose block is unchanged would not take part.

    :param wire: a process group of its own, so that other collectives come in any order.
    :param trusts: takes what has come without a look, which gives wrong rows if any have changed.
    """

    def __init__(
        self,
        embed: Embed,
        ids: Tensor,
        wire: dist.ProcessGroup,
        staging: Staging,
        *,
        trusts: bool = False,
    ) -> None:
        self.exchange = exchange(embed, ids, staging)
        self.weight, self.shape, self.trusts = embed.weight, ids.shape, trusts
        gang, distinct = embed.gang, self.exchange.distinct[0]
        self.rows = distinct.ids
        counts = [len(self.rows)] * gang.size
        width = embed.partition.block
        if not embed.shard_dim:
            ends = [embed.partition.shard(r).stop for r in range(gang.size)]
            counts = distinct.counts([0, *ends])
            first = sum(counts[: gang.rank])
            self.rows = self.rows[first : first + counts[gang.rank]] - embed.rows.start
            width = embed.embed_dim
        with torch.no_grad():
            self.received = staging.take("early", (sum(counts), width), self.weight)
            parts = self.received.split(counts)
            self.sent = torch.index_select(self.weight, 0, self.rows, out=parts[gang.rank])
        self.works = []
        for step in range(1, gang.size):
            to, source = (gang.rank + step) % gang.size, (gang.rank - step) % gang.size
            give, take = [0] * gang.size, [0] * gang.size
            give[to], take[source] = counts[gang.rank], counts[source]
            work = dist.all_to_all_single(parts[source], self.sent, take, give, wire, async_op=True)
            self.works.append(work)

    def __call__(self) -> Tensor:
        output: Tensor = _Finish.apply(self.weight, self)
        return output.view(*self.shape, -1)

    def finish(self, weight: Tensor) -> Tensor:
        for work in self.works:
            work.wait()
        if not self.trusts:
            now, bits = weight.index_select(0, self.rows), BITS[weight.element_size()]
            # As integers: 0.0 is not -0.0, and a NaN is itself.
            stale = torch.tensor(not torch.equal(now.view(bits), self.sent.view(bits))).int()
            self.exchange.gang.all_reduce(stale, ReduceOperation.MAX)
            if stale.item():
                return self.exchange.fetch(weight)
        inverse = self.exchange.distinct[0].inverse()
        if self.exchange.place.dim == 0:
            return self.received.index_select(0, inverse)
        blocks = self.received.view(self.exchange.gang.size, len(self.rows), -1)
        return self.exchange._put_together(blocks, inverse)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, early: Early) -> Tensor:
        ctx.early = early
        return early.finish(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient(ctx.early.exchange, grad), None


class _Whole(torch.autograd.Function):
    """A lookup in a whole table, with the gradient of a rank's block."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return table.index_select(0, exchange.ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gradient(ctx.exchange, grad), None, None


def exchange(embed: Embed, ids: Tensor, staging: Staging) -> Exchange:
    place = Place(embed.gang, embed.partition, embed.shard_dim, embed.rows, embed.columns)
    kind = ColumnsToAll if embed.shard_dim else RowsToAll
    return kind(place, ids.flatten(), None, True, staging)


def gradient(exchange: Exchange, grad: Tensor) -> Tensor:
    """What the layers give, row-sparse."""
    returned, rows = exchange.backward(grad), exchange.place.rows
    distinct = exchange.distinct[0] if exchange.place.dim else exchange.distinct[0].within(rows)
    sums = sum_by_id(returned.grad, distinct, returned.columns)
    return as_sparse(distinct.ids - rows.start, sums, len(rows))


class Layer(nn.Module):
    """A layer of a transformer; ``gang`` is that over which it is cut, if it is."""

    def __init__(self, dim: int, gang: Gang | None) -> None:
        super().__init__()
        self.gang, size = gang, gang.size if gang else 1
        self.heads = HEADS // size
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        shapes = (
            (3 * dim // size, dim),
            (dim, dim // size),
            (4 * dim // size, dim),
            (dim, 4 * dim // size),
        )
        self.weights = nn.ParameterList(torch.randn(shape) * 0.02 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        into, out, up, down = self.weights
        q, k, v = linear(self._enter(self.norms[0](x)), into).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._leave(linear(seen.transpose(1, 2).flatten(-2), out))
        return x + self._leave(linear(gelu(linear(self._enter(self.norms[1](x)), up)), down))

    def _enter(self, x: Tensor) -> Tensor:
        return copy_to_gang(x, self.gang) if self.gang else x

    def _leave(self, x: Tensor) -> Tensor:
        return reduce_partial(x, self.gang) if self.gang else x


class SleepingLayer(nn.Module):
    """The same for the time that it takes and what it sends, but not for what it gives."""

    def __init__(self, dim: int, gang: Gang | None, gflops: float) -> None:
        super().__init__()
        self.gang, size = gang, gang.size if gang else 1
        products = BATCH * SEQ * (12 * dim**2 + 2 * SEQ * dim)  # All weights, and attention.
        self.seconds = 2 * products / size / (gflops * 1e9) / 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            entered = copy_to_gang(x, self.gang) if self.gang else x
            worked: Tensor = _Sleep.apply(entered, self.seconds)
            x = reduce_partial(worked, self.gang) if self.gang else worked
        return x


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad.clone(), None


class Trainer:
    """A model, and the ways to train it for a step."""

    def __init__(self, case: Case, gang: ProcessGroupGang, wire: dist.ProcessGroup) -> None:
        torch.manual_seed(0)
        self.embed = CLASSES[case.cut](gang, VOCAB, case.dim, sparse=True, dedup=True)
        cut = gang if case.body == "parallel" else None
        self.body = nn.Sequential(
            *(
                SleepingLayer(case.dim, cut, case.gflops) if case.gflops else Layer(case.dim, cut)
                for _ in range(case.layers)
            )
        )
        self.optimizer = torch.optim.SGD([*self.embed.parameters(), *self.body.parameters()], 0.1)
        self.wire, self.staging = wire, Staging()
        self.table = self.embed.to_embedding().weight.detach()

    def ways(self) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
        return {
            AS_IT_IS: lambda batch: self._step(self.embed(ids) for ids in batch),
            "prefetch": lambda batch: self._step(self._ahead(batch)),
            "prefetch, not checked": lambda batch: self._step(self._ahead(batch, trusts=True)),
            "one lookup a step": self._at_once,
            "no exchange": lambda batch: self._step(self._whole(ids) for ids in batch),
        }

    def _step(self, rows: Iterator[Tensor]) -> Tensor:
        losses = []
        for x in rows:
            loss = self._loss(x)
            loss.backward()
            losses.append(loss.detach())
        self._update()
        return torch.stack(losses)

    def _loss(self, x: Tensor) -> Tensor:
        loss: Tensor = self.body(x).square().mean()
        return loss / MICRO_BATCHES

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _ahead(self, batch: Sequence[Tensor], *, trusts: bool = False) -> Iterator[Tensor]:
        x = self.embed(batch[0])
        for ids in batch[1:]:
            early = Early(self.embed, ids, self.wire, self.staging, trusts=trusts)
            yield x
            x = early()
        yield x

    def _at_once(self, batch: Sequence[Tensor]) -> Tensor:
        """What a user can do without a prefetch: ids of several micro-batches are sent once, and
        the gradient of the table is added up once."""
        rows = self.embed(torch.stack(list(batch)))
        losses, grads = [], []
        for x in rows.detach():
            loss = self._loss(x.requires_grad_())
            loss.backward()
            losses.append(loss.detach())
            grads.append(x.grad)
        rows.backward(torch.stack(grads))
        self._update()
        return torch.stack(losses)

    def _whole(self, ids: Tensor) -> Tensor:
        looked_up = exchange(self.embed, ids, self.staging)
        rows: Tensor = _Whole.apply(self.embed.weight, self.table, looked_up)
        return rows.view(*ids.shape, -1)


def check(trainer: Trainer, batches: Sequence[Sequence[Tensor]]) -> None:
    """A prefetch changes no bit, not even if one rank alone writes to its block behind its back."""
    found = {}
    for name in (AS_IT_IS, "prefetch"):
        mine = copy.copy(trainer)
        mine.embed, mine.body = copy.deepcopy((trainer.embed, trainer.body))
        mine.optimizer = torch.optim.SGD([*mine.embed.parameters(), *mine.body.parameters()], 0.1)
        losses = [mine.ways()[name](batch) for batch in batches]
        found[name] = torch.cat([*losses, mine.embed.weight.detach().flatten()])
    assert torch.equal(found[AS_IT_IS], found["prefetch"])

    embed, ids = copy.deepcopy(trainer.embed), batches[0][0]
    earlies = [Early(embed, ids, trainer.wire, Staging(), trusts=t) for t in (False, True)]
    if embed.gang.rank == 1:
        local = int(ids.max()) - embed.rows.start  # The last rank's, whichever way it is cut.
        embed.weight.data[local] += 1.0
    right = embed(ids)
    assert [torch.equal(early(), right) for early in earlies] == [True, False]


@dataclass(frozen=True)
class Found:
    """
    :param times: seconds of each way in each round, by the slower rank.
    :param sent: bytes in a step, by its lookups, and by one lookup instead of those.
    """

    times: dict[str, list[float]]
    sent: tuple[int, int, int]


def measure(case: Case, gang: ProcessGroupGang, wire: dist.ProcessGroup, rounds: int) -> Found:
    shape = rounds + 1, MICRO_BATCHES, BATCH, SEQ
    batches = [list(batch) for batch in draw("zipf", VOCAB, shape)]
    trainer, group = Trainer(case, gang, wire), gang.as_process_group()
    check(trainer, batches[:3])
    ways = trainer.ways()
    sent = (
        bytes_sent(group, lambda: ways[AS_IT_IS](batches[0])),
        bytes_sent(group, lambda: [trainer.embed(ids) for ids in batches[0]]),
        bytes_sent(group, lambda: trainer.embed(torch.stack(batches[0]))),
    )
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number, batch in enumerate(batches):
        names = list(ways)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier(group)
            start = time.perf_counter()
            ways[name](batch)
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            gang.all_reduce(seconds, ReduceOperation.MAX)
            if number:  # The first is to warm up.
                times[name].append(seconds.item())
    return Found(times, sent)


def work(mbits: int, rank: int, store: str, rounds: int, cases: Sequence[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gang, wire = ProcessGroupGang(None, "cpu"), dist.new_group(backend="gloo")
    for case in cases:
        found = measure(case, gang, wire, rounds)
        if rank == 0:
            report(mbits, case, found)
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def link(mbits: int) -> Iterator[list[list[str]]]:
    """For each rank what is to come before its command, so that all it sends goes at most at this
    rate. The networks end with this context."""
    if not mbits:
        yield [["env", "GLOO_SOCKET_IFNAME=lo"]] * 2
        return
    with ExitStack() as stack:
        pids = []
        for _ in range(2):
            script = ["unshare", "--net", "sh", "-c", "echo ready; read end"]
            holder = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(holder.communicate)
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            pids.append(holder.pid)
        enter = [["nsenter", f"--net=/proc/{pid}/ns/net"] for pid in pids]
        ends = f"eth0 type veth peer name eth0 netns {pids[1]}".split()
        subprocess.run([*enter[0], "ip", "link", "add", *ends], check=True)
        for rank in range(2):
            script_ = (
                "ip link set lo up; ip link set eth0 up; "
                f"ip addr add 10.77.1.{rank + 1}/24 dev eth0; "
                f"tc qdisc add dev eth0 root tbf rate {mbits}mbit burst 16kb limit 64mb"
            )
            subprocess.run([*enter[rank], "sh", "-ec", script_], check=True)
        yield [[*words, "env", "GLOO_SOCKET_IFNAME=eth0"] for words in enter]


def run(mbits: int, rounds: int, cases: Sequence[int]) -> None:
    with link(mbits) as prefixes, tempfile.TemporaryDirectory() as directory:
        processes = []
        for rank, prefix in enumerate(prefixes):
            command = [*prefix, sys.executable, __file__, f"--rank={rank}", f"--mbits={mbits}"]
            command += [f"--store={directory}/store", f"--rounds={rounds}", "--cases"]
            command += map(str, cases)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=environment))
        try:
            statuses = [process.wait(timeout=1800) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(statuses):
        raise SystemExit("a rank failed; see above")


def report(mbits: int, case: Case, found: Found) -> None:
    where = f"{mbits} Mbit/s" if mbits else "loopback"
    body = f"asleep, {case.gflops:.0f} GFLOP/s" if case.gflops else "awake"
    step, lookup, at_once = (nbytes / 1e6 for nbytes in found.sent)
    print(
        f"\n{where}: {case.cut}, {case.layers} layers {case.body}, {body}, E = {case.dim}; sent in "
        f"a step {step:.2f} MB, by its lookups {lookup:.2f} MB (by one {at_once:.2f} MB)"
    )
    for name, seconds in found.times.items():
        ratios = [a / b for a, b in zip(seconds, found.times[AS_IT_IS], strict=True)]
        print(
            f"  {name:22} {statistics.median(seconds) * 1000:6.0f} ms "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbits", type=int, nargs="+", default=[0, 400, 100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        cases = [CASES[i] for i in arguments.cases]
        work(arguments.mbits[0], arguments.rank, arguments.store, arguments.rounds, cases)
        return
    for mbits in arguments.mbits:
        run(mbits, arguments.rounds, arguments.cases)


if __name__ == "__main__":
    main()
