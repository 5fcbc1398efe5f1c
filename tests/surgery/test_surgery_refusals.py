"""Models that cannot be sharded are refused, and stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from surgery_models import MIDDLE, assert_refused, build
from tp_embed import VocabShardedEmbedding, shard_embeddings
from tp_embed.nn import init


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 10 * super().forward(ids)


def pair():
    """A table that can be sharded, and one that is yet to be spoilt."""
    model = nn.Module()
    model.good, model.bad = nn.Embedding(7, 4), nn.Embedding(7, 4)
    return model


def tied_to_a_bag(model):
    model.other = nn.EmbeddingBag(7, 4)
    model.other.weight = model.bad.weight


BAD_ARGUMENTS = [
    ({"strategy": "rows"}, r"`strategy` must be one of .*, but is 'rows' instead"),
    ({"rules": {"bad": "?"}}, r"`rules\['bad'\]` must be .*, but is '\?' instead"),
    ({"rules": {"good": "vocab", "*.wpe": "none"}}, r"but \['\*.wpe'\] match none"),
]


BAD_TABLES = {
    "max_norm": (
        lambda m: setattr(m.bad, "max_norm", 1.0),
        r"'bad' must not use `max_norm`.* is 1.0 instead. .*`rules={'bad': 'none'}`",
    ),
    "scale_grad_by_freq": (
        lambda m: setattr(m.bad, "scale_grad_by_freq", True),
        r"'bad' must not use `scale_grad_by_freq`",
    ),
    "forward of the class": (
        lambda m: setattr(m, "bad", Scaled(7, 4)),
        r"'bad' must be .* but is a `Scaled` with a `forward` of its own",
    ),
    "forward of the object": (
        lambda m: setattr(m.bad, "forward", lambda ids: 10 * m.bad.weight[ids]),
        r"'bad' .* a `forward`",
    ),
    "narrow": (
        lambda m: setattr(m.bad, "weight", nn.Parameter(torch.zeros(7, 2))),
        r"'bad' must be whole, .*\(7, 4\), but it has \(7, 2\)",
    ),
    "integers": (
        lambda m: setattr(m.bad, "weight", nn.Parameter(torch.ones(7, 4).char(), False)),
        r"'bad' must have a floating-point dtype, but has torch.int8",
    ),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.bad, "weight", nn.Tanh()),
        r"'bad' must hold its `weight` as a Parameter",
    ),
    "tied to a bag": (
        tied_to_a_bag,
        r"The table 'bad' must be shared .* 'other.weight' of a `EmbeddingBag`",
    ),
    "hooks of the state dict": (
        lambda m: m.bad.register_state_dict_post_hook(lambda *args: None),
        r"'bad' must not have state dict hooks",
    ),
    "hooks of loading": (
        lambda m: m.bad.register_load_state_dict_pre_hook(lambda *args: None),
        r"'bad' must not have state dict hooks",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
def test_bad_arguments_leave_the_model_as_it_was(options, message):
    assert_refused(pair(), ValueError, message, **options)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table_leaves_the_model_as_it_was(name):
    model, (spoil, message) = pair(), BAD_TABLES[name]
    spoil(model)
    assert_refused(model, TypeError if "forward" in name else ValueError, message)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table_can_be_left_out_but_not_initialised(name):
    model = pair()
    BAD_TABLES[name][0](model)
    bad = model.bad
    shard_embeddings(model, MIDDLE, rules={"bad": "none"})
    assert isinstance(model.good, VocabShardedEmbedding)  # Of 3 x 4 items, not 7 x 2.
    assert model.bad is bad

    if name in ("narrow", "integers", "parametrized"):
        options = {"rules": {"bad": "none"}, "init_fn": init.zeros}
        model = pair()
        BAD_TABLES[name][0](model)
        assert_refused(model, ValueError, "'bad' must", **options)


@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_failed_init_fn_leaves_the_model_as_it_was(strategy):
    values = [1.0]  # The second table gets none.
    options = {"strategy": strategy, "init_fn": lambda embed: embed.weight.fill_(values.pop())}
    assert_refused(pair(), IndexError, "pop from empty list", **options)


def test_model_that_is_a_table_is_refused():
    table = nn.Embedding(7, 4)
    with pytest.raises(ValueError, match=r"but is a table itself. Use\s+`ShardedEmbedding.from_"):
        shard_embeddings(table, MIDDLE)
    shard_embeddings(table, MIDDLE, strategy="none")
    assert type(table) is nn.Embedding


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_head_that_is_more_than_linear_stays():
    model = build("llama")
    model.lm_head = OwnLinear(20, 103)
    shard_embeddings(model, MIDDLE)
    assert type(model.lm_head) is OwnLinear
    model = build("llama")
    model.lm_head = OwnLinear(20, 103)
    assert_refused(model, ValueError, "but 'lm_head' is a `OwnLinear`", rules={"lm_head": "vocab"})


class WithDropout(nn.Embedding):
    embed_scale = 2.0

    def forward(self, ids):
        return nn.functional.dropout(super().forward(ids) * self.embed_scale, 0.5, self.training)


class WithSpecialId(nn.Embedding):
    embed_scale = 2.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale * (ids != 5)[..., None]


@pytest.mark.parametrize("kind", [WithDropout, WithSpecialId])
def test_tables_that_do_more_than_scale_are_refused(kind):
    model = nn.Sequential(kind(11, 6)).eval()
    assert_refused(model, TypeError, "with a `forward` of its own")


class WithState(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("count", torch.zeros(()))


class LearnedScale(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.embed_scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def test_tables_and_heads_with_more_state_are_refused():
    model = nn.Sequential(WithState(11, 6))
    assert_refused(model, ValueError, r"must have no Parameters, buffers .* has \['count'\]")
    model = nn.Sequential(LearnedScale(11, 6))
    assert_refused(model, TypeError, "with a `forward` of its own")
    model = build("llama")
    model.lm_head.register_state_dict_post_hook(lambda *args: None)
    assert_refused(model, ValueError, "The table 'lm_head' must not have state dict hooks")
