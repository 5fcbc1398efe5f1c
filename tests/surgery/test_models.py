"""Models of transformers with sharded tables and heads compute the same as before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from hf_models import V, small_models, small_sizes
from parity import whole
from tp_embed import FakeGang, OutputHead, ShardedEmbedding, VocabShardedEmbedding, shard_embeddings
from tp_embed.integrations.transformers import shard_logits

MODELS = {
    **small_models(layers=2),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": V,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
            "dropout_rate": 0.0,
        },
    ),
}
TIED = sorted(set(MODELS) - {"llama"})


class Custom(nn.Module):
    """Not from transformers: uses a table twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.mlp = nn.Linear(16, 16)
        self.head = nn.Linear(16, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)).tanh())


def build(name):
    torch.manual_seed(0)
    model_class, config_class, options = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    return model.eval()


def batch():
    ids = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def tokens(model):
    ids = batch()["input_ids"][:, :4]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )


def step(model):
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    return output


def check_model(gang, name, strategy, sharded_logits):
    model = build(name)
    expected, expected_tokens = step(model), tokens(model)
    gradients = {n: p.grad for n, p in model.named_parameters()}

    shard_embeddings(model, gang, strategy=strategy)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embed, (ShardedEmbedding, VocabShardedEmbedding))
    assert isinstance(head, OutputHead)
    assert (head.weight is embed.weight) == (name in TIED)
    if sharded_logits:
        shard_logits(model)
    found = step(model)

    torch.testing.assert_close(found.loss, expected.loss)
    own = head.partition.shard(gang.rank) if sharded_logits else range(V)
    torch.testing.assert_close(found.logits, expected.logits[..., own.start : own.stop])
    tables = {
        module.weight: module
        for module in model.modules()
        if isinstance(module, (ShardedEmbedding, VocabShardedEmbedding))
    }
    for parameter_name, parameter in model.named_parameters():
        grad = parameter.grad
        if parameter in tables:
            grad = whole(tables[parameter], grad)
        elif parameter is head.weight:
            rows = head.partition.shard(gang.rank)
            gradients[parameter_name] = gradients[parameter_name][rows.start : rows.stop]
        torch.testing.assert_close(
            grad, gradients[parameter_name], rtol=1e-4, atol=1e-5, msg=parameter_name
        )
    assert torch.equal(tokens(model), expected_tokens)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch().items() if k != "labels" or name == "t5"}).logits
    torch.testing.assert_close(logits, expected.logits)


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_computes_what_it_did(pool, name, strategy):
    for size in (2, 3):
        pool(size, check_model, name, strategy, False)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"t5"}))
def test_loss_of_rank_local_logits(pool, name):
    pool(2, check_model, name, "vocab", True)


def copies_of_a_model_with_sharded_logits(gang):
    model = build("llama")
    shard_embeddings(model, gang, strategy="vocab")
    shard_logits(model)
    expected = step(model)
    assert model.lm_head.output == "replicated"
    with pytest.raises(ValueError, match=r"`target` must have the shape \(2,\)"):
        model(**batch(), logits_to_keep=1)
    assert model.lm_head.output == "replicated"
    ids = batch()["input_ids"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            torch.testing.assert_close(twin(ids, labels=batch()["labels"]).loss, expected.loss)
            assert twin(ids).logits.shape == (2, 9, V)
        assert twin.loss_function._head is twin.lm_head is not model.lm_head


def test_copies_of_a_model_with_sharded_logits(pool):
    pool(2, copies_of_a_model_with_sharded_logits)


def loss_arguments(gang):
    """The Trainer's arguments, and flat labels that are already shifted."""
    model = build("llama")
    labels = batch()["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = model(**batch(), num_items_in_batch=7).loss
    shard_embeddings(model, gang, strategy="vocab")
    shard_logits(model)
    torch.testing.assert_close(model(**batch(), num_items_in_batch=7).loss, expected)
    ids = batch()["input_ids"]
    found = model(ids, labels=labels, shift_labels=shifted.flatten(), num_items_in_batch=7).loss
    torch.testing.assert_close(found, expected)


def test_arguments_of_the_loss(pool):
    pool(2, loss_arguments)


def check_custom(gang, strategy):
    torch.manual_seed(0)
    model = Custom()
    ids = batch()["input_ids"]
    expected = model(ids)
    expected.square().sum().backward()
    gradient = model.embed.weight.grad
    model.zero_grad()  # A gradient carries over to the shard.
    shard_embeddings(model, gang, strategy=strategy)
    found = model(ids)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(whole(model.embed, model.embed.weight.grad), gradient)


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
def test_custom_model(pool, strategy):
    pool(2, check_custom, strategy)


def test_sharded_logits_need_a_head_over_the_vocabulary_and_a_loss_function():
    gang = FakeGang("cpu", rank=1, size=3)
    model = build("llama")
    with pytest.raises(ValueError, match="must be an `OutputHead` over the vocabulary, but is Lin"):
        shard_logits(model)
    model = build("t5")
    shard_embeddings(model, gang)
    with pytest.raises(ValueError, match=r"but a `T5ForConditionalGeneration` does not\. Take"):
        shard_logits(model)
    model = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **{**small_sizes(layers=2), "hidden_size": 16, "global_attn_every_n_layers": 1}
        )
    )
    shard_embeddings(model, gang, strategy="vocab")
    with pytest.raises(
        ValueError, match=r"must be `ForCausalLMLoss` of transformers, but for this"
    ):
        shard_logits(model)
