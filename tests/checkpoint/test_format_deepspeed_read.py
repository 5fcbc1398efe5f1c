"""Checkpoints that real engines have saved, read at every ZeRO stage."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

import convert_job as job
from deepspeed_checkpoints import ALL, read, read_case, seen_by_ranks, train_engines
from launch import ROOT
from once import once
from tp_embed.checkpoint import Request, convert
from tp_embed.checkpoint.contents import MASTER, WEIGHT, Key
from universal_job import TABLE


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return once(tmp_path_factory, "deepspeed_engines", train_engines)


@pytest.fixture(scope="module")
def trained(out):
    return seen_by_ranks(out)


def whole(seen, name, key, cut):
    parts = [rank["state"][name][key] for rank in seen if name in rank["state"]]
    if cut is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts, cut.dim)


@pytest.mark.parametrize("name", ALL)
def test_everything_is_read_as_the_engine_had_it(out, trained, name):
    checkpoint = read_case(out, name)
    seen, case = trained[name], ALL[name]
    model = job.build(case)
    expected = dict(model.named_parameters())
    buffers = dict(model.named_buffers()) if case.get("typed") else {}
    assert set(checkpoint.names) == {*expected, *(["seen"] if buffers else [])}
    assert checkpoint.tp_size == case.get("tp", 1)
    for parameter, states in seen[0]["state"].items():
        for key in states:
            values = whole(seen, parameter, key, checkpoint.cuts.get(parameter))
            keys = (Key(parameter, key), Key(parameter), Key(parameter, MASTER))
            found = next(each for each in keys if each in checkpoint.tensors)
            tensor = checkpoint.tensors[found].load()
            assert tensor.shape == expected[parameter].shape
            assert torch.equal(tensor.to(values.dtype), values), found
    if case.get("dtype") == "bfloat16" and case.get("steps", 2):
        masters = [key.name for key in checkpoint.tensors if key.state == MASTER]
        pairs = [[checkpoint.tensors[Key(n, s)].load() for s in (MASTER, WEIGHT)] for n in masters]
        assert any(not torch.equal(master, weight.float()) for master, weight in pairs)
    if case.get("typed"):
        assert checkpoint.tensors[Key("seen")].load() == seen[0]["buffers"]["seen"]
        assert checkpoint.buffers == {"seen"}
    ties = {"lm_head.weight": TABLE} if case.get("tied") else {}
    assert checkpoint.ties == ties


@pytest.mark.parametrize("name", ALL)
def test_everything_of_the_optimizer_is_read(out, trained, name):
    checkpoint, case = read_case(out, name), ALL[name]
    steps = case.get("steps", 2)
    trainable = {n for n, p in job.build(case).named_parameters() if p.requires_grad}
    assert checkpoint.step == steps
    groups = checkpoint.optimizer.groups
    assert {n for group in groups for n in group["params"]} == trainable
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    decays = [0.0, 0.1] if case.get("typed") else [0.01]
    assert [group["weight_decay"] for group in groups] == decays
    assert all(group["betas"] == (0.9, 0.999) for group in groups)
    states = {state for _, state in checkpoint.tensors} - {"weight", MASTER}
    if not steps:
        assert not states
        assert not checkpoint.optimizer.steps
        assert "no step" in checkpoint.notes[0]
        return
    assert states == {"exp_avg", "exp_avg_sq"}
    for state in states:
        assert {key.name for key in checkpoint.tensors if key.state == state} == trainable
    # At ZeRO 0, the wrapper for 16-bit weights makes a step of its own, to create all states.
    made = steps + 1 if name == "dp z0 bf16" else steps
    assert checkpoint.optimizer.steps == dict.fromkeys(trainable, made)
    assert checkpoint.extra["lr_scheduler"] == {"last_batch_iteration": 1}
    assert checkpoint.extra["client"] == "kept"
    assert checkpoint.extra["epoch"] == 3
    assert not {"global_steps", "overflow", "dynamic_loss_scale"} & checkpoint.extra.keys()
    differs = "`seen` differs between data-parallel ranks: rank 0's was taken"
    assert checkpoint.notes in ((), (differs,))


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("dp z") and "z0" not in n])
def test_master_weights_are_those_of_the_script_of_deepspeed(out, trained, name):
    checkpoint = read(out / name)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(out / name), tag="end")
    for parameter, tensor in expected.items():
        own = checkpoint.ties.get(parameter, parameter)
        key = Key(own, MASTER)
        found = checkpoint.tensors[key if key in checkpoint.tensors else Key(own)].load()
        assert torch.equal(found.to(tensor.dtype), tensor), parameter


def test_gradients_in_round_robin_order_change_nothing(out, trained):
    checkpoint, expected = (read(out / f"dp z2 typed{kind} bf16") for kind in (" robin", ""))
    assert checkpoint.optimizer == expected.optimizer
    for key, array in expected.tensors.items():
        one, other = array.load().float(), checkpoint.tensors[key].load().float()
        assert (one - other).abs().max() <= 1e-3 * one.abs().max(), key


@pytest.mark.parametrize("name", ["dp z2 typed bf16", "z1 typed bf16", "z3 typed bf16", "z2 tied"])
def test_converted_to_one_file_it_is_the_model(out, trained, tmp_path, name):
    convert(out / name, tmp_path / "new.pt", Request(to="pt", source_format="deepspeed"))
    saved = torch.load(tmp_path / "new.pt", weights_only=True)
    model, case = job.build(ALL[name], seed=1), ALL[name]
    is_zero3 = case["stage"] == 3
    if case.get("dtype") and not is_zero3:  # There the weights are in fp32 only.
        model = model.to(torch.bfloat16)
    model.load_state_dict(saved["model"])
    parameters = dict(model.named_parameters())
    groups = [
        {**group, "params": [parameters[n] for n in group["param_names"]]}
        for group in saved["optimizer"]["param_groups"]
    ]
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups])
    optimizer.load_state_dict(saved["optimizer"])
    checkpoint = read(out / name)
    for parameter, state in optimizer.state.items():
        own = next(n for n, p in parameters.items() if p is parameter)
        expected = checkpoint.tensors[Key(own, "exp_avg")].load()
        assert torch.equal(state["exp_avg"], expected.to(state["exp_avg"].dtype))
        assert state["step"] == 2


def test_it_is_read_without_deepspeed(out, trained):
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path\n"
        "from tp_embed.checkpoint.formats import deepspeed\n"
        "from tp_embed.checkpoint.contents import ReadOptions\n"
        "print(len(deepspeed.read(Path(sys.argv[1]), ReadOptions()).tensors))"
    )
    command = [sys.executable, "-c", code, str(out / "z1")]
    assert int(subprocess.check_output(command, cwd=ROOT)) == 36


def test_trusted_files_may_import_deepspeed(out, trained):
    checkpoint = read(out / "z1", allow_unsafe_pickle=True)
    assert checkpoint.tensors.keys() == read(out / "z1").tensors.keys()
