"""Checkpoints that real engines have saved, read at every ZeRO stage; by the real launcher."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint import affine, ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

import convert_job as job
from launch import ROOT, deepspeed_command, run
from tp_embed.checkpoint import Request, convert
from tp_embed.checkpoint.contents import MASTER, WEIGHT, Key, ReadOptions
from tp_embed.checkpoint.cuts import Cut, Rule
from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError
from tp_embed.checkpoint.files.arrays import Span, View
from tp_embed.checkpoint.formats import deepspeed
from tp_embed.checkpoint.formats.deepspeed.affine import AffineMap
from universal_job import NORM, TABLE, optimizer_names

BF16 = {"dtype": "bfloat16"}
ROBIN = {"round_robin_gradients": True}
TYPED_NAMES = tuple(optimizer_names(job.build({"typed": True})))

# By the number of ranks. Those without tensor parallelism come first.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp z0 bf16": {"stage": 0, **BF16},
        "dp z0 typed": {"stage": 0, "typed": True},
        "dp z1": {"stage": 1},
        "dp z1 robin bf16": {"stage": 1, "zero": ROBIN, **BF16},
        "dp z2 typed robin bf16": {"stage": 2, "typed": True, "zero": ROBIN, **BF16},
        "dp z2 typed bf16": {"stage": 2, "typed": True, **BF16},
        "dp z3 tied": {"stage": 3, "tied": True},
        "dp z3 before": {"stage": 3, "typed": True, "steps": 0},
        "z0": {"stage": 0, "tp": 2},
        "z1": {"stage": 1, "tp": 2},
        "z1 typed bf16": {"stage": 1, "tp": 2, "typed": True, **BF16},
        "z2 tied": {"stage": 2, "tp": 2, "tied": True},
        "z2 mpu": {"stage": 2, "tp": 2, "mpu": True},
        "z3 typed bf16": {"stage": 3, "tp": 2, "typed": True, **BF16},
    },
    4: {
        "four z1 typed bf16": {"stage": 1, "tp": 2, "typed": True, **BF16},
        "four z3 tied": {"stage": 3, "tp": 2, "tied": True},
    },
}
ALL = {name: case for cases in CASES.values() for name, case in cases.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def trained(out):
    """Returns what the tensor-parallel ranks saw in each case."""
    seen = {}
    for ranks, cases in CASES.items():
        plan = out / f"{ranks}.json"
        plan.write_text(json.dumps(cases))
        run(deepspeed_command(job.__file__, out, plan, ranks=ranks))
        by_rank = [torch.load(plan.with_suffix(f".{rank}.pt")) for rank in range(ranks)]
        for name, case in cases.items():
            seen[name] = [own[name] for own in by_rank[: case.get("tp", 1)]]
    return seen


@pytest.fixture
def source(out, trained, tmp_path):
    """Copies the tag of a case, for changes."""

    def copy(name):
        shutil.copytree(out / name / "end", tmp_path / "source" / "end")
        return tmp_path / "source" / "end"

    return copy


def read(path, **options):
    return deepspeed.read(path, ReadOptions(**options))


def read_case(out, name):
    names = TYPED_NAMES if name == "dp z0 typed" else None
    return read(out / name, optimizer_names=names)


def change(path, **changes):
    """Changes entries of a file, given by paths such as `optimizer_state_dict__overflow` or
    `param_groups__0__lr`."""
    root = torch.load(path, weights_only=False)
    for place, value in changes.items():
        *keys, last = (int(key) if key.isdecimal() else key for key in place.split("__"))
        owner = root
        for key in keys:
            owner = owner[key]
        owner[last] = value
    torch.save(root, path)


def model_files(path):
    return sorted(path.glob("*_model_states.pt"))


def optimizer_files(path):
    return sorted(path.glob("*_optim_states.pt"))


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


def test_cuts_are_those_of_the_engine(out, trained):
    cuts = read(out / "z1").cuts
    layer = "model.layers.0."
    assert cuts[TABLE] == Cut.even(1, (36,), 2)
    assert cuts["lm_head.weight"] == Cut.even(0, (101,), 2)
    assert cuts[f"{layer}self_attn.q_proj.weight"] == Cut.even(0, (32,), 2)
    assert cuts[f"{layer}mlp.down_proj.weight"] == Cut.even(1, (64,), 2)
    assert cuts[NORM] is None
    # With one rank no cut is known: its whole tensors may be cut on several ranks.
    assert not read(out / "dp z1").cuts
    types = read(out / "z1 typed bf16").cuts["types.weight"]
    assert types.ranges == ((range(1),), (range(1, 1),))


def test_given_cuts_come_first_and_rules_last(out, trained, source):
    path = source("z2 mpu")
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match="must be cut into 2 shards of 101"):
        read(path, cuts={"lm_head.weight": Cut.even(0, (100,), 2)})
    cut = Cut.even(0, (64,), 2)
    checkpoint = read(path, cuts={q_proj: cut}, rules=(Rule(NORM, 0),))
    assert checkpoint.cuts[q_proj] == cut
    assert checkpoint.tensors[Key(q_proj)].shape == (64, 36)
    assert checkpoint.cuts[NORM] is None

    for file in model_files(path):
        change(file, universal_checkpoint_info=None)
    with pytest.raises(CheckpointError, match=rf"how `{TABLE}` is cut over its 2.*`--rules`"):
        read(path)
    rules = (Rule("*embed_tokens*", 1), Rule("lm_head.weight", 0), Rule("*", None))
    found = read(path, rules=rules)
    for key, array in read(out / "z2 mpu").tensors.items():
        assert torch.equal(found.tensors[key].load(), array.load())


@pytest.fixture(scope="module")
def by_patterns(out, trained):
    """Writes a checkpoint whose cuts are given by patterns, as Megatron-DeepSpeed does."""
    path = out / "patterns"
    shutil.copytree(out / "z1" / "end", path)
    for file in model_files(path):
        change(
            file,
            universal_checkpoint_info={
                "universal_checkpoint_version": 0.2,
                "original_vocab_size": 90,
                "vocabulary_parameter_patterns": [r".*embed_tokens.weight", r"lm_head\.weight"],
                "tp_replicated_parameter_patterns": [r"model.norm.weight"],
                "parameter_to_average_patterns": [r"model.layers.\d+.(input|post_att)\w+.weight"],
                "parameter_with_row_parallelism_patterns": [
                    r"model.embed_tokens.weight",
                    r"model.layers.\d+.self_attn.o_proj.weight",
                    r".*down_proj.weight",
                ],
                "parameter_with_2_sub_params_cat_dim_0": [r"model.layers.\d+.mlp.gate_proj.weight"],
                "parameter_with_sub_params": [
                    {
                        "patterns": [r"model.layers.\d+.mlp.up_proj.weight"],
                        "shape": (4, -1),
                        "partition_dim": 0,
                    }
                ],
            },
        )
    return path


def test_patterns_mean_what_they_do_to_deepspeed(out, by_patterns, tmp_path):
    options = Namespace(
        input_folder=str(by_patterns),
        output_folder=str(tmp_path / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(options)
    checkpoint = read(by_patterns)
    for name in checkpoint.names:
        for state in (MASTER, "exp_avg", "exp_avg_sq"):
            file = tmp_path / "universal" / "zero" / name / f"{state}.pt"
            expected = torch.load(file, weights_only=False)["param"]
            key = Key(name) if state == MASTER else Key(name, state)
            assert torch.equal(checkpoint.tensors[key].load(), expected), key
    assert checkpoint.cuts[TABLE] == Cut.even(1, (36,), 2)
    assert checkpoint.cuts["lm_head.weight"] == Cut.even(0, (90,), 2)
    assert checkpoint.cuts[NORM] is None
    assert checkpoint.cuts["model.layers.0.mlp.gate_proj.weight"] == Cut.even(0, (32, 32), 2)
    assert checkpoint.cuts["model.layers.0.mlp.up_proj.weight"] == Cut.even(0, (16,) * 4, 2)


@pytest.mark.parametrize("pattern", ["(a*)*b", "a*b*c*d*e", "(", 3, "x" * 2000])
def test_bad_patterns_are_refused(by_patterns, tmp_path, pattern):
    path = tmp_path / "source"
    shutil.copytree(by_patterns, path)
    key = "universal_checkpoint_info__tp_replicated_parameter_patterns"
    change(model_files(path)[0], **{key: [pattern]})
    with pytest.raises(CheckpointError, match="A pattern in"):
        read(path)


MAPS = {
    "columns": affine.contiguous_split_map((6, 5), (3, 2), 1),
    "rows": affine.contiguous_split_map((7, 4), (4, 3, 0), 0),
    "fused": affine.sub_param_map((12, 3), (4, 6, 2), ((2, 2), (4, 2), (1, 1)), 0),
    "fused columns": affine.sub_param_map((3, 10), (4, 6), ((3, 1), (4, 2)), 1),
    "gathered": affine.block_gather_map((8, 3), {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}, 1, 0),
    "partly replicated": affine.segmented_map((8, 3), ((6, False), (2, True)), 0, 2, ((4, 2),)),
    "replicated": affine.replicated_map((3, 2), 3),
    "of one dimension": affine.contiguous_split_map((9,), (5, 4), 0),
}


@pytest.mark.parametrize("name", MAPS)
def test_affine_maps_rebuild_what_deepspeed_does(tmp_path, name):
    expected = MAPS[name]
    tp_size = len(expected.shard_shapes)
    tensor = torch.randn(expected.logical_shape)
    shards = []
    for rank in range(tp_size):
        shard = expected.extract(tensor, rank)
        path = tmp_path / f"{rank}"
        path.write_bytes(shard.numpy().tobytes())
        shards.append(View(Span(path, 0, shard.numel(), shard.dtype), shard.shape))
    found = AffineMap.parse("p", expected.to_dict(), tp_size, tmp_path)
    assert torch.equal(found.join("p", shards).load(), tensor)
    held = [expected.extract(tensor, rank) for rank in range(tp_size)]
    assert torch.equal(found.rebuild(held), expected.rebuild(dict(enumerate(held))))
    assert torch.equal(found.rebuild(held), tensor)
    assert found.is_replicated == (name == "replicated")
    cut = found.cut()
    assert (cut is None) == (name in ("replicated", "partly replicated"))
    if cut is not None:
        assert torch.equal(cut.join("p", shards, tensor.shape).load(), tensor)
        for rank in range(tp_size):
            rows = [i for part in cut.ranges[rank] for i in part]
            own = tensor.index_select(cut.dim, torch.tensor(rows, dtype=torch.int64))
            assert torch.equal(own, expected.extract(tensor, rank))


def test_bad_affine_maps_are_refused(tmp_path):
    def parse(entry, tp_size=2):
        return AffineMap.parse("p", entry, tp_size, tmp_path)

    def entry():
        return MAPS["columns"].to_dict()

    for place, value in [
        ("scale", 0.5),
        ("shape", [6, 6]),
        ("source", [-1, [5, 1]]),
        ("source", [0, [5, 2]]),
        ("source", [29, [5, 1]]),
        ("dest", [0]),
        ("shape", "63"),
    ]:
        bad = entry()
        bad["ranks"][0]["pieces"][0][place] = value
        with pytest.raises(CheckpointError, match="must consist of pieces, each a box"):
            parse(bad)
    with pytest.raises(CheckpointError, match="must be for 3 tensor-parallel ranks"):
        parse(entry(), 3)
    for bad in ({}, {"logical_shape": [2], "ranks": []}, [], None):
        with pytest.raises(CheckpointError, match="must consist of pieces"):
            parse(bad)
    # Missing entries, and entries that differ between ranks but should not.
    shards = []
    for rank, size in enumerate((18, 12)):
        (tmp_path / f"{rank}").write_bytes(bytes([rank]) * 4 * size)
        shards.append(View(Span(tmp_path / f"{rank}", 0, size, torch.float32), (6, size // 6)))
    bad = entry()
    bad["ranks"][1]["pieces"] = []
    with pytest.raises(CheckpointError, match="must cover each of its 30 elements once"):
        parse(bad).join("p", shards)
    same = affine.replicated_map((6,), 2).to_dict()
    with pytest.raises(CheckpointError, match="must have the shape \\(6,\\)"):
        parse(same).join("p", shards)


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
        ("mp_rank_99999999_model_states.pt", "tensor-parallel rank 2 .* is missing"),
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


def test_names_of_shared_parameters_that_lead_nowhere_are_refused(source):
    path = source("z1")
    for shared in ({"lm_head.weight": 3}, {NORM: "lm_head.weight", "lm_head.weight": NORM}):
        for file in model_files(path):
            change(file, shared_params=shared, param_shapes=[{}])
        for file in optimizer_files(path):
            file.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="`shared_params` in"):
            read(path)
