"""Compares the fused head of TRL's trainers over a sharded table with TRL alone."""

from __future__ import annotations

import pytest
import torch
from trl.trainer import utils

from hf_models import build, ids
from tp_embed import OutputHead, shard_embeddings
from tp_embed.gang.collectives import whole_table
from tp_embed.integrations.transformers.forward import check_forward
from tp_embed.parameter.sharded import local

VALUES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# What TRL reads of a config.
CONFIGS = {
    "plain": {},
    "soft cap": {"final_logit_softcapping": 5.0},
    "scale": {"logit_scale": 0.3},
}


def made(name, config, temperature=0.7):
    model = build(name).train()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20.0  # Else the largest logits are near others.
    for key, value in CONFIGS[config].items():
        setattr(model.config, key, value)
    utils.add_fused_lm_head(model, temperature=temperature, outputs=VALUES)
    return model


def step(model):
    labels = ids().clone()
    labels[0, :3] = -100
    output = model(input_ids=ids(), labels=labels, fused_lm_head=True)
    # As trainers use them: log-probs and entropies have gradients.
    (output.loss + output.log_probs.exp().sum() - 0.1 * output.entropy.sum()).backward()
    return output


def check_values(gang, name, config, strategy, patched_first):
    plain = made(name, config)
    expected = step(plain)
    model = made(name, config) if patched_first else build(name).train()
    if not patched_first:
        shard_embeddings(model, gang, strategy=strategy)
        with torch.no_grad():
            local(model.get_output_embeddings().weight).mul_(20.0)
        for key, value in CONFIGS[config].items():
            setattr(model.config, key, value)
        utils.add_fused_lm_head(model, temperature=0.7, outputs=VALUES)
        check_forward(model)  # As `ShardTables` does when training begins.
    else:
        shard_embeddings(model, gang, strategy=strategy)
    check_forward(model)  # Idempotent.
    assert isinstance(model.get_output_embeddings(), OutputHead)
    found = step(model)
    for value in ("loss", *VALUES):
        torch.testing.assert_close(
            getattr(found, value), getattr(expected, value), rtol=1e-5, atol=2e-6
        )
    layers = {m.weight: m for m in model.modules() if hasattr(m, "shard_dim")}
    wanted = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        grad = parameter.grad
        if layer := layers.get(parameter):
            part = local(grad).contiguous()
            grad = whole_table(part, layer.shard_dim, gang, layer.partition)
        torch.testing.assert_close(grad, wanted[key].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(input_ids=ids()).logits, plain(input_ids=ids()).logits, rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        tokens = model.generate(ids()[:, :4], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, plain.generate(ids()[:, :4], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_values_of_tokens_are_those_of_trl(pool, name, config, strategy):
    for size in (1, 2, 3):
        pool(size, check_values, name, config, strategy, size != 2)


def cap_and_scale(gang):
    model = made("llama", "soft cap")
    model.config.logit_scale = 0.5
    utils.add_fused_lm_head(model, outputs=VALUES)
    shard_embeddings(model, gang, strategy="vocab")
    with pytest.raises(ValueError, match="a soft cap or a scale of a sharded head, but not both"):
        step(model)


def test_a_cap_of_scaled_logits_is_refused(pool):
    pool(2, cap_and_scale)
