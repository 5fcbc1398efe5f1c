"""Surgery is planned before anything changes, and ranks meet once for all of it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from launch import ROOT
from tp_embed import FakeGang, GangError, StandardEmbedding, shard_embeddings
from tp_embed.nn import init
from tp_embed.surgery.options import ShardingOptions
from tp_embed.surgery.plan import agree_on_plan, plan_sharding

V, E = 11, 6
MEETING = ["all_gather", "all_gather"]


class Model(nn.Module):
    """Has tables of each kind: torch's, ours, tied to a head, and an untied output head."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Embedding(V, E)
        self.ours = StandardEmbedding(V, E, pad_idx=2)
        self.tied = nn.Embedding(V, E)
        self.tied_head = nn.Linear(E, V)
        self.tied_head.weight = self.tied.weight
        self.head = nn.Linear(E, V)

    def get_output_embeddings(self):
        return self.head


def state(model):
    modules = [type(module).__name__ for module in model.modules()]
    hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
    return modules, hooks, [(type(p).__name__, p.detach().clone()) for p in model.parameters()]


def assert_same_state(model, before):
    modules, hooks, parameters = state(model)
    assert (modules, hooks) == before[:2]
    for (kind, found), (expected_kind, expected) in zip(parameters, before[2], strict=True):
        assert kind == expected_kind
        assert torch.equal(found, expected)


def collectives(gang, strategy, init_fn):
    torch.manual_seed(0)
    called = []
    with gang.register_collective_hook(lambda name, _: called.append(name) or nullcontext()):
        shard_embeddings(Model(), gang, strategy=strategy, init_fn=init_fn)
    return called


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["auto", "embed", "vocab"])
def test_ranks_meet_once(pool, strategy, size):
    expected = MEETING if size > 1 else []
    assert pool(size, collectives, strategy, None) == [expected] * size


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_meet_twice_where_tables_are_drawn(pool, size):
    """Between the meetings, ranks agree on a seed for each of the three tables with ids."""
    for found in pool(size, collectives, "auto", init.normal):
        assert found[:2] == found[-2:] == MEETING
        assert "all_gather" not in found[2:-2]


def plan_and_leave(gang, strategy):
    """A plan changes nothing before it is applied."""
    torch.manual_seed(0)
    model = Model()
    before = state(model)
    options = ShardingOptions(strategy=strategy, train_rows={"plain": [1], "tied": [2, 3]})
    plan = agree_on_plan(model, gang, lambda facts: plan_sharding(model, gang, options))
    assert_same_state(model, before)
    assert len(plan.changes) == 4
    plan.apply()
    return [type(module).__name__ for module in (model.plain, model.tied, model.head)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_a_plan_changes_nothing_until_it_is_applied(pool, strategy, size):
    kind = "ShardedEmbedding" if strategy == "embed" else "VocabShardedEmbedding"
    expected = [kind, kind, "OutputHead"]
    assert pool(size, plan_and_leave, strategy) == [expected] * size


def fail_making(gang, strategy, init_fn):
    """The last rank runs out of memory for its shard of the first table."""
    torch.manual_seed(0)
    odd = gang.rank == gang.size - 1
    huge = nn.Embedding(1 << 56, E, device="meta")
    if odd:
        huge.weight = nn.Parameter(torch.zeros(()).expand(1 << 56, E))
    model = nn.ModuleDict({"huge": huge, "rest": Model()})
    before = state(model["rest"])
    with pytest.raises((RuntimeError, GangError)) as error:
        shard_embeddings(model, gang, strategy=strategy, init_fn=init_fn)
    assert model["huge"] is huge
    assert_same_state(model["rest"], before)
    total = torch.ones(())
    gang.all_reduce(total)  # No rank is left in another collective.
    assert total == gang.size
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("init_fn", [None, init.normal, init.zeros])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_rank_without_memory_for_a_shard_ends_all(pool, strategy, init_fn, size):
    found = pool(size, fail_making, strategy, init_fn)
    assert [kind for kind, _ in found] == ["GangError"] * (size - 1) + ["RuntimeError"]
    *others, last = [message for _, message in found]
    assert "can't allocate memory" in last
    for message in others:  # Without `init_fn`, ranks compare values, but meta has none.
        assert ("can't allocate memory" if init_fn else "agree on the values of 'huge'") in message


def check_ids_of_one_rank(gang):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, E))
    with pytest.raises((ValueError, GangError)) as error:
        shard_embeddings(model, gang, check_ids=-1 if gang.rank == 1 else None)
    return str(error.value)


def test_bad_option_of_one_rank_ends_all(pool):
    for message in pool(3, check_ids_of_one_rank):
        assert "`check_ids` must be True (each lookup)" in message


def test_tables_that_others_cut_stay_whole_unless_a_rule_names_them():
    gang = FakeGang("cpu", size=2)
    for rules, expected in (({}, "none"), ({"pl*": "vocab"}, "vocab")):
        plan = plan_sharding(
            Model(), gang, ShardingOptions(rules=rules), leave=lambda tables: ["plain"]
        )
        found = {group.names[0]: chosen for group, chosen in plan.choices}
        assert found == {"plain": expected, "ours": "embed", "tied": "vocab", "head": "vocab"}


def test_other_rows_than_a_table_has_are_refused():
    model = nn.Sequential(StandardEmbedding(V, E, train_rows=[1]))
    before = state(model)
    with pytest.raises(ValueError, match="must be the same as the table '0' has already"):
        shard_embeddings(model, FakeGang("cpu", size=2), train_rows={"0": [2]})
    assert_same_state(model, before)
    shard_embeddings(model, FakeGang("cpu", size=2), train_rows={"0": [1]})
    assert model[0].train_rows.tolist() == [1]


ADAPTED = """
import sys, tp_embed
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
assert not any(name.startswith("tp_embed.integrations") for name in sys.modules)
tp_embed.shard_embeddings(model, tp_embed.FakeGang("cpu", size=2))
print([kind.__name__ for kind in type(model).__mro__[:3]])
"""

PLAIN = """
import sys, torch, tp_embed

model = torch.nn.Sequential(torch.nn.Embedding(11, 4))
tp_embed.shard_embeddings(model, tp_embed.FakeGang("cpu", size=2))
print(sorted(name for name in sys.modules if name.startswith("tp_embed.integrations.")))
"""


# In a source tree, the folder of the integrations is elsewhere.
NOT_INSTALLED = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import tp_embed

model = torch.nn.Sequential(torch.nn.Embedding(11, 4))
try:
    tp_embed.shard_embeddings(model, tp_embed.FakeGang("cpu", size=2))
except ImportError as e:
    print(str(e)[-20:], type(model[0]).__name__)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (ADAPTED, "['LlamaForCausalLM', 'ResizesShards', 'SavesShards']"),
        (PLAIN, "[]"),
        (NOT_INSTALLED, "`pip install -e .`. Embedding"),
    ],
    ids=["transformers", "torch", "not installed"],
)
def test_adapters_of_packages_that_are_loaded(program, expected):
    """`import tp_embed` is enough."""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert output.stdout.strip() == expected, output.stderr


def test_adapters_are_asked_first_and_told_at_the_end(monkeypatch):
    seen = []

    class Adapter:
        def check(self, model, tables):
            seen.append((type(model.plain).__name__, len(tables)))
            if model.training:
                raise ValueError("not while it trains")

        def adapt(self, model):
            seen.append(type(model.plain).__name__)

    monkeypatch.setattr("tp_embed.surgery.adapters.ADAPTERS", [Adapter()])
    model = Model()
    with pytest.raises(ValueError, match="not while it trains"):
        shard_embeddings(model, FakeGang("cpu", size=2))
    shard_embeddings(model.eval(), FakeGang("cpu", size=2))
    assert seen == [("Embedding", 5), ("Embedding", 5), "ShardedEmbedding"]
