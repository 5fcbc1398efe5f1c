"""Cross entropy over a gang, against ``torch.nn.functional.cross_entropy`` of all logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import is_tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_models import small_sizes
from parity import whole
from tp_embed import (
    FakeGang,
    OutputHead,
    Partition,
    ShardedEmbedding,
    StandardEmbedding,
    shard_embeddings,
)
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.integrations.transformers import shard_logits
from tp_embed.nn import loss as tp_loss
from tp_embed.nn.loss import cross_entropy, linear_cross_entropy

N, V, E = 10, 11, 6
# So few columns that even one token has more logits than all hidden states have items.
CLASSES, DIM = 61, 3
SMALLER_THAN_GANG = 3

# Each option alone, and all that go together.
OPTIONS = [
    {},
    {"ignore_index": 4},
    {"reduction": "sum"},
    *(
        {"label_smoothing": smoothing, "z_loss": z_loss, "soft_cap": soft_cap}
        for smoothing in (0.0, 0.2)
        for z_loss in (0.0, 0.1)
        for soft_cap in (None, 1.5)
    ),
    {"ignore_index": 2, "label_smoothing": 0.3, "z_loss": 0.1, "soft_cap": 0.8, "reduction": "sum"},
]


def capped(logits, soft_cap):
    return logits if soft_cap is None else soft_cap * (logits / soft_cap).tanh()


def expected_loss(
    logits, target, *, soft_cap=None, z_loss=0.0, ignore_index=-100, reduction="mean", **options
):
    """By torch, with the soft cap and the z-loss written out."""
    logits = capped(logits, soft_cap)
    loss = functional.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", **options
    )
    valid = target != ignore_index
    loss = loss + z_loss * logits.logsumexp(-1).square() * valid
    return loss.sum() / valid.sum() if reduction == "mean" else loss.sum()


def problem(num_classes, dtype=torch.float64, dim=E):
    torch.manual_seed(3)
    table = StandardEmbedding(num_classes, dim, dtype=dtype)
    bias = nn.Parameter(torch.randn(num_classes, dtype=dtype))
    x = torch.randn(2, N // 2, dim, dtype=dtype, requires_grad=True)
    target = torch.randint(num_classes, (2, N // 2))
    target[0, 1] = -100
    return table, bias, x, target


def check_head(gang, kind, num_classes, options, chunk_bytes, block_bytes):
    """The fused loss of a head and, over the vocabulary, the one of its own logits."""
    tp_loss._CHUNK_BYTES, tp_loss._BLOCK_BYTES = chunk_bytes, block_bytes
    table, bias, x, target = problem(num_classes, dim=DIM)
    if options.get("ignore_index") is not None:
        target = target.clamp_min(0)
    logits = functional.linear(x, table.weight, bias)
    expected = expected_loss(logits.flatten(0, -2), target.flatten(), **options)
    (3 * expected).backward()
    gradients = [t.grad for t in (x, bias, table.weight)]
    x.grad = bias.grad = None

    head = OutputHead(embed := kind.from_embedding(table, gang), bias=bias)
    ways = [lambda: head.loss(x, target, **options)]
    if kind is VocabSharded:
        local = OutputHead(embed, bias=bias, output="shard")
        ways.append(
            lambda: cross_entropy(local(x), target, gang, embed.partition, **options),
        )
    for way in ways:
        x.grad = bias.grad = embed.weight.grad = None
        with torch.no_grad():
            torch.testing.assert_close(way(), expected)
        loss = way()
        torch.testing.assert_close(loss, expected)
        (3 * loss).backward()
        found = [x.grad, bias.grad, whole(embed, embed.weight.grad)]
        torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_loss_is_that_of_torch(pool, size, kind, options):
    # One token, three tokens, and all tokens at a time; five rows of the weight, and all.
    for tokens, rows in [(0, 5), (3, 5), (N, CLASSES)]:
        classes = -(-CLASSES // size) if kind is VocabSharded else CLASSES
        sizes = 4 * classes * tokens, 4 * DIM * rows
        pool(size, check_head, kind, CLASSES, options, *sizes)


@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_loss_with_empty_shards(pool, kind):
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 2.0}
    pool(4, check_head, kind, SMALLER_THAN_GANG, options, 1 << 20, 1 << 20)


def losses_of_tokens(gang):
    table, bias, x, target = problem(V, torch.float32)
    embed = VocabSharded.from_embedding(table, gang)
    logits = OutputHead(embed, bias=bias, output="shard")(x)
    found = cross_entropy(logits, target, gang, embed.partition, reduction="none")
    whole_logits = functional.linear(x, table.weight, bias).flatten(0, -2)
    expected = functional.cross_entropy(whole_logits, target.flatten(), reduction="none")
    torch.testing.assert_close(found, expected.view_as(target))


def masked_classes(gang, kind):
    """Classes that are out of the question, at the edges of shards too."""
    table, bias, x, target = problem(V, torch.float32)
    for masked in range(V):
        bias.data.zero_()[masked] = -torch.inf
        wanted = torch.where(target == masked, -100, target)
        head = OutputHead(embed := kind.from_embedding(table, gang), bias=bias)
        expected = functional.cross_entropy(
            functional.linear(x, table.weight, bias).flatten(0, -2), wanted.flatten()
        )
        torch.testing.assert_close(head.loss(x, wanted), expected)
        if kind is VocabSharded:
            logits = OutputHead(embed, bias=bias, output="shard")(x)
            found = cross_entropy(logits, wanted, gang, embed.partition)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_masked_classes(pool, kind):
    pool(2, masked_classes, kind)


def test_losses_of_tokens(pool):
    pool(3, losses_of_tokens)


def low_precision(gang, kind, dtype, scale, widened, options):
    """How far the gradients are from those in fp64, by each way, and how far those of torch are:
    all at once, and by their norm, which rounding errors of single items do not change."""
    set_products(widened)
    table, _, x, target = problem(257)
    logits = functional.linear(x, table.weight)
    expected_loss(logits.flatten(0, -2), target.flatten(), **options).backward()
    exact = x.grad, table.weight.grad

    def errors(x_grad, table_grad):
        found = [g.double() / scale for g in (x_grad, table_grad)]
        apart = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
        norms = [abs(float(f.norm() / e.norm()) - 1) for f, e in zip(found, exact, strict=True)]
        return apart + norms

    low = [t.detach().to(dtype).requires_grad_() for t in (x, table.weight)]
    logits = functional.linear(*low).float()
    loss = expected_loss(logits.flatten(0, -2), target.flatten(), **options)
    (loss * scale).backward()
    results = [errors(low[0].grad, low[1].grad)]

    table_low = StandardEmbedding(257, E, dtype=dtype)
    table_low.weight.data.copy_(table.weight)
    embed = kind.from_embedding(table_low, gang)
    head = OutputHead(embed)
    ways = [lambda x, target: head.loss(x, target, **options)]
    if kind is VocabSharded:
        local = OutputHead(embed, output="shard")
        ways.append(
            lambda x, target: cross_entropy(local(x), target, gang, embed.partition, **options)
        )
    for way in ways:
        embed.weight.grad = None
        low_x = x.detach().to(dtype).requires_grad_()
        (way(low_x, target) * scale).backward()
        results.append(errors(low_x.grad, whole(embed, embed.weight.grad)))
    return results


def set_products(widened):
    """Whether this CPU is taken for one that multiplies low precisions in fp32."""
    there = next(name for name, able in torch.cpu.get_capabilities().items() if able is True)
    names = () if widened else (there,)
    tp_loss._CPU_PRODUCTS = {torch.bfloat16: names, torch.float16: names}


@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0, "z_loss": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 1 / 7),  # As with seven micro-batches; bf16 would round it by 0.2%.
        (torch.float16, 2.0**12),
        (torch.float16, 2.0**16),  # DeepSpeed's first loss scale, which fp16 does not hold.
    ],
)
@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_low_precision_gradients_are_as_good_as_those_of_torch(pool, kind, dtype, scale, options):
    for widened in (False, True):
        arguments = kind, dtype, scale, widened, options
        theirs, *ours = pool(2, low_precision, *arguments)[0]
        for errors in ours:
            for our, their, slack in zip(errors, theirs, (1e-3, 1e-3, 1.5e-3, 1.5e-3), strict=True):
                assert our < 1.5 * their + slack


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_under_autocast(monkeypatch, widened, dtype):
    """Hidden states of any dtype, as another layer gives them, and a weight in fp32."""
    monkeypatch.setattr(tp_loss, "_CPU_PRODUCTS", tp_loss._CPU_PRODUCTS)
    set_products(widened)
    table, bias, x, target = problem(257, torch.float32)
    x, weight = x.detach().flatten(0, 1).to(dtype).requires_grad_(), table.weight
    target = target.flatten()
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.cross_entropy(functional.linear(x, weight, bias).float(), target)
    inputs = [x, weight, bias]
    gradients = torch.autograd.grad(expected, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(
            x, weight, target, FakeGang("cpu"), Partition(257, 1), bias=bias
        )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), gradients, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


class Seen(TorchDispatchMode):
    """Sees the number of items of the largest tensor that an operation makes, the names of
    operations, and the number of multiplications in products of matrices."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.multiplications = 0
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "addmm_"):
            self.multiplications += output.numel() * args[-1].size(0)
        for tensor in tree_leaves(output):
            if is_tensor(tensor) and tensor.untyped_storage()._cdata not in known:
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias", "x weight", "x weight bias"])
def test_gradients_are_not_computed_where_none_is_needed(monkeypatch, frozen, grad_mode):
    classes, tokens = 500, 8
    monkeypatch.setattr(tp_loss, "_CHUNK_BYTES", 4 * classes * 2)
    x, weight, bias = torch.randn(tokens, E), torch.randn(classes, E), torch.randn(classes)
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        tensor.requires_grad_(name not in frozen.split())
    target, alone = torch.arange(tokens), (FakeGang("cpu"), Partition(classes, 1))
    with grad_mode(), Seen() as seen:
        loss = linear_cross_entropy(x, weight, target, *alone, bias=bias, soft_cap=3.0)
    needed = [t for t in (x, weight, bias) if t.requires_grad and grad_mode is torch.enable_grad]
    products = 1 + sum(t is not bias for t in needed)
    assert seen.multiplications == products * tokens * classes * E
    largest = weight.numel() if any(t is weight for t in needed) else 2 * 2 * classes
    assert seen.numel <= max(largest, classes)
    assert ("scatter_add_" in seen.names) == bool(needed)
    assert loss.requires_grad == bool(needed)
    if needed:
        loss.backward()
    assert [t.grad is not None for t in (x, weight, bias)] == [
        any(t is n for n in needed) for t in (x, weight, bias)
    ]


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_gradients_of_logits_are_not_computed_where_none_is_needed(grad_mode):
    logits = torch.randn(3, V, requires_grad=True)
    target, alone = torch.arange(3), (FakeGang("cpu"), Partition(V, 1))
    with grad_mode(), Seen() as seen:
        cross_entropy(logits, target, *alone)
    assert ("scatter_add_" in seen.names) == (grad_mode is torch.enable_grad)
    with Seen() as seen:
        cross_entropy(logits.detach(), target, *alone)
    assert "scatter_add_" not in seen.names


def test_ignored_tokens_take_no_work():
    x, weight = torch.randn(6, E), torch.randn(V, E)
    target = torch.tensor([-100, 3, -100, -100, 4, -100])
    with Seen() as seen:
        linear_cross_entropy(x, weight, target, FakeGang("cpu"), Partition(V, 1))
    assert seen.multiplications == 2 * V * E


def test_fused_loss_holds_no_logits(monkeypatch):
    tokens, classes, dim = 4096, 1024, 8
    monkeypatch.setattr(tp_loss, "_CHUNK_BYTES", 64 * classes * 4)
    x = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(classes, dim, requires_grad=True)
    target = torch.randint(classes, (tokens,))
    alone, partition = FakeGang("cpu"), Partition(classes, 1)
    with Seen() as fused:
        linear_cross_entropy(x, weight, target, alone, partition).backward()
    with Seen() as plain:
        functional.cross_entropy(functional.linear(x, weight), target).backward()
    assert plain.numel == tokens * classes
    assert fused.numel == 64 * classes


@pytest.mark.parametrize("fused", [False, True])
def test_backward_makes_no_other_gradient(fused):
    """The one that was saved becomes that of the tensor, unless it is needed again."""
    x, weight = torch.randn(4, E), torch.randn(V, E, requires_grad=True)
    logits = torch.randn(4, V, requires_grad=True)
    target, alone = torch.arange(4), (FakeGang("cpu"), Partition(V, 1))
    if fused:
        leaf, loss = weight, linear_cross_entropy(x, weight, target, *alone)
    else:
        leaf, loss = logits, cross_entropy(logits, target, *alone)
    whole_logits = functional.linear(x, leaf) if fused else leaf
    (expected,) = torch.autograd.grad(functional.cross_entropy(whole_logits, target), leaf)
    for times in (1, 2):
        loss.backward(torch.tensor(2.0), retain_graph=True)
        torch.testing.assert_close(leaf.grad, times * 2 * expected)
    leaf.grad = None
    with Seen() as seen:
        loss.backward(torch.tensor(3.0))
    torch.testing.assert_close(leaf.grad, 3 * expected)
    assert seen.numel < leaf.numel()


def volumes(gang, kind):
    table, _, x, target = problem(V, torch.float32)
    head = OutputHead(kind.from_embedding(table, gang))
    with CommDebugMode() as forward:
        loss = head.loss(x, target)
    with CommDebugMode() as backward:
        loss.backward()
    return [{str(n): c for n, c in mode.get_comm_counts().items()} for mode in (forward, backward)]


def test_fused_loss_sends_what_it_says(pool):
    gather, reduce = "c10d._allgather_base_", "c10d.allreduce_"
    assert pool(2, volumes, VocabSharded)[0] == [{reduce: 2}, {reduce: 1}]
    assert pool(2, volumes, ShardedEmbedding)[0] == [{reduce: 1}, {gather: 1}]


@pytest.mark.parametrize("fused", [False, True])
def test_no_token_at_all_is_nan_with_no_gradient(fused):
    x, weight = torch.randn(2, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    target, alone = torch.full((2,), -100), (FakeGang("cpu"), Partition(V, 1))
    if fused:
        ours = linear_cross_entropy(x, weight, target, *alone)
    else:
        ours = cross_entropy(functional.linear(x, weight), target, *alone)
    ours.backward()
    assert ours.isnan()
    assert functional.cross_entropy(functional.linear(x, weight), target).isnan()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_a_single_token():
    logits, target = torch.randn(V), torch.tensor(3)
    found = cross_entropy(logits, target, FakeGang("cpu"), Partition(V, 1))
    torch.testing.assert_close(found, functional.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(3)}, ValueError, r"`target` must have the shape \(2,\), one"),
        ({"target": torch.zeros(2)}, TypeError, "must have an integer dtype, but has torch.float"),
        ({"target": torch.tensor([0, 11])}, IndexError, r"in \[0, 11\) or -100 .* token 1 has 11"),
        ({"label_smoothing": 2.0}, ValueError, r"`label_smoothing` must be in \[0, 1\], but is 2"),
        ({"z_loss": -1.0}, ValueError, "`z_loss` must not be negative, but is -1"),
        ({"soft_cap": 0.0}, ValueError, "`soft_cap` must be positive, or None for no cap, but is"),
        ({"reduction": "none"}, ValueError, "must be 'mean' or 'sum', but is 'none' instead. For"),
    ],
)
def test_bad_input(change, error, message):
    target = change.pop("target", torch.tensor([0, 1]))
    with pytest.raises(error, match=message):
        linear_cross_entropy(
            torch.randn(2, E), torch.randn(V, E), target, FakeGang("cpu"), Partition(V, 1), **change
        )


def test_logits_of_another_width():
    gang, partition = FakeGang("cpu", rank=1, size=3), Partition(V, 3)
    with pytest.raises(ValueError, match="must have the 4 columns of this rank, but has 11 inst"):
        cross_entropy(torch.randn(2, V), torch.tensor([0, 1]), gang, partition)


def gemma2(dtype=torch.float64):
    """With a cap that is felt: the logits of new weights are small."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **{**small_sizes(layers=1), "hidden_size": 16}, final_logit_softcapping=0.05
    )
    return transformers.Gemma2ForCausalLM(config).to(dtype).eval()


def losses_of_gemma2(gang, strategy):
    model, ids = gemma2(), torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(5))
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    cap, table = model.config.final_logit_softcapping, model.get_input_embeddings()
    uncapped = model.get_output_embeddings()(model.model(ids).last_hidden_state)
    assert (uncapped - output.logits).abs().max() > 0.1 * cap  # Or no cap would do, too.

    shard_embeddings(model, gang, strategy=strategy)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    target = functional.pad(ids, (0, 1), value=-100)[:, 1:]
    assert table.weight.shape == (37, 16)

    def by_head():
        return head.loss(model.model(ids).last_hidden_state, target, soft_cap=cap)

    def by_capped_head():
        capped_head = OutputHead(embed, soft_cap=cap)
        hidden = model.model(ids).last_hidden_state
        torch.testing.assert_close(capped_head(hidden), output.logits)
        return capped_head.loss(hidden, target)

    def by_model():
        if strategy == "vocab":
            shard_logits(model)
        return model(ids, labels=ids).loss

    for way in (by_head, by_capped_head, by_model):
        model.zero_grad()
        loss = way()
        torch.testing.assert_close(loss, output.loss, check_dtype=False)
        loss.backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            grad = whole(embed, grad) if parameter is embed.weight else grad
            torch.testing.assert_close(grad, gradients[name], msg=f"{way.__name__}: {name}")


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("size", [1, 2])
def test_losses_of_gemma2(pool, size, strategy):
    pool(size, losses_of_gemma2, strategy)
