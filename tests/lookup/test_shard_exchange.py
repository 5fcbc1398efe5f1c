"""Third-party collectives on the weight of a sharded table."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tp_embed import ShardedEmbedding, VocabShardedEmbedding

V, E = 7, 6


def exchange(gang, kind):
    """Runs collectives over the gang, and over a group of one rank, as for data parallelism."""
    embed = kind(gang, V, E)
    before = embed.weight.full_tensor().clone() if gang.size > 1 else embed.weight.detach().clone()
    alone = (
        [dist.new_group([rank]) for rank in range(dist.get_world_size())] if gang.size == 4 else []
    )
    outcomes = {}
    for name, call in {
        "broadcast": lambda group: dist.broadcast(embed.weight, gang.global_ranks[0], group=group),
        "data": lambda group: dist.all_reduce(embed.weight.data, group=group),
        "all_reduce": lambda group: dist.all_reduce(embed.weight, group=group),
    }.items():
        with torch.no_grad():
            try:
                call(gang.as_process_group())
                outcomes[name] = "done"
            except ValueError as e:
                outcomes[name] = str(e)
            if alone:
                dist.all_reduce(embed.weight.data, group=alone[dist.get_rank()])
    after = embed.weight.full_tensor() if gang.size > 1 else embed.weight
    return outcomes, torch.equal(before, after)


@pytest.mark.parametrize("kind", [ShardedEmbedding, VocabShardedEmbedding])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shards_of_a_gang_are_not_exchanged_for_each_other(pool, kind, size):
    for outcomes, is_same in pool(size, exchange, kind):
        assert is_same
        for name, outcome in outcomes.items():
            if size == 1:
                assert outcome == "done"
            else:
                function = "all_reduce" if name == "data" else name
                assert outcome.startswith(f"`{function}` must be given the whole table")
