"""Cross entropy over a gang, against ``torch.nn.functional.cross_entropy`` of all logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional

from hf_models import small_sizes
from loss_problems import E, N, V, expected_loss, problem
from parity import whole
from tp_embed import FakeGang, OutputHead, Partition, ShardedEmbedding, shard_embeddings
from tp_embed import VocabShardedEmbedding as VocabSharded
from tp_embed.integrations.transformers import shard_logits
from tp_embed.nn import fused_loss, projection
from tp_embed.nn.loss import cross_entropy, linear_cross_entropy

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


def check_head(gang, kind, num_classes, options, chunk_bytes, block_bytes, min_tokens):
    """The fused loss of a head and, over the vocabulary, the one of its own logits."""
    fused_loss._CHUNK_BYTES, projection._BLOCK_BYTES = chunk_bytes, block_bytes
    fused_loss._MIN_TOKENS = min_tokens
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
    # One token, three tokens, and all tokens at a time; five rows of the weight, and all. Chunks of
    # fewer than the least number of tokens have their logits computed twice: those that do not fit
    # into the gradient, or all.
    for tokens, rows, least in [(0, 5, 1), (0, 5, 2), (0, 5, 4), (3, 5, 1), (N, CLASSES, 1)]:
        classes = -(-CLASSES // size) if kind is VocabSharded else CLASSES
        sizes = 4 * classes * tokens, 4 * DIM * rows
        pool(size, check_head, kind, CLASSES, options, *sizes, least)


@pytest.mark.parametrize("kind", [VocabSharded, ShardedEmbedding])
def test_loss_with_empty_shards(pool, kind):
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 2.0}
    pool(4, check_head, kind, SMALLER_THAN_GANG, options, 1 << 20, 1 << 20, 1)


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
        (
            {"accum_dtype": torch.float16},
            ValueError,
            "must be torch.float32, or None",
        ),
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
