"""PEFT's methods give the same on sharded tables as on whole ones, or are refused."""

from __future__ import annotations

import peft
import pytest
import torch

from hf_models import build, ids
from tp_embed import shard_embeddings
from tp_embed.integrations.transformers import get_peft_model

STEPS = 2


def lora(**options):
    return peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["q_proj"], **options
    )


def prompts(kind, **options):
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)


SAME = {
    "prompt tuning": lambda: prompts(peft.PromptTuningConfig),
    "prompts from the table": lambda: prompts(
        peft.PromptTuningConfig, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "p-tuning": lambda: prompts(peft.PromptEncoderConfig, encoder_hidden_size=8),
    "prefix tuning": lambda: prompts(peft.PrefixTuningConfig),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "DoRA of attention": lambda: lora(use_dora=True),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "whole tables": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
}
TOKENS = "`trainable_token_indices` must name tables that are whole"
REFUSED = {
    "tokens": (lambda: lora(trainable_token_indices=[2, 30]), TOKENS),
    "tokens by name": (
        lambda: lora(trainable_token_indices={"embed_tokens": [2], "lm_head": [2]}),
        TOKENS,
    ),
    "tokens alone": (lambda: peft.TrainableTokensConfig(token_indices=[2, 30]), TOKENS),
    "tokens tied": (
        lambda: lora(trainable_token_indices=[2, 30], ensure_weight_tying=True),
        TOKENS,
    ),
}


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
    return losses


def adapted(name, config, gang=None, strategy="vocab", order="shard first"):
    model = build(name)
    torch.manual_seed(1)
    if gang is None:
        return peft.get_peft_model(model, config)
    if order == "shard first":
        shard_embeddings(model, gang, strategy=strategy)
        return get_peft_model(model, config)
    model = peft.get_peft_model(model, config)
    shard_embeddings(model, gang, strategy=strategy)
    return model


def outcomes(gang, name):
    """Returns the losses or the error, by method, strategy and order."""
    found = {}
    for method in (*SAME, *REFUSED):
        for strategy in ("embed", "vocab"):
            for order in ("shard first", "PEFT first"):
                config = SAME[method]() if method in SAME else REFUSED[method][0]()
                try:
                    result = train(adapted(name, config, gang, strategy, order))
                except ValueError as e:
                    result = str(e)
                found[method, strategy, order] = result
    return found


@pytest.mark.parametrize("name", ["llama", "tied llama"])
@pytest.mark.parametrize("size", [2, 3])
def test_methods_train_as_on_whole_tables_or_are_refused(pool, name, size):
    expected = {method: train(adapted(name, config())) for method, config in SAME.items()}
    for found in pool(size, outcomes, name, timeout=240):
        for (method, strategy, order), result in found.items():
            case = f"{method}, {strategy}, {order}"
            if method in SAME:
                assert result == pytest.approx(expected[method], rel=2e-6), case
            else:
                assert isinstance(result, str), case
                assert result.startswith(REFUSED[method][1]), f"{case}: {result}"
                assert "rules={NAME: 'none'}" in result


def tie_a_copy(gang):
    messages = []
    for strategy in ("embed", "vocab"):
        config = lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the test matches)
            adapted("tied llama", config, gang, strategy)
        messages.append(str(caught.value))
    model = adapted("tied llama", lora(), gang)
    return messages, [hasattr(p, "ds_shape") for p in model.parameters()]


def test_a_copy_that_is_tied_to_a_head_is_refused(pool):
    for messages, marked in pool(2, tie_a_copy):
        assert all(m.startswith("`ensure_weight_tying` must be left as it is") for m in messages)
        assert not any(marked)
