"""Compares models that compute their loss from hidden states with the same models in transformers
alone."""

from __future__ import annotations

import copy
import inspect
import pickle
from contextlib import suppress

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import model_zoo
from hf_models import build, ids
from model_matrix import is_ours
from tp_embed import FakeGang, OutputHead, shard_embeddings
from tp_embed.gang.collectives import whole_table
from tp_embed.integrations.transformers import fuse_loss, shard_logits
from tp_embed.integrations.transformers import get_peft_model as make_peft_model
from tp_embed.nn.deferred import DeferredLogits, DeferredLogitsError
from tp_embed.parameter.sharded import local

# Families of transformers, with options that the loss must follow. A "tied" is added.
FAMILIES = {
    "bart": {},  # An encoder-decoder, with a bias of the logits.
    "bert": {},  # Tied, with a bias, and no shift.
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 0.7},
    "gemma3_text": {"final_logit_softcapping": 0.7},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},  # A head with a bias.
    "granite": {"logits_scaling": 0.7},
    "llama": {},
    "llava": {},  # Multimodal.
    "mistral": {},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "opt": {},
    "phi": {},  # A head with a bias.
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"output_router_logits": True},
    "t5": {},  # Scales hidden states if tied.
}
# The config of these decides, or transformers ties them anyway.
ALWAYS = {"bart", "bert", "gpt_neox", "gptj", "llava", "opt", "t5"}
RULES = {"bart": {"*embed_positions": "none"}, "opt": {"*embed_positions": "none"}}


def of_family(family, tied=None):
    """Builds a model whose logits are of about 1, so that caps and scales are felt."""
    transformers.logging.set_verbosity_error()
    options = dict(FAMILIES.get(family, {}))
    if tied is not None:
        options["tie_word_embeddings"] = tied
    model_class = getattr(transformers, model_zoo.families()[family])
    config = model_zoo.small_config(model_class.config_class, **options)
    torch.manual_seed(0)
    model = model_class(config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight *= 0.3 / head.weight.std()
        for bias in (head.bias, getattr(model, "final_logits_bias", None)):
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator))
    for batch in model_zoo.inputs(model):
        if "labels" in batch:
            batch["labels"] = batch["labels"].flip(1).clone()
            batch["labels"][0, :3] = -100
            with suppress(AttributeError, TypeError, ValueError):
                if isinstance(model(**batch).loss, Tensor):
                    return model, batch
    raise ValueError("No inputs were found that give a loss.")


def seen(model, batch):
    """Returns what a step computes, with the gradient of each Parameter, whole."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    layers = {m.weight: m for m in model.modules() if hasattr(m, "shard_dim")}
    gradients = {}
    for name, parameter in model.named_parameters():
        grad, layer = parameter.grad, layers.get(parameter)
        if layer is not None and grad is not None:
            part = local(grad).contiguous()
            grad = whole_table(part, layer.shard_dim, layer.gang, layer.partition)
        gradients[name] = grad
    return output, gradients


def assert_same(found, expected):
    (output, gradients), (wanted, wanted_gradients) = found, expected
    assert isinstance(output.logits, DeferredLogits)
    assert output.logits.shape == wanted.logits.shape
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted_gradients.keys()
    # Some are zero but for rounding, such as the gradients of the biases of keys.
    most = max(float(g.abs().max()) for g in wanted_gradients.values() if g is not None)
    for name, grad in gradients.items():
        wanted_grad = wanted_gradients[name]
        if wanted_grad is not None:
            atol = 1e-5 * float(wanted_grad.abs().max()) + 1e-6 * most
            torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=atol, msg=name)


def check_family(gang, family, tied, strategy):
    model, batch = of_family(family, tied)
    more = inspect.signature(model.forward).parameters.values()
    takes_count = any(p.kind is p.VAR_KEYWORD for p in more) and family not in ("t5", "bart")
    batches = [batch] + [{**batch, "num_items_in_batch": torch.tensor(7)}] * takes_count
    expected = [seen(model, each) for each in batches]
    model.eval()
    without = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if family == "bart":
        without["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        whole_logits, in_evaluation = model(**without).logits, model(**batch)
    model.train()
    shard_embeddings(model, gang, strategy=strategy, rules=RULES.get(family, {}))
    assert isinstance(model.get_output_embeddings(), OutputHead)
    fuse_loss(model)
    for each, wanted in zip(batches, expected, strict=True):
        assert_same(seen(model, each), wanted)
    torch.testing.assert_close(model(**without).logits, whole_logits, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        found = model(**batch)
        torch.testing.assert_close(found.logits, in_evaluation.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, in_evaluation.loss)
        fuse_loss(model, in_evaluation=True)
        found = model(**batch)
    assert isinstance(found.logits, DeferredLogits)
    torch.testing.assert_close(found.loss, in_evaluation.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(pool, family):
    for tied in (None,) if family in ALWAYS else (True, False):
        for size in (1, 2, 3):
            pool(size, check_family, family, tied, "vocab")
        pool(2, check_family, family, tied, "embed")


def outcome(gang, family):
    """Returns "same", "not built", "refused", or what is wrong."""
    with suppress(Exception):
        model, batch = of_family(family)
        expected = seen(model, batch)
        try:
            shard_embeddings(model, gang, strategy="vocab")
            fuse_loss(model)
            found = seen(model, batch)
        except Exception as error:
            return "refused" if is_ours(error) else f"failed: {error}"
        try:
            assert_same(found, expected)
        except AssertionError as error:
            return f"differs: {error}"
        return "same"
    return "not built"


@pytest.mark.nightly
def test_every_family_has_its_loss_or_is_refused(pool):
    found = {family: set(pool(2, outcome, family)) for family in model_zoo.families()}
    assert sum(outcomes == {"same"} for outcomes in found.values()) >= 200
    allowed = [{"same"}, {"refused"}, {"not built"}]
    assert not {f: outcomes for f, outcomes in found.items() if outcomes not in allowed}


def compiled(gang):
    model = build("gemma3").train()
    expected, gradients = seen(model, {"input_ids": ids(), "labels": ids()})
    shard_embeddings(model, gang, strategy="vocab")
    fuse_loss(model)
    function = torch.compile(model, backend="eager")
    for _ in range(2):
        model.zero_grad()
        output = function(input_ids=ids(), labels=ids())
        output.loss.backward()
        torch.testing.assert_close(output.loss, expected.loss)
    embed = model.get_input_embeddings()
    part = local(embed.weight.grad).contiguous()
    grad = whole_table(part, embed.shard_dim, gang, embed.partition)
    torch.testing.assert_close(grad, gradients["model.embed_tokens.weight"])


def test_compiled_models(pool):
    pool(2, compiled)


def arguments_of_forward(gang):
    """Labels in every way, other arguments, and calls that fail."""
    model = build("llama").train()
    labels = ids().clone()
    labels[0, :3] = -100
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    calls = [
        {"input_ids": ids(), "labels": labels, "num_items_in_batch": 7},
        {"input_ids": ids(), "labels": labels, "shift_labels": shifted, "num_items_in_batch": 7},
        {"input_ids": ids(), "labels": ids(), "ignore_index": 5},
        {"input_ids": ids(), "labels": labels[:, -2:], "logits_to_keep": 2},
    ]
    expected = [model(**call).loss for call in calls]
    by_position = model(ids(), None, None, None, None, labels).loss
    as_tuple = model(ids(), labels=labels, return_dict=False)[0]
    tokens = model.generate(ids()[:, :4], max_new_tokens=5, do_sample=False)
    shard_embeddings(model, gang, strategy="vocab")
    fuse_loss(model)
    for call, loss in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(**call).loss, loss)
    torch.testing.assert_close(model(ids(), None, None, None, None, labels).loss, by_position)
    loss, logits, *_ = model(ids(), labels=labels, return_dict=False)
    torch.testing.assert_close(loss, as_tuple)
    assert isinstance(logits, DeferredLogits)
    assert torch.equal(model.generate(ids()[:, :4], max_new_tokens=5, do_sample=False), tokens)
    with pytest.raises(ValueError, match=r"`target` must have the shape \(2,\)"):
        model(ids(), labels=labels, logits_to_keep=1)
    assert isinstance(model(ids()).logits, Tensor)


def test_arguments_of_forward(pool):
    pool(1, arguments_of_forward)
    pool(2, arguments_of_forward)


def other_losses(gang):
    """Losses of users, and uses of logits that were not computed."""
    model = build("llama").train()
    labels = ids()

    def smoothed(logits, labels, vocab_size, **options):
        shift = logits[..., :-1, :].contiguous().view(-1, vocab_size).float()
        return nn.CrossEntropyLoss(label_smoothing=0.1)(shift, labels[:, 1:].reshape(-1))

    def focal(logits, labels, vocab_size, **options):
        return -torch.log_softmax(logits.float(), -1).mean()

    model.loss_function = smoothed
    expected = model(ids(), labels=labels).loss
    shard_embeddings(model, gang, strategy="vocab")
    fuse_loss(model)
    output = model(ids(), labels=labels)
    torch.testing.assert_close(output.loss, expected)
    own = nn.functional.cross_entropy(output.logits[0], labels[0])
    model.loss_function = focal
    with pytest.raises(DeferredLogitsError, match="`log_softmax` needs the values of logits, whi"):
        model(ids(), labels=labels)
    assert {head.output for head in model.modules() if isinstance(head, OutputHead)} == {
        "replicated"
    }
    with pytest.raises(DeferredLogitsError, match=r"leave out the labels or call `model\.eval"):
        output.logits.softmax(-1)
    logits = model(ids()).logits
    torch.testing.assert_close(own, nn.functional.cross_entropy(logits[0], labels[0]))


def test_losses_of_users(pool):
    pool(2, other_losses)


def copies(gang):
    model = build("tied llama").train()
    shard_embeddings(model, gang, strategy="vocab")
    fuse_loss(model)
    expected = model(ids(), labels=ids()).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = twin(ids(), labels=ids())
        torch.testing.assert_close(output.loss, expected)
        assert isinstance(output.logits, DeferredLogits)
        assert isinstance(twin(ids()).logits, Tensor)
        assert len(twin._forward_pre_hooks) == 1


def test_copies_fuse_too(pool):
    pool(2, copies)


def precision(gang, name, dtype):
    """Fused losses in low precision are as close to fp64 as transformers' own."""
    model = build(name).train()
    exact = copy.deepcopy(model).to(dtype).double()(ids(), labels=ids()).loss
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            wanted = model(ids(), labels=ids()).loss
    else:
        model.to(dtype)
        wanted = model(ids(), labels=ids()).loss
    shard_embeddings(model, gang, strategy="vocab")
    fuse_loss(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = model(ids(), labels=ids()).loss
    assert found.dtype == torch.float32
    assert (found - exact).abs() <= 1.5 * (wanted - exact).abs() + 1e-3
    found.backward()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_autocast(pool, name, dtype):
    pool(2, precision, name, dtype)


def with_lora(gang, saved, sharded_first):
    torch.manual_seed(1)
    config = {"target_modules": ["q_proj"], "modules_to_save": saved, "r": 2}
    batch = {"input_ids": ids(), "labels": ids()}
    wanted, wanted_gradients = seen(make_peft_model(build("llama"), **lora(config)).train(), batch)
    torch.manual_seed(1)
    model = build("llama")
    if sharded_first:
        shard_embeddings(model, gang, strategy="vocab")
        fuse_loss(model)
    model = make_peft_model(model, **lora(config)).train()
    if not sharded_first:
        shard_embeddings(model, gang, strategy="vocab")
        fuse_loss(model)
    output, gradients = seen(model, batch)
    assert isinstance(output.logits, DeferredLogits)
    torch.testing.assert_close(output.loss, wanted.loss)
    assert gradients.keys() == wanted_gradients.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, wanted_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    model.eval()
    assert isinstance(model(**batch).logits, Tensor)


def lora(options):
    return {"peft_config": peft.LoraConfig(init_lora_weights="gaussian", **options)}


@pytest.mark.parametrize(
    ("saved", "sharded_first"),
    [(None, True), (None, False), (["embed_tokens"], False), (["lm_head"], True)],
)
def test_models_of_peft(pool, saved, sharded_first):
    pool(2, with_lora, saved, sharded_first)


def test_models_that_cannot_be_fused():
    gang = FakeGang("cpu", rank=1, size=3)
    model = build("llama")
    with pytest.raises(ValueError, match="must be an `OutputHead` to fuse its loss, but is Linea"):
        fuse_loss(model)
    with pytest.raises(
        ValueError,
        match=r"must have an output head and take `labels` .*, but a `LlamaModel` does not",
    ):
        fuse_loss(model.model)
    with pytest.raises(ValueError, match="but a `ModuleList` holds 2"):
        fuse_loss(nn.ModuleList([model, build("gpt2")]))
    with pytest.raises(ValueError, match="but a `Linear` holds 0"):
        fuse_loss(model.lm_head)
    shard_embeddings(model, gang, strategy="vocab")
    wrapped = nn.Sequential(model)
    fuse_loss(wrapped)
    fuse_loss(model, in_evaluation=True)
    fuse_loss(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert model._forward_pre_hooks.popitem()[1].keywords["in_evaluation"]
    shard_logits(model)
    with pytest.raises(ValueError, match="`shard_logits` must be off with `fuse_loss`"):
        fuse_loss(model)
