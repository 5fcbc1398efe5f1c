"""Models that the tests of `shard_embeddings()` shard, and how it refuses one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from parity import whole
from tp_embed import FakeGang, OutputHead, ShardedEmbedding, VocabShardedEmbedding, shard_embeddings
from tp_embed.gang.collectives import all_gather_columns
from tp_embed.parameter.sharded import local

SIZES = [1, 2, 3, 4]
MIDDLE = FakeGang("cpu", rank=1, size=3)
IDS = torch.tensor([[1, 5, 102, 7, 5], [0, 3, 101, 1, 50]])


def llama(**options):
    sizes = {"vocab_size": 103, "hidden_size": 20, "intermediate_size": 24}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options))


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    config = GPT2Config(vocab_size=103, n_positions=9, n_embd=20, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


class Tower(nn.Module):
    """Two tables with one Parameter, another that is registered twice, and a head with a bias."""

    def __init__(self):
        super().__init__()
        self.source = nn.Embedding(103, 10, padding_idx=3)
        self.target = nn.Embedding(103, 10)
        self.target.weight = self.source.weight
        self.kinds = nn.ModuleList([nn.Embedding(7, 10)])
        self.kinds.append(self.kinds[0])
        self.mix = nn.Linear(10, 10)
        self.head = nn.Linear(10, 103)
        self.head.weight = self.source.weight

    def forward(self, ids):
        first, second = self.kinds
        x = self.source(ids) + self.target(ids.flip(1)) + first(ids % 7) * second(ids % 5)
        return self.head(torch.tanh(self.mix(x)))


def build(name):
    torch.manual_seed(0)
    models = {"llama": llama, "tied llama": tied_llama, "gpt2": gpt2, "tower": Tower}
    return models[name]().eval()


def seen(model):
    """The logits, and the gradient of each Parameter, put together where it is sharded."""
    output = model(IDS)
    logits = getattr(output, "logits", output)
    nn.functional.cross_entropy(logits.flatten(0, 1), IDS.roll(1).flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (ShardedEmbedding, VocabShardedEmbedding)):
            gradients[f"{name}.weight"] = whole(module, module.weight.grad)
        elif isinstance(module, OutputHead) and module.shard_dim == 0:
            # As the columns of its transpose, which any tie has put there already.
            grad = all_gather_columns(local(module.weight.grad).T, module.gang, module.partition)
            gradients[f"{name}.weight"] = grad.T
    # A shared Parameter goes by its first name.
    return logits.detach(), {name: gradients[name] for name, _ in model.named_parameters()}


def seen_sharded(gang, name, options):
    model = build(name)
    report = shard_embeddings(model, gang, **options)
    return *seen(model), {table.name: table.strategy for table in report.tables}


def state(model):
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return modules, {name: (id(p), p.detach().tolist()) for name, p in parameters.items()}


def assert_refused(model, error, message, **options):
    before = state(model)
    with pytest.raises(error, match=message):
        shard_embeddings(model, MIDDLE, **options)
    assert state(model) == before
