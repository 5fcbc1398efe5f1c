"""Compares PEFT's LoRA on models with sharded tables with plain PEFT."""

from __future__ import annotations

import peft
import pytest
import torch

from hf_models import build, ids, logits
from tp_embed import FakeGang, shard_embeddings
from tp_embed.integrations.transformers import get_peft_model

# Rank 0 of the job writes, and is in no smaller gang of the pool.
SIZE = 4
STEPS = 3
CASES = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def lora(case):
    return peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", **CASES[case])


def train(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    model.train()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def train_sharded(gang, name, case, strategy, order, directory):
    torch.manual_seed(0)
    model = build(name)
    if order == "shard first":
        shard_embeddings(model, gang, strategy=strategy)
        model = get_peft_model(model, lora(case))
    else:
        model = peft.get_peft_model(model, lora(case))
        shard_embeddings(model, gang, strategy=strategy)
    losses = train(model)
    model.save_pretrained(directory)
    gang.barrier()
    merged = logits(model.merge_and_unload()) if "whole" not in case else None
    return losses, merged


@pytest.mark.parametrize("order", ["shard first", "PEFT first"])
@pytest.mark.parametrize(
    ("name", "case", "strategy"),
    [
        ("llama", "attention", "auto"),
        ("llama", "table", "embed"),
        ("llama", "table", "vocab"),
        ("tied llama", "table", "auto"),
        ("gemma3", "table", "embed"),
        ("llama", "whole table", "embed"),
        ("llama", "whole table", "vocab"),
        ("llama", "whole head", "auto"),
    ],
)
def test_training_and_adapter_are_those_of_peft(pool, tmp_path, name, case, strategy, order):
    found = pool(SIZE, train_sharded, name, case, strategy, order, tmp_path)
    alone = build(name)
    # `build` seeds, and PEFT draws A after it, as on the ranks.
    alone = peft.get_peft_model(alone, lora(case))
    expected = train(alone)
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(alone), rtol=1e-3, atol=1e-4)
    merged_alone = logits(alone.merge_and_unload())  # This changes a tied head, too.
    for losses, merged in found:
        assert losses == pytest.approx(expected, rel=1e-5)
        if merged is not None:
            torch.testing.assert_close(merged, merged_alone, rtol=1e-3, atol=1e-4)


def test_what_needs_the_whole_table_is_refused():
    gang = FakeGang("cpu", rank=0, size=2)

    def refused(**options):
        model = build("llama")
        shard_embeddings(model, gang)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the caller matches)
            get_peft_model(model, peft.LoraConfig(r=4, **options))
        return str(caught.value)

    assert "`use_dora` must be left as it is" in refused(
        target_modules=["embed_tokens"], use_dora=True
    )
    assert "`init_lora_weights` must be left" in refused(
        target_modules=["embed_tokens"], init_lora_weights="mica"
    )
    assert "must not name an output head" in refused(target_modules=["lm_head"])
    model = build("llama")
    shard_embeddings(model, gang)
    # Allowed elsewhere.
    get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


@pytest.mark.parametrize(
    ("options", "sharding", "match"),
    [
        ({"target_modules": ["embed_tokens"], "use_dora": True}, {}, "`use_dora` must be left"),
        (
            {"target_modules": ["lm_head"]},
            {"rules": {"base_model.model.lm_head.base_layer": "vocab"}},
            "must not name an output head",
        ),
    ],
)
def test_adapters_that_are_there_are_refused_before_anything_changes(options, sharding, match):
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, **options))
    before, modules = logits(model), list(model.modules())
    with pytest.raises(ValueError, match=match):
        shard_embeddings(model, FakeGang("cpu", rank=0, size=2), **sharding)
    assert list(model.modules()) == modules
    torch.testing.assert_close(logits(model), before)
