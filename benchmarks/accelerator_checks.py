"""Checks for accelerators, as functions of the device that raise on failure.

`benchmarks/gpu.py` runs them on a GPU, and the tests on the CPU and an emulated device. The
reference is always torch.nn.Embedding, or torch.nn.Linear and torch's cross entropy, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tp_embed import (
    FakeGang,
    OutputHead,
    ShardedEmbedding,
    StandardEmbedding,
    VocabShardedEmbedding,
)
from tp_embed.nn.head import ShardedLayer

V, E = 29, 7
SIZES = (1, 2, 3)
# CUDA uses another gradient kernel above 3072 ids.
COUNTS = (0, 10, 3072, 3073, 6144)

Check = Callable[[str], None]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {}


def on(*kinds: str) -> Callable[[Check], Check]:
    """Registers a check for these kinds of devices. Default: all."""

    def mark(check: Check) -> Check:
        CHECKS[check.__name__] = check, kinds
        return check

    return mark


def checks_of(device: str) -> dict[str, Check]:
    """Returns the checks that run on a device, by name."""
    kind = torch.device(device).type
    return {name: check for name, (check, kinds) in CHECKS.items() if not kinds or kind in kinds}


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def tables(
    device: str, vocab: int = V, dim: int = E, sizes: tuple[int, ...] = SIZES, **options: Any
) -> Iterator[StandardEmbedding | ShardedEmbedding | VocabShardedEmbedding]:
    """Yields a table of each kind, on each rank of each gang."""
    whole = {name: value for name, value in options.items() if name != "dedup"}
    yield StandardEmbedding(vocab, dim, device=device, **whole)
    for size in sizes:
        for rank in range(size):
            gang = FakeGang(device, rank=rank, size=size)
            yield ShardedEmbedding(gang, vocab, dim, device=device, **options)
            yield VocabShardedEmbedding(gang, vocab, dim, device=device, **options)


def block(embed: Any, table: Tensor) -> Tensor:
    """Returns a rank's block of a table."""
    rows, columns = embed.rows, embed.columns
    return table[rows.start : rows.stop, columns.start : columns.stop]


def expected_gradient(ids: Tensor, grad: Tensor, vocab: int, pad_idx: int | None) -> Tensor:
    """Returns the gradient of torch.nn.Embedding, in fp64. *Shape:* (V, E)."""
    whole = torch.nn.Embedding(vocab, grad.size(-1), padding_idx=pad_idx, dtype=torch.float64)
    whole(ids).backward(grad.double())
    assert whole.weight.grad is not None
    return whole.weight.grad


def compare_gradients(device: str, ids: Tensor, grad: Tensor, **options: Any) -> None:
    """Pairs each gradient of a table with the gradient of torch, rounded once if it is half."""
    sizes = options.pop("sizes", SIZES)
    vocab, dtype = options.pop("vocab", V), grad.dtype
    expected = expected_gradient(ids.long(), grad, vocab, options.get("pad_idx"))
    on_device, given = ids.to(device), grad.to(device)
    error = 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    for embed in tables(device, vocab, grad.size(-1), sizes, dtype=dtype, **options):
        embed(on_device).backward(given)
        found = embed.weight.grad
        assert found is not None
        assert found.shape == embed.weight.shape
        assert found.is_contiguous()
        wanted = block(embed, expected)
        where = f"{embed}, {len(ids)} ids"
        torch.testing.assert_close(
            found.cpu().double(),
            wanted,
            rtol=error / 4,
            atol=error,
            msg=f"the gradient of {where}, differs from torch",
        )
    synchronize(device)


@on()
def gradients_are_those_of_torch(device: str) -> None:
    for count in COUNTS:
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(V, (count,), generator=generator)
        grad = torch.randn(count, E, generator=generator)
        for pad_idx in (None, 3, V - 1):
            compare_gradients(device, ids, grad, pad_idx=pad_idx)
        compare_gradients(device, ids.int(), grad)
        if count:
            compare_gradients(device, ids, grad, dedup=True)


@on()
def every_row_of_every_shard_gets_its_gradient(device: str) -> None:
    """Looks up all rows of a block, and ids of other blocks, which have no row in CUDA's buffer."""
    for vocab, sizes in ((256, (2,)), (1024, (4,)), (29, (3,))):
        ids = torch.arange(6144) % vocab
        compare_gradients(device, ids, torch.ones(len(ids), 5), vocab=vocab, sizes=sizes)


@on()
def empty_shards_launch_nothing(device: str) -> None:
    for count in (10, 8192):
        ids = torch.arange(count) % 2
        compare_gradients(device, ids, torch.randn(count, 2), vocab=2, sizes=(4,))
        compare_gradients(device, ids, torch.randn(count, 2), vocab=2, sizes=(4,), dedup=True)


@on()
def half_gradients_are_rounded_once(device: str) -> None:
    """Covers up to 3072 ids too, where CUDA's own kernel rounds after every 32 ids."""
    for dtype in (torch.bfloat16, torch.float16):
        for count in (200, 3072, 6144):
            generator = torch.Generator().manual_seed(count)
            # Small values after a large one get lost if they are added one by one.
            grad = torch.rand(count, E, generator=generator).mul_(0.01).to(dtype)
            ids = torch.randint(V, (count,), generator=generator)
            grad[0] = 1.0
            if torch.device(device).type == "cpu":
                grad = grad[:500]
                ids = ids[:500]
            compare_gradients(device, ids, grad)


@on()
def strides_of_gradients_do_not_matter(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1, E):
            ids = torch.randint(V, (40,))
            grad = torch.randn(40, width).to(dtype)
            strided = grad.t().contiguous().t()
            padded = torch.zeros(40, width + 3, dtype=dtype)[:, 1 : width + 1].copy_(grad)
            for embed in tables(device, dim=width, dtype=dtype):
                found = []
                for given in (grad, strided, padded):
                    embed.zero_grad()
                    # A copy to the device keeps the strides of only some tensors.
                    on_device = torch.empty_strided(
                        given.size(), given.stride(), dtype=dtype, device=device
                    ).copy_(given)
                    embed(ids.to(device)).backward(on_device)
                    assert embed.weight.grad is not None
                    found.append(embed.weight.grad.cpu())
                assert all(torch.equal(one, found[0]) for one in found), f"{embed}, {dtype}"


@on()
def gradients_stay_as_they_are_while_others_are_made(device: str) -> None:
    """A held gradient must not change, even with `reuse_grad`."""
    for embed in tables(device, reuse_grad=True, dedup=True):
        held = []
        for step in range(4):
            embed.zero_grad()
            embed(torch.arange(step, step + 9, device=device)).sum().backward()
            assert embed.weight.grad is not None
            held.append((embed.weight.grad, embed.weight.grad.cpu().clone()))
        for gradient, then in held:
            assert torch.equal(gradient.cpu(), then), embed


@on()
def second_derivatives_are_those_of_torch(device: str) -> None:
    """Runs on one rank: over a FakeGang, other ranks' rows are copies."""
    for pad_idx in (None, 3):
        for count in (40, 4000):
            ids, factor = torch.randint(V, (count,)), torch.randn(count, E)
            whole = torch.nn.Embedding(V, E, padding_idx=pad_idx, dtype=torch.float64)
            expected = penalty(whole, ids, factor.double())
            for embed in tables(device, sizes=(1,), pad_idx=pad_idx):
                with torch.no_grad():
                    embed.weight.copy_(whole.weight)
                found = penalty(embed, ids.to(device), factor.to(device))
                torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-3)


def penalty(embed: torch.nn.Module, ids: Tensor, factor: Tensor) -> Tensor:
    """Returns the gradient of a gradient's norm, which is modified in place."""
    weight = next(embed.parameters())
    (gradient,) = torch.autograd.grad((embed(ids).pow(3) * factor).sum(), weight, create_graph=True)
    gradient *= 0.5
    gradient.square().sum().mul(1e-3).backward()
    assert weight.grad is not None
    return weight.grad


@on()
def ids_out_of_range_are_errors_two_calls_later(device: str) -> None:
    is_cpu = torch.device(device).type == "cpu"
    bad = torch.tensor([[0, 1], [V, -2]]).to(device)
    good = torch.zeros(2, 2, dtype=torch.long, device=device)
    for embed in tables(device):
        seen: list[str] = []
        for ids in (bad, good, good, good, bad):
            try:
                embed(ids)
                seen.append("ok")
            except IndexError as e:
                seen.append(str(e))
        wrong = 0 if is_cpu else 2
        assert "position (1, 1) is -2 instead" in seen[wrong], f"{embed}: {seen}"
        assert seen[1 if is_cpu else 0] == "ok", f"{embed}: {seen}"
        if not is_cpu:
            try:
                embed.check_ids()
            except IndexError:
                pass
            else:
                raise AssertionError(f"{embed}: `check_ids()` did not raise")
        embed.check_ids()


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@on()
def deterministic_algorithms_exist(device: str) -> None:
    """Works with `torch.use_deterministic_algorithms(True)`, and repeats bit for bit."""
    ids = torch.randint(V, (6144,)).to(device)
    grad = torch.randn(6144, E).to(device)
    with deterministic():
        for dedup in (False, True):
            for embed in tables(device, dedup=dedup):
                found = []
                for _ in range(2):
                    embed.zero_grad()
                    embed(ids).backward(grad)
                    assert embed.weight.grad is not None
                    found.append(embed.weight.grad.cpu())
                assert torch.equal(*found), embed
        for head in heads(device):
            loss(head, torch.randn(10, E).to(device), torch.randint(V, (10,)).to(device)).backward()


def heads(device: str, dim: int = E, dtype: torch.dtype = torch.float32) -> list[OutputHead]:
    """Yields heads with whole tables: gathering over a FakeGang would repeat this rank's block."""
    gang = FakeGang(device)
    kinds = (ShardedEmbedding, VocabShardedEmbedding)
    return [OutputHead(kind(gang, V, dim, device=device, dtype=dtype)) for kind in kinds]


def loss(head: ShardedLayer, x: Tensor, target: Tensor, **options: Any) -> Tensor:
    assert isinstance(head, OutputHead)
    return head.loss(x, target, **options)


@on()
def fused_losses_are_those_of_torch(device: str) -> None:
    options: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}]
    for head in heads(device):
        weight = head.weight.detach().cpu().double().requires_grad_()
        for option in options:
            x, target = torch.randn(40, E), torch.randint(V, (40,))
            target[::7] = -100
            wide = x.double().requires_grad_()
            expected = cross_entropy(wide @ weight.t(), target, **option)
            grads = torch.autograd.grad(expected, (wide, weight))
            own = x.to(device).requires_grad_()
            head.zero_grad()
            found = loss(head, own, target.to(device), **option)
            found.backward()
            assert own.grad is not None
            assert head.weight.grad is not None
            seen = (found.detach(), own.grad, head.weight.grad)
            for a, b in zip(seen, (expected, *grads), strict=True):
                torch.testing.assert_close(a.cpu().double(), b.detach(), rtol=1e-4, atol=1e-5)
    synchronize(device)


@on()
def values_of_tokens_are_those_of_torch(device: str) -> None:
    """Takes whole weights, so that many logits are equal."""
    for head in heads(device):
        head.weight.data.round_()
        weight = head.weight.detach().cpu().double().requires_grad_()
        x, target = torch.randn(40, E).round(), torch.randint(V, (40,))
        target[::7] = -100
        own, wide = x.to(device).requires_grad_(), x.double().requires_grad_()
        log_p = (wide @ weight.t() / 2).log_softmax(-1)
        fixed = log_p.detach().roll(1, 0)
        kept = target != -100
        order = log_p.sort(dim=-1, descending=True, stable=True).indices[:, :9]
        expected = log_p.gather(1, target.where(kept, 0)[:, None])[:, 0] * kept
        expected = expected - 2 * (log_p.exp() * log_p).sum(-1)
        expected = expected + (fixed.exp() * (fixed - log_p)).sum(-1)
        expected = expected + (log_p.exp() * (log_p - fixed)).sum(-1)
        expected = expected + (wide @ weight.t()).gather(1, order).sum(-1)
        logits, ids = head.top_k(own, 9)
        teacher = own.detach().roll(1, 0), head, 2.0
        found = head.log_probs(own, target.to(device), 2.0) + 2 * head.entropy(own, 2.0)
        found = found + head.kl_divergence(own, *teacher) + logits.sum(-1)
        found = found + head.kl_divergence(own, *teacher, reverse=True)
        assert torch.equal(ids.cpu(), order)
        seen = found, *torch.autograd.grad(found.square().sum(), (own, head.weight))
        grads = torch.autograd.grad(expected.square().sum(), (wide, weight))
        for a, b in zip(seen, (expected, *grads), strict=True):
            torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-4, atol=1e-4)
    synchronize(device)


@on("cpu", "cuda")
def fp16_and_autocast_are_near_torch(device: str) -> None:
    """Computes the loss in fp32 with a loss scale, and products in the dtype of autocast."""
    kind = torch.device(device).type
    x, target = torch.randn(40, 16), torch.randint(V, (40,))
    for dtype in (torch.bfloat16, torch.float16):
        for head in heads(device, 16):
            embed = StandardEmbedding(V, 16, device=device)
            with torch.autocast(kind, dtype):
                rows = embed(target.to(device))
                logits = head(x.to(device))
                found = loss(head, x.to(device), target.to(device))
            assert rows.dtype == torch.float32, "autocast changed a lookup"
            assert logits.dtype == dtype, "autocast did not change a head"
            assert found.dtype == torch.float32
            wide = x.double() @ head.weight.detach().cpu().double().t()
            expected = cross_entropy(wide, target).float()
            torch.testing.assert_close(found.detach().cpu(), expected, rtol=0.02, atol=0.02)
            (found * 1024).backward()
            assert head.weight.grad is not None
            assert head.weight.grad.isfinite().all()
        for head in heads(device, 16, dtype):
            own = x.to(device, dtype).requires_grad_()
            (loss(head, own, target.to(device)) * 1024).backward()
            assert own.grad is not None
            assert own.grad.isfinite().all()


@on("cpu", "cuda")
def fused_losses_do_not_round_logits(device: str) -> None:
    """Some tokens wait in the memory of the weight's gradient, and logits of others are computed
    twice."""
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for option in ({}, {"accum_dtype": torch.float32}):
            for head in heads(device, 256, dtype):
                weight = head.weight.detach().cpu().double().requires_grad_()
                x, target = torch.randn(300, 256).to(dtype), torch.randint(V, (300,))
                wide = x.double().requires_grad_()
                expected = cross_entropy(wide @ weight.t(), target)
                grads = torch.autograd.grad(expected, (wide, weight))
                own = x.to(device).requires_grad_()
                head.zero_grad()
                found = loss(head, own, target.to(device), **option)
                found.backward()
                torch.testing.assert_close(found.item(), expected.item(), rtol=0, atol=1e-5)
                for parameter, exact in zip((own, head.weight), grads, strict=True):
                    assert parameter.grad is not None
                    apart = (parameter.grad.cpu().double() - exact).norm() / exact.norm()
                    assert apart < bound, f"{head}, {dtype}, {option}: {apart}"
