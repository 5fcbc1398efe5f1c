"""Compares the Trainer of transformers with and without sharded tables."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_trainer_job as job
from forks import run_script
from hf_models import V, build, logits
from tp_embed.integrations.transformers import ShardTables
from tp_embed.integrations.transformers.shard import check_lora

MODELS = {
    "ZeRO 1": "llama",
    "ZeRO 3": "tied llama",
    "ZeRO 1, TP": "llama",
    "ZeRO 2, TP": "tied llama",
    "ZeRO 3, TP": "llama",
}
LORA = {"LoRA": "llama, LoRA of table", "LoRA, whole table": "llama, LoRA of whole table"}
ALL = MODELS | LORA


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer")
    build("llama").save_pretrained(out / "initial")
    run_script(job.__file__, out)
    return out


@pytest.fixture(scope="module")
def seen(directory):
    return [torch.load(directory / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns the Trainer's results in one process, without DeepSpeed, by model."""
    out = tmp_path_factory.mktemp("alone")
    trainers = {
        name: job.train(job.build_model(name), job.arguments(out / name))
        for name in dict.fromkeys(ALL.values())
    }
    return out, {name: job.seen(trainer) for name, trainer in trainers.items()}


@pytest.mark.parametrize("case", ALL)
def test_training_and_evaluation_are_those_of_the_trainer(seen, alone, case):
    expected = alone[1][ALL[case]]
    for rank in range(2):
        found = seen[rank][case]
        for name in ("losses", "eval", "best"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
        # The Trainer gathers from all ranks; tensor-parallel ranks have equal values.
        for copy in found["logits"].split(2):
            torch.testing.assert_close(copy, expected["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", [name for name in MODELS if "TP" in name])
def test_full_values_are_of_the_table_or_refuse_to_be_read_as_it(seen, case):
    for rank in range(2):
        found = seen[rank][case]["values"]
        assert found["table"].shape[0] == V
        torch.testing.assert_close(found["doubled"], 2 * found["table"], rtol=0, atol=0)
        assert "`mv` must be given the whole table" in found["read"]
        if "ZeRO 3" not in case:
            assert "Call `export(engine, directory)` on all ranks" in found["whole"]


@pytest.mark.parametrize("case", ALL)
def test_training_goes_on_from_a_checkpoint(seen, case):
    for rank in range(2):
        found = seen[rank][case]
        # The Trainer keeps the losses of earlier steps.
        assert found["resumed"] == pytest.approx(found["losses"], rel=1e-6)


@pytest.mark.parametrize("case", MODELS)
def test_checkpoints_hold_the_whole_model(directory, alone, case):
    """Checks each step's checkpoint, and the final model, the best and not the last one."""
    for path in ("checkpoint-2", "checkpoint-4", "model"):
        expected = alone[0] / MODELS[case] / path.replace("model", "checkpoint-2")
        wanted = AutoModelForCausalLM.from_pretrained(expected).state_dict()
        found = AutoModelForCausalLM.from_pretrained(directory / case / path).state_dict()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=5e-5, msg=key)


@pytest.mark.parametrize("case", LORA)
def test_checkpoints_hold_an_adapter_that_peft_loads(directory, alone, case):
    for path in ("checkpoint-4", "model"):
        expected = alone[0] / LORA[case] / path.replace("model", "checkpoint-2")
        wanted = peft.PeftModel.from_pretrained(build("llama"), expected).eval()
        found = peft.PeftModel.from_pretrained(build("llama"), directory / case / path).eval()
        torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-3, atol=1e-4)


def test_lora_of_what_autotp_cuts_is_refused():
    model = job.build_model("llama, LoRA of table")
    whole, mlp = job.config(1), job.config(1)
    mlp["tensor_parallel"]["partition_config"] = job.MLP_ONLY
    check_lora(model, mlp)
    check_lora(build("llama"), whole)
    with pytest.raises(ValueError, match=r"AutoTP would cut `.*q_proj\.base_layer\.weight`"):
        check_lora(model, whole)
    mlp["tensor_parallel"]["partition_config"] = {
        "use_default_specs": False,
        "layer_specs": [{"patterns": [r".*q_proj\..*weight$"], "partition_type": "column"}],
    }
    with pytest.raises(ValueError, match=r"AutoTP would cut"):
        check_lora(model, mlp)


def test_tables_are_sharded_with_tensor_parallelism_only(seen):
    for rank in range(2):
        assert "strategy 'vocab', tied to lm_head" in seen[rank]["ZeRO 2, TP"]["report"]
        for case, size in {"ZeRO 1": job.V, "ZeRO 1, TP": -(-job.V // 2)}.items():
            assert seen[rank][case]["rows"] in (size, job.V - size), case


def test_model_that_was_loaded_into_shards(seen):
    for rank in range(2):
        assert seen[rank]["loaded"] == pytest.approx(seen[rank]["ZeRO 1, TP"]["losses"], rel=1e-6)


def test_trainer_without_deepspeed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`args\.deepspeed` must be a DeepSpeed config"):
        job.train(build("llama"), job.arguments(tmp_path), callbacks=[ShardTables()])
