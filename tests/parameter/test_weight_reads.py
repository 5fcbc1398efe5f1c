"""Models that read `embed.weight` get right results, or an error that names the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    DetrConfig,
    DetrModel,
    ProphetNetConfig,
    ProphetNetModel,
    ResNetConfig,
)

from tp_embed import shard_embeddings

IDS = torch.tensor([[1, 5, 9, 4], [2, 9, 9, 7]])
STRATEGIES = ["auto", "embed", "vocab"]


class Reads(nn.Module):
    """Reads its table with ``read``."""

    def __init__(self, read):
        super().__init__()
        self.words, self.read = nn.Embedding(11, 6), read

    def forward(self, ids):
        return self.read(self.words(ids), self.words.weight, ids)


READS = {
    "a tied head": lambda x, weight, ids: linear(x, weight),
    "a product": lambda x, weight, ids: x @ weight.t(),
    "einsum": lambda x, weight, ids: torch.einsum("bse,ve->bsv", x, weight),
    "rows": lambda x, weight, ids: x + weight[ids],
    "a lookup": lambda x, weight, ids: x + nn.functional.embedding(ids, weight),
    "queries": lambda x, weight, ids: x.sum() + weight.unsqueeze(0).repeat(2, 1, 1),
    "data": lambda x, weight, ids: x @ weight.data.T,
    "a norm": lambda x, weight, ids: x / weight.norm(),
}


def prophetnet():
    sizes = {"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 30}
    sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 1, "max_position_embeddings": 20}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    return ProphetNetModel(ProphetNetConfig(**sizes, **heads))


def clip():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 12, "vocab_size": 30}
    return CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=2, bos_token_id=1))


def detr():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    sizes = {"num_queries": 5, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
    backbone = ResNetConfig(**stages, out_features=["stage2"])
    config = DetrConfig(
        **sizes, decoder_attention_heads=2, use_timm_backbone=False, backbone_config=backbone
    )
    return DetrModel(config)


POSITIONS = {"*.position_embeddings": "none"}
MODELS = {
    "clip": (clip, {"input_ids": IDS}),
    "prophetnet": (prophetnet, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "detr": (detr, {"pixel_values": torch.linspace(-1, 1, 6144).view(2, 3, 32, 32)}),
}


def build(name):
    torch.manual_seed(0)
    return (MODELS[name][0]() if name in MODELS else Reads(READS[name])).eval()


def output(model, name):
    inputs = MODELS[name][1] if name in MODELS else {"ids": IDS}
    found = model(**inputs)
    return (found if torch.is_tensor(found) else found.last_hidden_state).detach()


def read(gang, name, strategy, rules):
    model = build(name)
    shard_embeddings(model, gang, strategy=strategy, rules=rules)
    return output(model, name)


def refused(gang, name, strategy, rules, table):
    with pytest.raises(ValueError, match="must be given the whole table") as raised:
        read(gang, name, strategy, rules)
    return f"rules={{{table!r}: 'none'}}" in str(raised.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_reads(pool, size, name, strategy):
    expected = output(build(name), name)
    if size == 1:
        found = pool(1, read, name, strategy, {})
    else:
        assert all(pool(size, refused, name, strategy, {}, "words"))
        found = pool(size, read, name, strategy, {"words": "none"})
    for one in found:
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize(
    ("name", "table", "rules"),
    [
        ("detr", "query_position_embeddings", {}),
        ("prophetnet", "decoder.ngram_embeddings", POSITIONS),
        ("clip", None, {}),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_models(pool, strategy, name, table, rules):
    expected = output(build(name), name)
    if table is not None:
        assert all(pool(2, refused, name, strategy, rules, table))
        rules = {**rules, table: "none"}
    for one in pool(2, read, name, strategy, rules):
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
