"""Models whose `forward` multiplies by the head's weight itself, as fused losses do."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_models import build, ids
from tp_embed import FakeGang, shard_embeddings
from tp_embed.integrations.transformers.forward import check_forward

GANG = FakeGang("cpu", rank=0, size=2)
MESSAGE = "must call its output head if that is sharded, but was replaced by"


def fused(self, input_ids, labels=None, **kwargs):
    """Computes a loss as TRL, Liger and Unsloth do."""
    hidden = self.model(input_ids=input_ids).last_hidden_state
    logits = hidden @ self.lm_head.weight.T
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss)


@functools.wraps(LlamaForCausalLM.forward)
def as_original(self, *args, **kwargs):
    return fused(self, *args, **kwargs) if self.get_output_embeddings().weight.ndim else None


def patch_instance(model, monkeypatch):
    model.forward = types.MethodType(fused, model)


def patch_class(model, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", fused)


def patch_wrapped(model, monkeypatch):
    model.forward = types.MethodType(as_original, model)


@pytest.mark.parametrize("name", ["llama", "tied llama"])
@pytest.mark.parametrize("patch", [patch_instance, patch_class, patch_wrapped])
@pytest.mark.parametrize("strategy", ["embed", "vocab"])
def test_a_forward_that_reads_the_head_is_refused(monkeypatch, name, patch, strategy):
    model = build(name)
    patch(model, monkeypatch)
    loss = model(input_ids=ids(), labels=ids()).loss
    modules = list(model.modules())
    with pytest.raises(ValueError, match=MESSAGE) as caught:
        shard_embeddings(model, GANG, strategy=strategy)
    assert "shard_head=False" in str(caught.value)
    assert "tie_head=False" in str(caught.value)
    assert list(model.modules()) == modules
    torch.testing.assert_close(model(input_ids=ids(), labels=ids()).loss, loss)
    # Allowed with a whole head.
    shard_embeddings(model, GANG, strategy=strategy, shard_head=False, tie_head=False)


@pytest.mark.parametrize("patch", [patch_instance, patch_class, patch_wrapped])
def test_a_patch_that_comes_later_is_found_before_training(monkeypatch, patch):
    model = build("llama")
    shard_embeddings(model, GANG)
    check_forward(model)
    patch(model, monkeypatch)
    with pytest.raises(ValueError, match=MESSAGE):
        check_forward(model)
    # It would have raised anyway.
    with pytest.raises(ValueError, match="must be given the whole table"):
        model(input_ids=ids(), labels=ids())


def test_wrappers_of_forward_are_left_alone():
    model = build("llama")
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    shard_embeddings(model, GANG)
    check_forward(model)
