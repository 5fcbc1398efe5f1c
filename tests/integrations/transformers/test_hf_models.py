"""Models of transformers with sharded tables save, load and resize like whole models."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_models import MODELS, V, build, ids, logits
from parity import assert_same_bits
from tp_embed import FakeGang, GangError, shard_embeddings
from tp_embed.checkpoint import full_state_dict
from tp_embed.integrations.transformers import from_pretrained
from tp_embed.nn.head import ShardedLayer
from tp_embed.parameter.sharded import ShardedParameter

# Rank 0 of the job writes, and is in no smaller gang of the pool.
SIZE = 4
STRATEGIES = ["vocab", "embed"]


def save(gang, name, strategy, directory):
    model = build(name)
    kind = type(model)
    shard_embeddings(model, gang, strategy=strategy)
    assert type(model).__name__ == kind.__name__
    assert isinstance(model, kind)
    model.save_pretrained(directory / "one", gang.rank == 0)  # `is_main_process`
    model.save_pretrained(directory / "many", max_shard_size=3000)
    gang.barrier()
    return logits(model)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_models_are_those_of_transformers(pool, tmp_path, name, strategy):
    found = pool(SIZE, save, name, strategy, tmp_path)
    whole = build(name)
    whole.save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    saved = load_file(tmp_path / "one" / "model.safetensors")
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same_bits(saved[key], tensor, key)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {path.name for path in (tmp_path / "expected").iterdir()}

    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for directory in ("one", "many"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert type(loaded) is type(whole)
        assert_same_bits(logits(loaded), logits(whole), "the logits")
    for rank in range(SIZE):
        torch.testing.assert_close(found[rank], logits(whole))


def load(gang, kind, directory, sharding, options):
    model = from_pretrained(kind, directory, gang, sharding=sharding, **options)
    tables = [m for m in model.modules() if isinstance(m, ShardedLayer)]
    assert all(type(table.weight) is ShardedParameter for table in tables)
    assert not any(parameter.is_meta for parameter in model.parameters())
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embed.weight
    return full_state_dict(model), logits(model), tied, type(model).__name__


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_models_are_loaded_into_shards(pool, tmp_path, name, strategy):
    whole = build(name)
    whole.save_pretrained(tmp_path, max_shard_size=3000)
    kind = AutoModelForCausalLM if name == "gemma3" else type(whole)
    for state, found, tied, class_name in pool(
        SIZE, load, kind, tmp_path, {"strategy": strategy}, {}
    ):
        assert tied == (name != "llama")
        assert class_name == type(whole).__name__
        torch.testing.assert_close(found, logits(whole))
        for key, tensor in (state or {}).items():
            assert_same_bits(tensor, whole.state_dict()[key], key)


def test_models_are_loaded_in_another_dtype(pool, tmp_path):
    build("llama").save_pretrained(tmp_path)
    whole = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16}
    state, *_ = pool(SIZE, load, LlamaForCausalLM, tmp_path, {}, options)[0]
    for key, tensor in whole.state_dict().items():
        assert_same_bits(state[key], tensor, key)


def test_checkpoint_of_the_body_of_a_tied_model(pool, tmp_path):
    """Its keys lack the prefix of the whole model, and it has no head."""
    whole = build("gpt2")
    whole.transformer.save_pretrained(tmp_path)
    _, found, tied, _ = pool(SIZE, load, type(whole), tmp_path, {}, {})[0]
    assert tied
    torch.testing.assert_close(found, logits(whole))


def load_wrongly(gang, directory):
    errors = []
    for kind, path, options in [
        (LlamaForCausalLM, directory / "body", {}),
        (LlamaForCausalLM, directory / "whole", {"tp_plan": "auto"}),
        (LlamaForCausalLM, directory / "whole", {"sharding": {"init_fn": print}}),
        (dict, directory / "whole", {}),
    ]:
        with pytest.raises((ValueError, TypeError)) as caught:
            from_pretrained(kind, path, gang, **options)
        errors.append(str(caught.value))
    return errors


def test_what_cannot_be_loaded_into_shards(pool, tmp_path):
    whole = build("llama")
    whole.model.save_pretrained(tmp_path / "body")
    whole.save_pretrained(tmp_path / "whole")
    for body, plan, init_fn, kind in pool(2, load_wrongly, tmp_path):
        assert "must hold the tables of the model, but lacks ['lm_head.weight']" in body
        assert "`tp_plan` must be left out" in plan
        assert "`sharding` must not have an `init_fn`" in init_fn
        assert "`model_class` must be a `PreTrainedModel`" in kind


def fail_alone(gang, directory):
    """Returns the errors of all ranks if one has no checkpoint, and if one cannot write."""
    found = []
    with pytest.raises((OSError, GangError)) as caught:
        from_pretrained(LlamaForCausalLM, directory / f"node{gang.rank}", gang)
    found.append(caught)
    model = build("llama")
    shard_embeddings(model, gang)
    with pytest.raises((ValueError, GangError)) as caught:
        model.save_pretrained(directory / "file")
    found.append(caught)
    return [f"{caught.type.__name__}: {caught.value}" for caught in found]


def test_ranks_do_not_wait_for_one_that_has_failed(pool, tmp_path):
    for rank in range(SIZE):
        if rank != 1:
            build("llama").save_pretrained(tmp_path / f"node{rank}")
    (tmp_path / "file").touch()
    for rank, (loading, saving) in enumerate(pool(SIZE, fail_alone, tmp_path)):
        assert loading.startswith("OSError" if rank == 1 else "GangError: Rank 1 of")
        assert saving.startswith(
            "ValueError: `save_directory` must be" if rank == 0 else "GangError: Rank 0 of"
        )


def resize(gang, name, strategy, sizes):
    """Returns rank 0's state dicts after each resizing of one model."""
    model = build(name)
    shard_embeddings(model, gang, strategy=strategy)
    found = []
    for size, mean in sizes:
        torch.manual_seed(1)
        table = model.resize_token_embeddings(size, mean_resizing=mean)
        assert table is model.get_input_embeddings()
        head = model.get_output_embeddings()
        assert (head.weight is table.weight) == (name != "llama")
        assert model.config.vocab_size == model.vocab_size == table.num_embeddings == size
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        found.append((full_state_dict(model), loss.item(), torch.rand(1)))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_tables_are_resized_as_transformers_does(pool, name, strategy):
    sizes = [(45, True), (38, False), (41, False)]
    found = pool(3, resize, name, strategy, sizes)
    whole = build(name)
    tables = ["transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"]
    tables += ["lm_head.weight"]
    old = {key: whole.state_dict()[key].clone() for key in tables}
    for step, (size, mean) in enumerate(sizes):
        torch.manual_seed(1)
        whole.resize_token_embeddings(size, mean_resizing=mean)
        state, loss, _ = found[0][step]
        for key, tensor in whole.state_dict().items():
            kept = min(size, len(old[key])) if key in old else len(tensor)
            assert state[key].shape == tensor.shape
            if mean:  # Their spread is far below this.
                torch.testing.assert_close(state[key], tensor, rtol=0.0, atol=1e-5)
            if key in old:
                assert_same_bits(state[key][:kept], old[key][:kept], key)
                old[key] = state[key]
                with torch.no_grad():
                    tensor.copy_(state[key])  # Continues with the same new rows.
            else:
                assert_same_bits(state[key], tensor, key)
        assert loss == pytest.approx(whole(input_ids=ids(), labels=ids()).loss.item(), rel=1e-5)
        # The generators of the ranks stay equal.
        assert len({found[rank][step][2].item() for rank in range(3)}) == 1


def new_rows(gang, strategy):
    model = build("llama")
    shard_embeddings(model, gang, strategy=strategy)
    model.resize_token_embeddings(4000, mean_resizing=False)
    return full_state_dict(model)


def test_new_rows_have_the_distribution_of_the_model(pool):
    state = pool(2, new_rows, "vocab")[0]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[key][V:]
        assert rows.std().item() == pytest.approx(0.02, rel=0.02)
        assert rows.mean().item() == pytest.approx(0.0, abs=0.001)


def odd_resizings(gang):
    model = build("llama", pad_token_id=36)
    shard_embeddings(model, gang)
    whole = build("llama", pad_token_id=36)
    for one in (model, whole):
        one.resize_token_embeddings(pad_to_multiple_of=8)
    sizes = [one.config.vocab_size for one in (model, whole)]
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(2)
    pad_idx = model.get_input_embeddings().pad_idx
    model.resize_token_embeddings(3, mean_resizing=True)
    with pytest.raises(ValueError, match="must be greater than or equal to 1"):
        model.resize_token_embeddings(0)
    biased = build("llama")
    biased.lm_head = torch.nn.Linear(16, V)
    shard_embeddings(biased, gang)
    biased.resize_token_embeddings(50)
    return sizes, pad_idx, logits(biased).shape[-1], model.get_input_embeddings().num_embeddings


def test_resizing_to_few_rows_multiples_and_with_a_bias(pool):
    for rank in range(SIZE):
        assert pool(SIZE, odd_resizings)[rank] == ([40, 40], None, 50, 3)


def test_some_things_are_refused():
    model = build("llama")
    whole = model.state_dict()
    shard_embeddings(model, FakeGang("cpu", rank=0, size=2))
    with pytest.raises(
        ValueError, match=r"must hold `model.embed_tokens.weight` whole, .* \(37, 16\), but"
    ):
        model.save_pretrained("nowhere", state_dict=dict(model.state_dict()))
    with pytest.raises(ValueError, match="must be a positive integer"):
        model.resize_token_embeddings(5, pad_to_multiple_of="8")
    with pytest.raises(ValueError, match="but is None on the rank that writes"):
        model.save_pretrained("nowhere", state_dict=None)
    model.ds_autotp_parsed = True
    with pytest.raises(ValueError, match="must be resized before `deepspeed"):
        model.resize_token_embeddings(50)
    assert model.config.vocab_size == V
    model.model.layers[0].mlp.up_proj.weight.tensor_model_parallel = True
    with pytest.raises(ValueError, match=r"has cut `model\.layers\.0\.mlp\.up_proj\.weight`"):
        model.save_pretrained("nowhere")
    assert whole.keys() == model.state_dict().keys()


def test_copies_save_and_resize_as_well(tmp_path):
    model = build("tied llama")
    shard_embeddings(model, FakeGang("cpu"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        copied.resize_token_embeddings(40)
        copied.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert_same_bits(logits(loaded), logits(copied), "the logits")
    assert model.config.vocab_size == V
