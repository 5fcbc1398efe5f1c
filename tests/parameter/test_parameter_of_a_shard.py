"""A new layer made of a shard is refused, or refuses to compute with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parity import SHARDED
from tp_embed import StandardEmbedding

V, E = 11, 5
IDS = torch.tensor([[1, 2], [4, 2]])


def make_layers(gang, kind):
    embed = SHARDED[kind].from_embedding(StandardEmbedding(V, E), gang)
    if gang.size == 1:
        assert torch.equal(nn.Embedding.from_pretrained(embed.weight)(IDS), embed(IDS))
        assert nn.Parameter(embed.weight).data_ptr() == embed.weight.data_ptr()
        return
    for make in (nn.Parameter, nn.Embedding.from_pretrained):
        with pytest.raises(ValueError, match=r"`torch.nn.Parameter` must be given the whole table"):
            make(embed.weight)
    for part in (embed.weight.data, embed.weight.detach(), embed.weight.clone()):
        with pytest.raises(ValueError, match=r"`embedding` must be given the whole table"):
            nn.Embedding.from_pretrained(part)(IDS)
    weight: Any = embed.weight
    whole = nn.Embedding.from_pretrained(weight.full_tensor())
    assert torch.equal(whole(IDS), embed(IDS))


@pytest.mark.parametrize("kind", sorted(SHARDED))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_layers_of_a_shard_are_refused(pool, size, kind):
    pool(size, make_layers, kind)
