"""Compares the scripts in `docs/transformers.md` on two ranks with torch, PEFT and the Trainer of
transformers in this process."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, Trainer

import finetune_lora
import train_accelerate
import train_hf_trainer
from forks import run_script
from launch import BIN, ROOT, deepspeed_command, free_port, run

EXAMPLES = ROOT / "examples"


def numbers(output, name):
    found = re.findall(rf"step (\d+): {name} ([\d.]+)", output)
    return [int(step) for step, _ in found], [float(number) for _, number in found]


def same_model(directory, expected):
    found = LlamaForCausalLM.from_pretrained(directory).state_dict()
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=2e-5, msg=key)


def test_trainer_script(tmp_path):
    command = deepspeed_command(EXAMPLES / "train_hf_trainer.py", tmp_path / "sharded")
    output = run(command)
    assert "(101 x 32): strategy 'embed'" in output

    args = train_hf_trainer.training_arguments(str(tmp_path / "alone"))
    data = train_hf_trainer.dataset()
    model = train_hf_trainer.build_model()
    alone = Trainer(model, args, train_dataset=data, eval_dataset=data[:4])
    alone.train()
    for name in ("loss", "eval_loss"):
        expected = [entry[name] for entry in alone.state.log_history if name in entry]
        assert numbers(output, name)[1] == pytest.approx(expected, rel=1e-6)
    same_model(tmp_path / "sharded" / "model", alone.model)

    # It resumes where it stopped.
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-4")
    output_again = run_script(EXAMPLES / "train_hf_trainer.py", tmp_path / "sharded")
    assert numbers(output_again, "loss") == numbers(output, "loss")
    same_model(tmp_path / "sharded" / "model", alone.model)


def test_accelerate_script(tmp_path):
    port = f"--main_process_port={free_port()}"
    config = f"--config_file={EXAMPLES / 'accelerate.yaml'}"
    script = EXAMPLES / "train_accelerate.py"
    output = run([str(BIN / "accelerate"), "launch", config, port, str(script), str(tmp_path)])
    assert "(101 x 32): strategy 'vocab', tied to lm_head" in output

    model = train_accelerate.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for ids in train_accelerate.batches():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    steps, found = numbers(output, "loss")
    assert steps == [1, 2, 3, 4, 3, 4]
    assert found == pytest.approx(losses + losses[2:], rel=1e-6)
    same_model(tmp_path / "model", model)


def test_lora_script(tmp_path):
    base = finetune_lora.build_model()
    base.save_pretrained(tmp_path / "base")
    output = run_script(EXAMPLES / "finetune_lora.py", tmp_path / "base", tmp_path / "adapter")
    torch.manual_seed(0)
    alone = finetune_lora.add_lora(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    losses = finetune_lora.train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2))
    assert numbers(output, "loss")[1] == pytest.approx(losses, rel=1e-6)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = finetune_lora.batches()[0]
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, alone.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
