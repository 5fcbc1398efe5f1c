"""Checkpoints of engines that are damaged, hostile, incomplete or unusual."""

from __future__ import annotations

import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from deepspeed_checkpoints import (
    change,
    copy_tag,
    model_files,
    optimizer_files,
    read,
    train_engines,
)
from once import once
from tp_embed.checkpoint.contents import Key
from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError
from tp_embed.checkpoint.formats import deepspeed
from tp_embed.checkpoint.formats.apart import MAPPED_DIRECTORY
from universal_job import NORM


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return once(tmp_path_factory, "deepspeed_engines", train_engines)


@pytest.fixture
def source(out, tmp_path):
    return partial(copy_tag, out, tmp_path)


def test_tags(source, tmp_path):
    path = source("dp z1")
    root = path.parent
    for wanted in (path, root):
        assert read(wanted, tag="end" if wanted == root else None).step == 2
    with pytest.raises(CheckpointError, match=r"neither `--tag` nor .* tags are \['end'\]"):
        read(root)
    with pytest.raises(CheckpointError, match=r"there is no `other`\. Its tags are \['end'\]"):
        read(root, tag="other")
    (root / "latest").write_text("end\n")
    assert read(root).step == 2
    assert deepspeed.recognises(root)
    assert deepspeed.recognises(path)
    assert not deepspeed.recognises(tmp_path)
    (root / "latest").write_text("gone")
    with pytest.raises(CheckpointError, match=r"there is no `gone`\. Its tags are \['end'\]"):
        read(root)
    for name in ("../source/end", str(path), "end/../end", "a\0b"):
        (root / "latest").write_text(name)
        with pytest.raises(UnsafeCheckpointError, match="must be the name of a directory in"):
            read(root)


def test_missing_files_are_named(source):
    path = source("four z1 typed bf16")
    saved = {file: file.read_bytes() for file in path.iterdir()}

    def message(*names):
        for name in names:
            (path / name).unlink()
        with pytest.raises(CheckpointError) as e:
            read(path)
        for file, content in saved.items():
            file.write_bytes(content)
        return str(e.value)

    optimizer = "bf16_zero_pp_rank_{}_mp_rank_{}_optim_states.pt".format
    assert "lacks the file of tensor-parallel rank 0 and data-parallel rank 0" in message(
        "mp_rank_00_model_states.pt"
    )
    assert "must have model files of 2 tensor-parallel ranks" in message(
        "mp_rank_01_model_states.pt", optimizer(0, "01"), optimizer(1, "01")
    )
    assert "but has them for 2" in message("mp_rank_01_model_states.pt")
    assert "lacks the file of tensor-parallel rank 0 and data-parallel rank 1" in message(
        optimizer(1, "00")
    )
    assert "of 2 data-parallel ranks next to it, as its `partition_count` says, but has" in message(
        optimizer(1, "00"), optimizer(1, "01")
    )
    assert "has none" in message("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt")
    (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"must have one file .* Remove what an older run"):
        read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer_00-model_00-model_states.pt", "without pipeline stages and experts"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "without pipeline stages and experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "without pipeline stages and experts"),
        ("mp_rank_00_000_model_states.pt", "belongs to neither"),
        ("mp_rank_99999999_model_states.pt", "lacks the file of tensor-parallel rank 2"),
    ],
)
def test_other_files_are_refused(source, name, message):
    path = source("z1")
    (path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_shards_of_different_steps_are_refused(source):
    path = source("z1")
    change(model_files(path)[1], global_steps=3)
    with pytest.raises(CheckpointError, match=r"`global_steps` is 2 in `mp_rank_00.* and 3 in `mp"):
        read(path)
    change(model_files(path)[1], global_steps=2)
    state = "optimizer_state_dict__base_optimizer_state__state"
    root = torch.load(optimizer_files(path)[1], weights_only=False)
    moments = root["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    change(optimizer_files(path)[1], **{state: {0: {**moments, "step": torch.tensor(5.0)}}})
    with pytest.raises(CheckpointError, match="they have made 2 and 5"):
        read(path)


def test_optimizers_of_different_data_parallel_ranks_are_of_one_step(source):
    path = source("dp z1")
    change(optimizer_files(path)[1], optimizer_state_dict__base_optimizer_state__state={})
    with pytest.raises(
        CheckpointError, match=r"must be from one step, but are from None with \['fp32"
    ):
        read(path)


def test_files_of_other_models_are_refused(source, out):
    path = source("z1")
    shutil.copy(optimizer_files(out / "z2 tied" / "end")[0], optimizer_files(path)[0])
    with pytest.raises(CheckpointError, match=r"The fragments of `model.embed_tokens.weight"):
        read(path)
    shutil.copy(model_files(out / "z1 typed bf16" / "end")[1], model_files(path)[1])
    with pytest.raises(CheckpointError, match=r"must have|must be"):
        read(path)


def test_elastic_checkpoints_are_refused(source):
    path = source("dp z1")
    for file in optimizer_files(path):
        change(file, optimizer_state_dict__base_optimizer_state=[{}])
    with pytest.raises(CheckpointError, match="elastic"):
        read(path)


def test_without_an_optimizer_there_are_weights(source, out):
    path = source("z1 typed bf16")
    expected = read(path)
    for file in optimizer_files(path):
        file.unlink()
    checkpoint = read(path)
    assert checkpoint.optimizer is None
    assert checkpoint.notes == ("The checkpoint has no optimizer state",)
    assert {key.state for key in checkpoint.tensors} == {"weight"}
    for key, array in checkpoint.tensors.items():
        assert torch.equal(array.load(), expected.tensors[key].load())
    shutil.rmtree(path.parent)
    shutil.copytree(out / "dp z3 tied" / "end", path)
    for file in optimizer_files(path):
        file.unlink()
    with pytest.raises(CheckpointError, match="which hold the weights at ZeRO 3, but has none"):
        read(path)


def test_names_of_an_optimizer_at_zero0(source, out):
    message = r"has 2 with 12, without names\. Pass `--optimizer-names`"
    with pytest.raises(CheckpointError, match=message):
        read(out / "dp z0 typed")
    with pytest.raises(CheckpointError, match=r"be 12 different names .* with \['x'\] unknown"):
        read(out / "z0", optimizer_names=("x",))
    names = read(out / "z0").optimizer.groups[0]["params"]
    with pytest.raises(CheckpointError, match="The optimizer has another order than the model"):
        read(out / "z0", optimizer_names=tuple(reversed(names)))
    path = source("z0")
    for file in model_files(path):
        change(file, ds_config={})
    with pytest.raises(CheckpointError, match="must be built by DeepSpeed from its config"):
        read(path)
    assert read(path, optimizer_names=tuple(names)).optimizer.groups[0]["params"] == names


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_files_is_not_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = source("dp z1")
    for file in (optimizer_files(path)[1], model_files(path)[0]):
        change(file, harm=Harm())
        with pytest.raises(UnsafeCheckpointError, match="mkdir"):
            read(path)
    assert not Path("harm").exists()
    file = model_files(path)[0]
    file.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError):
        read(path)
    assert not Path("harm").exists()


def test_what_is_not_plain_is_left_out_and_said(source):
    path = source("dp z1")
    endless = []
    endless.append(endless)
    change(model_files(path)[0], mine=torch.zeros(2), endless=endless, plain=(1, {"a": [None]}))
    checkpoint = read(path)
    assert checkpoint.extra["plain"] == (1, {"a": [None]})
    assert "mine" not in checkpoint.extra
    assert [note.partition(" has ")[0] for note in checkpoint.notes] == ["`mine`", "`endless`"]


def test_numbers_may_be_tensors_of_one_element(source):
    path = source("dp z1")
    expected = read(path)
    group = "optimizer_state_dict__base_optimizer_state__param_groups__0__"
    for file in optimizer_files(path):
        change(file, **{f"{group}lr": torch.tensor(0.25), f"{group}odd": torch.ones(2)})
    change(model_files(path)[0], lr_scheduler={"last": torch.tensor(7)})
    checkpoint = read(path)
    assert checkpoint.extra["lr_scheduler"] == {"last": 7}
    (changed,), (before,) = checkpoint.optimizer.groups, expected.optimizer.groups
    assert changed == {**before, "lr": 0.25}
    assert checkpoint.notes == ("In a param group `odd` has a Tensor in it and was left out.",)


@pytest.mark.parametrize("step", [True, -1, float("nan"), float("inf"), torch.ones(2), "1"])
@pytest.mark.parametrize("name", ["dp z1", "z0"])
def test_steps_are_numbers(source, name, step):
    path = source(name)
    file, place = model_files(path)[0], "optimizer__state__0__step"
    if name == "dp z1":
        file = optimizer_files(path)[0]
        place = "optimizer_state_dict__base_optimizer_state__state__0__step"
    change(file, **{place: step})
    with pytest.raises(CheckpointError, match=r"A `step` in .* must be a number of at least 0"):
        read(path)


def test_a_dynamic_loss_scale_is_left_out_with_a_note(source):
    path = source("dp z1")
    for file in optimizer_files(path):
        change(file, optimizer_state_dict__loss_scaler=DynamicLossScaler(2**8, 2, 1, 1, 1, False))
    assert read(path).notes == ("The dynamic loss scale was left out: it starts afresh.",)


@pytest.mark.parametrize("times", [0.5, 2])
def test_flat_tensors_of_another_size_are_refused(source, times):
    path = source("dp z3 tied")
    for file in optimizer_files(path):
        zero = torch.load(file, weights_only=False)["optimizer_state_dict"]
        flat = zero["fp32_flat_groups"][0]
        flats = [flat.repeat(2)[: int(times * flat.numel())], *zero["fp32_flat_groups"][1:]]
        change(file, optimizer_state_dict__fp32_flat_groups=flats)
    with pytest.raises(CheckpointError, match=r"A flat tensor `fp32` .* elements, for .* MiCS"):
        read(path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (torch.zeros(9, 2), rf"A flat tensor `{NORM}` .* must have one dimension"),
        (torch.zeros(10), "must lie within it"),
        (None, rf"A flat tensor `{NORM}` in .* must be of type Tensor"),
    ],
)
def test_parts_of_frozen_parameters_are_checked(source, part, message):
    path = source("dp z3 before")
    change(model_files(path)[1], **{f"frozen_param_fragments__{NORM}": part})
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_buffers_that_differ_between_data_parallel_ranks_are_noted(source):
    path = source("dp z3 before")
    change(model_files(path)[1], module__seen=torch.tensor(5))
    checkpoint = read(path)
    assert checkpoint.tensors[Key("seen")].load() == 0
    note = "`seen` differs between data-parallel ranks: rank 0's was taken"
    assert note in checkpoint.notes


def test_a_file_of_the_user_may_lie_beside(source):
    path = source("z1")
    (path / "experiment.yaml").touch()
    (path / "expected_losses.pt").touch()
    assert read(path).step == 2


def test_truncated_files_are_refused(source):
    path = source("dp z3 tied")
    for file in path.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(CheckpointError, match=r"torch\.save"):
            read(path)
        file.write_bytes(content)


WRONG = [None, -1, "x", [], {}, [[1]], {1: 2}, torch.zeros(3), (1, 2), [{"a": None}]]


@pytest.mark.parametrize("name", ["z1", "z0", "dp z3 before"])
def test_wrong_types_anywhere_are_refused_by_name(source, name):
    """Unused entries may have any type."""
    path = source(name)
    refused = 0
    for file in (*model_files(path)[:1], *optimizer_files(path)[:1]):
        content = torch.load(file, weights_only=False)
        places = [(key,) for key in content if key != "ds_config"]
        for outer in ("universal_checkpoint_info", "optimizer_state_dict", "optimizer"):
            if isinstance(content.get(outer), dict):
                places += [(outer, key) for key in content[outer]]
        for count, (first, *rest) in enumerate(places):
            for wrong in WRONG[count % 5 :: 5]:
                value = {**content[first], rest[0]: wrong} if rest else wrong
                torch.save({**content, first: value}, file)
                try:
                    read(path)
                except CheckpointError:
                    refused += 1
        torch.save(content, file)
    assert refused > 10
    assert read(path).tensors


def test_names_of_shared_parameters_that_lead_nowhere_are_refused(source):
    path = source("z1")
    for shared in ({"lm_head.weight": 3}, {NORM: "lm_head.weight", "lm_head.weight": NORM}):
        for file in model_files(path):
            change(file, shared_params=shared, param_shapes=[{}])
        for file in optimizer_files(path):
            file.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="`shared_params` in"):
            read(path)


def test_snapshots_of_mapped_tables_are_refused(source):
    """In the files of DeepSpeed these tables have no rows."""
    path = source("dp z1")
    (path / MAPPED_DIRECTORY).mkdir()
    with pytest.raises(CheckpointError, match="snapshots of tables in memory-mapped files"):
        read(path)
