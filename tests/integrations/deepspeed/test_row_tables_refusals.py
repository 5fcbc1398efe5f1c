"""What tables with an optimizer of their own refuse, before there is an engine."""

from __future__ import annotations

import re

import torch
from torch import nn

from tp_embed import VocabShardedEmbedding
from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.integrations.deepspeed.sharding import shard_model

ADAGRAD = {"optimizer": "rowwise_adagrad"}


class Model(nn.Module):
    def __init__(self, gang):
        super().__init__()
        self.tied, self.frozen = nn.Embedding(6, 4), nn.Embedding(6, 4)
        self.frozen.weight.requires_grad_(False)
        self.plain, self.same = nn.Embedding(6, 4), nn.Embedding(6, 4)
        self.same.weight = self.plain.weight
        self.whole = nn.Embedding(6, 4)
        self.sharded = VocabShardedEmbedding(gang, 6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tied.weight


def shard(gang, tables, own=True, groups=None, **config):
    """Returns the model and its own tables, or the error."""
    model = Model(gang)
    section = {"tables": tables, "rules": {"whole": "none"}}
    ds_config, section = read_section({"tp_embed": section, **config})
    own_tables = [] if own else None
    parameters = None if groups is None else groups(model)
    try:
        shard_model(model, ds_config, section, parameters=parameters, own_tables=own_tables)
    except ValueError as e:
        return str(e)
    return model, own_tables, parameters


def refused(gang, cases):
    return [shard(gang, **case) for case in cases]


CASES = [
    ({"tables": {"tied": ADAGRAD}}, "'tied' must have no output head, .* Untie the head, or take"),
    (
        {"tables": {"whole": ADAGRAD}},
        "'whole' must be sharded by 'embed', 'vocab' or 'world', but stays",
    ),
    ({"tables": {"frozen": ADAGRAD}}, "'frozen' must require a gradient, but is frozen"),
    ({"tables": {"none*": ADAGRAD}}, r"must match names of tables, but 'none\*' matches none of"),
    ({"tables": {"plain": ADAGRAD}, "own": False}, "must be left out for a `PipelineModule`"),
    (
        {"tables": {"plain": ADAGRAD}, "bf16": {"enabled": True}},
        r"`zero_optimization\.stage` must be 1, 2 or 3 for bf16 with `tp_embed\.tables`",
    ),
    (
        {
            "tables": {"plain": ADAGRAD},
            "zero_optimization": {"stage": 1, "compute_grad_norm": False},
        },
        r"`zero_optimization\.compute_grad_norm` must be true",
    ),
    (
        {"tables": {"plain": ADAGRAD}, "checkpoint": {"use_node_local_storage": True}},
        "`checkpoint.use_node_local_storage` must be false",
    ),
    (
        {"tables": {"plain": ADAGRAD}, "torch_autocast": {"enabled": True}},
        "`torch_autocast` must be left out",
    ),
]


def test_refuses(pool):
    (found,) = pool(1, refused, [case for case, _ in CASES])
    for error, (_, message) in zip(found, CASES, strict=True):
        assert isinstance(error, str), message
        assert re.search(message, error), error


def groups_of(model):
    return [{"params": [model.plain.weight, model.head.weight]}, {"params": [model.whole.weight]}]


def set_apart(gang):
    tables = {"pl*": ADAGRAD, "sharded": {"optimizer": "rowwise_adam", "lr": 0.5}}
    fp16 = {"enabled": True}
    model, own, groups = shard(
        gang, tables, groups=groups_of, fp16=fp16, zero_optimization={"stage": 3}
    )
    names = dict(model.named_parameters())
    return {
        "names": sorted(names),
        "own": [(t.name, type(t.optimizer).__name__, t.follows, len(t.layers)) for t in own],
        "sparse": [t.layers[0].sparse for t in own],
        "dtypes": [str(t.weight.dtype) for t in own],
        "is_same": model.same.weight is model.plain.weight is own[0].weight,
        "sizes": [len(group["params"]) for group in groups],
        "state": sorted(model.state_dict()),
        "moved": type(model.to(torch.float64).plain.weight).__name__,
        "is_kept": model.plain.weight is own[0].weight,
        "dtype": str(model.plain.weight.dtype),
    }


def test_sets_tables_apart(pool):
    (found,) = pool(1, set_apart)
    assert found["names"] == ["frozen.weight", "tied.weight", "whole.weight"]
    assert found["own"] == [
        ("plain", "RowwiseAdagrad", True, 2),
        ("sharded", "RowwiseAdam", False, 1),
    ]
    assert found["sparse"] == [True, True]
    assert found["dtypes"] == ["torch.float16", "torch.float16"]
    assert found["sizes"] == [1, 1]
    names = "frozen", "head", "plain", "same", "sharded", "tied", "whole"
    assert found["state"] == [f"{name}.weight" for name in names]
    assert found["is_same"]
    assert found["is_kept"]
    assert found["dtype"] == "torch.float64"
