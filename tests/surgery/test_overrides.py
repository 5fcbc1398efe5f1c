"""Methods that a table overrides: a shard keeps what they do, or is refused."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from tp_embed import FakeGang, shard_embeddings

MIDDLE = FakeGang("cpu", rank=1, size=3)
V, E = 7, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, E), nn.Linear(E, V, bias=False)


class Calls(nn.Embedding):
    def __call__(self, ids):
        return 10 * super().__call__(ids)


class Loads(nn.Embedding):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}table")


class Calling(nn.Linear):
    __call__ = Calls.__call__


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: setattr(m, "embed", Calls(V, E)), TypeError, "must not override `__call__`"),
        (
            lambda m: setattr(m, "embed", Loads(V, E)),
            TypeError,
            "override `_load_from_state_dict`",
        ),
        (lambda m: setattr(m.embed, "train", print), TypeError, "must not replace `train`"),
        (lambda m: setattr(m.embed, "gang", 1), ValueError, "no attribute `gang`"),
        (lambda m: setattr(m.embed, "rows", 1), ValueError, "no attribute `rows`"),
    ],
)
def test_what_a_shard_would_not_do_is_refused(spoil, error, message):
    model = Model()
    spoil(model)
    with pytest.raises(error, match=rf"'embed'.*{message}"):
        shard_embeddings(model, FakeGang("cpu"))


def test_heads_are_looked_at_too():
    model = nn.ModuleDict({"head": Calling(E, V)})
    with pytest.raises(TypeError, match="but `Calling` does"):
        shard_embeddings(model, MIDDLE, rules={"head": "vocab"})


class Ones(nn.Embedding):
    def reset_parameters(self):
        nn.init.ones_(self.weight)


def test_initialization_of_a_class_is_not_replaced_in_silence():
    model = nn.ModuleList([Ones(V, E)])
    shard_embeddings(model, FakeGang("cpu"))
    assert model[0].weight.eq(1).all()
    with pytest.raises(ValueError, match="was a `Ones` must have an `init_fn`"):
        copy.deepcopy(model)[0].reset_parameters()
