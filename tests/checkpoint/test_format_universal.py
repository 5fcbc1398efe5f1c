"""Universal checkpoints: we read DeepSpeed's and our own, and real engines load ours."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.universal_checkpoint import SubparamShape, load_hp_checkpoint_state

import format_universal_job as job
import universal_job
from launch import deepspeed_command, run
from tp_embed.checkpoint import (
    CheckpointError,
    Cut,
    ReadOptions,
    Request,
    Rule,
    UnsafeCheckpointError,
    convert,
)
from tp_embed.checkpoint.formats import universal
from tp_embed.integrations.deepspeed.universal import to_universal

TABLE, HEAD, NORM = universal_job.TABLE, "lm_head.weight", universal_job.NORM
STATES = ("fp32", "exp_avg", "exp_avg_sq")

# How AutoTP and `shard_embeddings()` cut the Llama.
RULES = tuple(
    map(
        Rule.parse,
        (
            "types.weight=0",
            "*.embed_tokens.weight=1",
            "lm_head.weight=0",
            "*.[qkv]_proj.weight=0",
            "*.gate_proj.weight=0",
            "*.up_proj.weight=0",
            "*_proj.weight=1",
            "*=replicated",
        ),
    )
)

TRAINED_TP = {
    "z1": {"stage": 1, "schedule": True},
    "z2 tied": {"stage": 2, "tied": True},
    "z3 typed": {"stage": 3, "typed": True},
}
TRAINED_DP = {"dp z3": {"stage": 3}}
LOADED_TP: dict[str, dict[str, Any]] = {
    "torch to z1": {"stage": 1, "typed": True, "load": "torch typed"},
    "torch with rules to z2": {"stage": 2, "typed": True, "load": "torch typed with rules"},
    "torch to z3": {"stage": 3, "typed": True, "load": "torch typed"},
    "z1 again": {"stage": 1, "schedule": True, "load": "z1 copied"},
    "z2 tied to z1": {"stage": 1, "tied": True, "load": "z2 tied copied"},
    "z3 typed again": {"stage": 3, "typed": True, "load": "z3 typed copied"},
}
LOADED_DP: dict[str, dict[str, Any]] = {
    "torch to deepspeed z1": {"stage": 1, "load": "torch", "by_deepspeed": True},
    "torch to deepspeed z3": {"stage": 3, "load": "torch", "by_deepspeed": True},
    "dp z3 again": {"stage": 3, "load": "dp z3 copied", "by_deepspeed": True},
    "weights to z1": {"stage": 1, "load": "weights", "fails": True},
    "weights to deepspeed z1": {
        "stage": 1,
        "load": "weights",
        "by_deepspeed": True,
        "fails": True,
    },
}


def launch(out: Path, name: str, without_tp: dict, with_tp: dict) -> dict[str, list[dict]]:
    """Runs all cases, and returns what both ranks saw."""
    cases = {name: {**case, "tp": 1} for name, case in without_tp.items()}
    cases |= {name: {**case, "tp": 2} for name, case in with_tp.items()}
    plan = out / f"{name}.json"
    plan.write_text(json.dumps(cases))
    run(deepspeed_command(job.__file__, out, plan, ranks=2))
    ranks = [torch.load(plan.with_suffix(f".{rank}.pt"), weights_only=True) for rank in range(2)]
    return {name: [seen[name] for seen in ranks] for name in cases}


def to_pt(source: Path, output: Path, **options) -> dict:
    """Converts ``source`` and loads the result with torch."""
    request = Request(to="pt", source_format="universal", read=ReadOptions(**options))
    convert(source, output, request, verify=True)
    return torch.load(output, weights_only=True)


def copy(source: Path, output: Path, **options) -> None:
    request = Request(to="universal", source_format="universal", **options)
    convert(source, output, request, verify=True)


def train_in_torch(typed: bool, file: Path) -> list[float]:
    """Trains for two steps, saves ``file``, and continues."""
    model = universal_job.build(False, typed)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": named}]
    if typed:
        groups = [
            {"params": [(name, p) for name, p in named if "norm" in name], "weight_decay": 0.0},
            {"params": [(name, p) for name, p in named if "norm" not in name], "weight_decay": 0.1},
        ]
    optimizer = torch.optim.AdamW(groups, lr=universal_job.LR)
    losses = []
    for step, ids in enumerate(universal_job.batches()):
        if step == 2:
            buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "buffer_names": buffers,
            }
            torch.save(content, file)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[2:]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("universal")


@pytest.fixture(scope="module")
def trained(out) -> dict:
    """Returns what the ranks saw in training, and checkpoints of both converters."""
    seen = launch(out, "train", TRAINED_DP, TRAINED_TP)
    for name in {**TRAINED_TP, **TRAINED_DP}:
        to_universal(out / name / "end", out / f"{name} ours")
        ds_to_universal.main(
            Namespace(
                input_folder=str(out / name / "end"),
                output_folder=str(out / f"{name} deepspeed's"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=False,
                inject_missing_state=False,
            )
        )
    return seen


@pytest.fixture(scope="module")
def losses_of_torch(out) -> dict[str, list[float]]:
    losses = {}
    for name in ("torch", "torch typed"):
        losses[name] = train_in_torch("typed" in name, out / f"{name}.pt")
        convert(out / f"{name}.pt", out / name, Request(to="universal"), verify=True)
    request = Request(to="universal", tp_size=2, read=ReadOptions(rules=RULES))
    convert(out / "torch typed.pt", out / "torch typed with rules", request, verify=True)
    model = torch.load(out / "torch.pt", weights_only=True)["model"]
    torch.save(model, out / "weights.pt")
    convert(out / "weights.pt", out / "weights", Request(to="universal"), verify=True)
    return losses


@pytest.fixture(scope="module")
def loaded(out, trained, losses_of_torch) -> dict:
    for name in trained:
        copy(out / f"{name} deepspeed's", out / f"{name} copied")
    return launch(out, "load", LOADED_DP, LOADED_TP)


@pytest.mark.parametrize("name", [*TRAINED_TP, *TRAINED_DP])
def test_both_converters_say_the_same(out, trained, tmp_path, name):
    ours = to_pt(out / f"{name} ours", tmp_path / "ours.pt", rules=RULES)
    theirs = to_pt(out / f"{name} deepspeed's", tmp_path / "theirs.pt")
    files = {path.name: path for path in (out / f"{name} ours").glob("*/zero/*") if path.is_dir()}
    trained_names = {parameter for parameter in files if (files[parameter] / "step.pt").exists()}
    for content in (ours, theirs):
        assert content["step"] == 2
        groups = content["optimizer"]["param_groups"]
        names = [parameter for group in groups for parameter in group["param_names"]]
        assert set(names) == trained_names
        for index, parameter in enumerate(names):
            state = content["optimizer"]["state"][index]
            assert state["step"] == 2
            for key in STATES:
                expected = torch.load(files[parameter] / f"{key}.pt", weights_only=True)["param"]
                found = content["model"][parameter] if key == "fp32" else state[key]
                assert torch.equal(found, expected)
    for parameter in ours["model"]:
        assert torch.equal(ours["model"][parameter], theirs["model"][parameter])


def whole(seen: list[dict], case: dict, name: str, key: str) -> torch.Tensor:
    """Joins the ranks' shards of a Parameter or moment."""
    shards = [rank["state"][name][key] for rank in seen]
    dims = dict(zip(universal_job.WATCHED, (0 if case.get("tied") else 1, 0, 1, None), strict=True))
    if dims[name] is None or shards[0].shape == expected_shape(case, name):
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    return torch.cat(shards, dims[name])


def expected_shape(case: dict, name: str) -> torch.Size:
    return universal_job.build(case.get("tied", False)).get_parameter(name).shape


LOADED = {**LOADED_TP, **LOADED_DP}


@pytest.mark.parametrize("name", [name for name in LOADED if not LOADED[name].get("fails")])
def test_engines_load_all_bit_for_bit(out, loaded, name):
    case, seen = LOADED[name], loaded[name]
    (directory,) = (path for path in (out / case["load"]).iterdir() if path.is_dir())
    for parameter in universal_job.WATCHED:
        for key in seen[0]["state"][parameter]:
            file = directory / "zero" / parameter / f"{key}.pt"
            expected = torch.load(file, weights_only=True)["param"]
            assert torch.equal(whole(seen, case, parameter, key), expected), (parameter, key)
    for rank in seen:
        assert rank["steps"] == 2
        assert rank["client"] == (None if "torch" in name else "kept")
        assert not rank["knows cuts"]
        if case.get("typed"):
            assert rank["buffer"] == 2 * 32


@pytest.mark.parametrize("name", [name for name in LOADED if "torch" in LOADED[name]["load"]])
def test_training_of_torch_goes_on_in_an_engine(loaded, losses_of_torch, name):
    expected = losses_of_torch[LOADED[name]["load"].removesuffix(" with rules")]
    for rank in loaded[name]:
        assert rank["losses"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in LOADED if "copied" in LOADED[name]["load"]])
def test_a_copy_trains_on_as_its_original(trained, loaded, name):
    original = trained[LOADED[name]["load"].removesuffix(" copied")]
    tolerance = 0.0 if "again" in name else 1e-6
    for rank, before in zip(loaded[name], original, strict=True):
        assert rank["losses"] == pytest.approx(before["losses"], abs=tolerance)


def test_weights_alone_are_not_loaded_as_a_training_run(loaded):
    for rank in loaded["weights to deepspeed z1"]:
        assert "optimizer_state.pt containing optimizer global state is missing" in rank["error"]
    for rank in loaded["weights to z1"]:
        assert "but has no `zero/optimizer_state.pt`" in rank["error"]


@pytest.mark.parametrize("name", ["z1", "z2 tied", "z3 typed"])
def test_a_copy_keeps_everything(out, loaded, name):
    first, second = (
        universal.read(out / f"{name} {kind}", ReadOptions()) for kind in ("deepspeed's", "copied")
    )
    assert set(first.names) == set(second.names)
    assert first.cuts == second.cuts
    assert first.cuts[NORM] is None
    assert first.cuts[universal_job.WATCHED[1]] == Cut.even(0, (16,), 2)
    for attribute in ("tp_size", "ties", "buffers", "step", "optimizer", "extra"):
        assert getattr(first, attribute) == getattr(second, attribute)
    assert first.ties == ({HEAD: TABLE} if "tied" in name else {})
    assert first.buffers == ({"seen"} if "typed" in name else set())
    assert first.extra["client"] == "kept"
    assert not first.notes


def test_torch_comes_back_from_a_universal_checkpoint(out, losses_of_torch, tmp_path):
    content = to_pt(out / "torch typed", tmp_path / "back.pt")
    before = torch.load(out / "torch typed.pt", weights_only=True)
    assert content["buffer_names"] == before["buffer_names"] == ["seen"]
    for name, value in before["model"].items():
        assert torch.equal(content["model"][name], value)
        assert content["model"][name].dtype == value.dtype
    model = universal_job.build(False, typed=True, seed=1)
    model.load_state_dict(content["model"])
    groups = [
        {**group, "params": [model.get_parameter(name) for name in group["param_names"]]}
        for group in before["optimizer"]["param_groups"]
    ]
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups])
    optimizer.load_state_dict(content["optimizer"])
    losses = []
    for ids in universal_job.batches()[2:]:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == losses_of_torch["torch typed"]


def save_small(file: Path) -> None:
    """Saves a torch checkpoint with two Parameters, one of them frozen, and a buffer."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model[1].requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named)
    model(torch.rand(5, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": 1,
            "buffer_names": [name for name, _ in model.named_buffers()],
        },
        file,
    )


@pytest.fixture
def small(tmp_path) -> Path:
    """Returns the directory of a small universal checkpoint."""
    save_small(tmp_path / "small.pt")
    convert(tmp_path / "small.pt", tmp_path / "small", Request(to="universal"), verify=True)
    return tmp_path / "small" / "global_step1_universal"


def refused(source: Path, match: str, kind: type = CheckpointError) -> None:
    """Asserts that reading ``source`` fails and nothing is written."""
    output = source.parent / "refused"
    with pytest.raises(kind, match=match):
        convert(source, output, Request(to="universal", source_format="universal"))
    assert not output.exists()
    assert not list(source.parent.glob(".refused*"))


def change(path: Path, edit) -> None:
    content = torch.load(path, weights_only=True)
    edited = edit(content)
    torch.save(content if edited is None else edited, path)


def test_every_truncated_file_is_refused(small):
    root = small.parent
    files = sorted(small.rglob("*.pt"))
    assert len(files) == 2 + 1 + 2 * 4 + 2
    for file in files:
        data = file.read_bytes()
        for size in (0, 10, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            refused(root, f"{file.name}` must be a file that")
        file.write_bytes(data)
    convert(root, root.parent / "whole", Request(to="universal", source_format="universal"))


def test_missing_files_are_refused(small):
    root, weight = small.parent, small / "zero" / "0.weight"
    for file, match in [
        (weight / "exp_avg.pt", "There must be a file .*/0.weight/exp_avg.pt`"),
        (weight / "exp_avg_sq.pt", "There must be a file .*/0.weight/exp_avg_sq.pt`"),
        (weight / "fp32.pt", "There must be a file .*/0.weight/fp32.pt`"),
        (weight / "step.pt", "There must be a file .*/0.weight/step.pt`"),
        (small / "zero" / "1.weight" / "fp32.pt", "There must be a file .*/1.weight/fp32.pt`"),
        (small / "zero" / "optimizer_state.pt", "There must be a file .*/optimizer_state.pt`"),
        (root / "latest_universal", "or have a file `latest_universal`"),
    ]:
        if file.name == "step.pt":
            change(small / "zero" / "optimizer_state.pt", lambda c: c.pop("optimizer_state_dict"))
        data = file.read_bytes()
        file.unlink()
        refused(root, match)
        file.write_bytes(data)
    for file in small.glob("*.pt"):
        file.unlink()
    refused(root, "must have a file `mp_rank_")


def test_a_missing_parameter_is_noticed(small):
    shutil.rmtree(small / "zero" / "0.bias")
    refused(small.parent, "each trained Parameter once, but `0.bias` is missing")


def test_missing_ranks_are_refused(out, losses_of_torch, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(out / "torch typed with rules", source)
    (directory,) = source.glob("global_step*")
    (directory / "zero_pp_rank_0_mp_rank_01_model_states.pt").unlink()
    refused(source, "but have the steps .* and .2, 1. tensor-parallel ranks|as its `mp_world_size")
    (directory / "mp_rank_01_model_states.pt").unlink()
    refused(source, "must have model files of 2 tensor-parallel ranks, as its `mp_world_size`")


def test_files_of_other_steps_are_refused(out, losses_of_torch, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(out / "torch typed with rules", source)
    (directory,) = source.glob("global_step*")
    for name in ("mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_01_model_states.pt"):
        change(directory / name, lambda content: content.update(global_steps=3))
    refused(source, "`global_steps` is 2 in .* and 3 in")


def test_parameters_with_other_steps_are_read_with_a_note(small, tmp_path):
    torch.save(torch.tensor(7.0), small / "zero" / "0.bias" / "step.pt")
    checkpoint = universal.read(small, ReadOptions())
    assert checkpoint.optimizer.steps == {"0.weight": 1, "0.bias": 7}
    assert (
        "from 1 to 7 steps. An engine can continue from this at ZeRO 0 only" in checkpoint.notes[0]
    )
    copy(small, tmp_path / "copy")
    assert universal.read(tmp_path / "copy", ReadOptions()).optimizer == checkpoint.optimizer


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("zero/0.weight/fp32.pt", {"param": [1.0]}, "must hold a tensor, but holds"),
        ("zero/0.weight/fp32.pt", torch.zeros(12), "in its logical shape, .* but it is flat"),
        ("zero/0.weight/fp32.pt", 3, "must hold a tensor, but holds 3"),
        ("zero/0.weight/fp32.pt", {"param": torch.zeros(3, 4).to_sparse()}, "must be dense"),
        ("zero/0.weight/fp32.pt", {"param": torch.zeros(3, 4).int()}, "of floating point, but"),
        (
            "zero/0.weight/fp32.pt",
            {"param": torch.zeros(3, 4), "is_expert_param": True},
            "but holds experts",
        ),
        (
            "zero/0.weight/exp_avg.pt",
            {"param": torch.zeros(4, 3)},
            r"the shape of its Parameter, \(3, 4\)",
        ),
        (
            "zero/0.weight/exp_avg.pt",
            {"param": torch.zeros(3)},
            r"the shape of its Parameter, \(3, 4\)",
        ),
        ("zero/0.weight/step.pt", "one", "The step in .* must be a number of at least 0"),
        ("zero/0.weight/step.pt", True, "The step in .* must be a number of at least 0"),
        ("zero/0.weight/step.pt", torch.tensor(float("nan")), "must be a number of at least 0"),
        ("zero/0.weight/step.pt", torch.ones(2), "The step in .* must be a number of at least 0"),
        ("zero/0.weight/step.pt", -1, "The step in .* must be a number of at least 0, but is -1"),
        ("zero/optimizer_state.pt", [1], "must be of type dict, but is of type list"),
        ("zero/optimizer_state.pt", {}, "`param_groups` in .* must be of type list"),
        ("zero/optimizer_state.pt", {"param_groups": []}, "must not be empty"),
        ("zero/optimizer_state.pt", {"param_groups": [3]}, "A param group in .* of type dict"),
        ("zero/optimizer_state.pt", {"param_groups": [{"params": 3}]}, "must be of type list"),
        (
            "zero/optimizer_state.pt",
            {"param_groups": [{"params": ["0.weight", "0.weight", "0.bias"]}]},
            "once, but `0.weight` is missing, repeated",
        ),
        (
            "zero/optimizer_state.pt",
            {"param_groups": [{"params": ["0.weight", "0.bias", "other"]}]},
            "once, but `other` is missing, repeated or unknown",
        ),
        ("mp_rank_00_model_states.pt", [1], "must be of type dict, but is of type list"),
        ("mp_rank_00_model_states.pt", {}, "The model, `module`, in .* must be of type dict"),
        ("mp_rank_00_model_states.pt", {"module": {3: torch.ones(1)}}, "must be of type str"),
        ("mp_rank_00_model_states.pt", {"module": {}, "buffer_names": 3}, "must be of type list"),
        (
            "mp_rank_00_model_states.pt",
            {"module": {}, "buffer_names": ["b"], "global_steps": 1},
            "`b` in `module` in .* must be of type Tensor",
        ),
        (
            "mp_rank_00_model_states.pt",
            {"module": {}, "global_steps": 1, "shared_params": {"a": "b", "b": "a"}},
            "must name Parameters that are stored, but `a` is `b`, which is not",
        ),
        (
            "mp_rank_00_model_states.pt",
            {"module": {}, "global_steps": 1, "shared_params": {"a": 1}},
            "A name in `shared_params` in .* must be of type str",
        ),
        (
            "mp_rank_00_model_states.pt",
            {"module": {}, "global_steps": 1, "universal_checkpoint_info": [1]},
            "`universal_checkpoint_info` in .* must be of type dict",
        ),
        ("mp_rank_00_model_states.pt", {"module": {}, "global_steps": "1"}, "must be of type int"),
        ("mp_rank_00_model_states.pt", {"module": {}, "global_steps": 1.5}, "must be of type int"),
        ("mp_rank_00_model_states.pt", {"module": {}, "global_steps": -1}, "must be at least 0"),
        ("mp_rank_00_model_states.pt", {"module": {}, "global_steps": 2}, "must have one step"),
        (
            "mp_rank_00_model_states.pt",
            {"module": {}, "global_steps": 1, "shared_params": {"a": "lost"}},
            "must be another name of a Parameter, but is tied to `lost`, which is missing",
        ),
        (
            "mp_rank_00_model_states.pt",
            {"module": {}, "global_steps": 1, "param_shapes": [{"lost": torch.Size([3])}]},
            "There must be a directory .*/zero/lost`",
        ),
    ],
)
def test_damaged_content_is_refused(small, file, content, match):
    torch.save(content, small / file)
    refused(small.parent, match)


STACKED = {"o.weight": (4, 4), "qkv.weight": (12, 2), "kv.weight": (6, 2), "norm.weight": (4,)}
STACKED_RULES = ("o.weight=1", "qkv.weight=0/3", "kv.weight=0:4,2", "*=replicated")


@pytest.fixture
def stacked(tmp_path) -> Path:
    """Writes a checkpoint for two ranks, with stacked Parameters."""
    model = {name: torch.rand(shape) for name, shape in STACKED.items()}
    state = {
        index: {"step": torch.tensor(1.0), "exp_avg": value, "exp_avg_sq": value}
        for index, value in enumerate(model.values())
    }
    groups = [{"lr": 0.1, "params": [*range(len(model))], "param_names": [*model]}]
    optimizer = {"state": state, "param_groups": groups}
    torch.save({"model": model, "step": 1, "optimizer": optimizer}, tmp_path / "stacked.pt")
    rules = tuple(map(Rule.parse, STACKED_RULES))
    request = Request(to="universal", tp_size=2, read=ReadOptions(rules=rules))
    convert(tmp_path / "stacked.pt", tmp_path / "stacked", request, verify=True)
    return tmp_path / "stacked" / "global_step1_universal"


@pytest.mark.parametrize("name", ["o.weight", "qkv.weight", "norm.weight"])
def test_deepspeed_cuts_without_a_map_as_it_is_said(stacked, name):
    whole = torch.load(stacked / "zero" / name / "fp32.pt", weights_only=True)["param"]
    parts = whole.chunk(3 if name == "qkv.weight" else 1)
    for rank in range(2):
        dim = 1 if name == "o.weight" else 0
        shard = torch.cat([part.chunk(2, dim)[rank] for part in parts], dim)
        param: Any = torch.nn.Parameter(torch.zeros_like(whole if name == "norm.weight" else shard))
        fragment = torch.zeros(param.numel())
        param._hp_mapping = Namespace(
            lp_fragment_address=Namespace(start=0, numel=param.numel()),
            get_hp_fragment=lambda fragment=fragment: fragment,
            optim_fragment=None,
        )
        load_hp_checkpoint_state(param, str(stacked / "zero" / name), rank, 2)
        expected = whole if name == "norm.weight" else shard
        assert torch.equal(fragment.view(param.shape), expected)
        assert torch.equal(param._hp_mapping.optim_fragment["exp_avg"], fragment)


def test_cuts_are_known_without_maps(stacked):
    known = universal.read(stacked, ReadOptions()).cuts
    for file in (*stacked.glob("*.pt"), stacked / "zero" / "optimizer_state.pt"):
        change(file, lambda content: content.update(universal_checkpoint_info=None))
    cuts = universal.read(stacked, ReadOptions()).cuts
    assert cuts == {name: known[name] for name in ("o.weight", "qkv.weight")}
    kv = stacked / "zero" / "kv.weight" / "fp32.pt"
    shape = SubparamShape(["kv.weight"], ((4, 2), 2), 0)
    torch.save({**torch.load(kv), "sub_param_shape": shape}, kv)
    assert universal.read(stacked, ReadOptions()).cuts["kv.weight"] == known["kv.weight"]
    for wrong in (
        {"cat_dim": 2},
        {"cat_dim": "0"},
        {"cat_dim": 0, "param_n_sub_params": 4},
        {"cat_dim": 0, "param_n_sub_params": 10**12},
        {"sub_param_shape": SubparamShape(["kv.weight"], ((4, 3), 2), 0)},
    ):
        torch.save({"param": torch.rand(6, 2), **wrong}, kv)
        refused(stacked.parent, r"must say along which dimension of \(6, 2\)")


def test_what_is_not_plain_is_left_out_with_a_note(small):
    group = {"params": ["0.weight", "0.bias"], "lr": torch.tensor(0.5), "odd": torch.ones(2)}
    change(small / "zero" / "optimizer_state.pt", lambda c: c.update(param_groups=[group]))
    checkpoint = universal.read(small, ReadOptions())
    (kept,) = checkpoint.optimizer.groups
    assert kept == {"params": group["params"], "lr": 0.5}
    assert checkpoint.notes == ("In a param group `odd` has a Tensor in it and was left out.",)


class Harmful:
    def __reduce__(self):
        return (print, ("harmful code runs",))


@pytest.mark.parametrize(
    "file",
    ["zero/0.weight/fp32.pt", "zero/0.weight/step.pt", "zero/optimizer_state.pt", "mp_rank_00_"],
)
def test_files_that_would_run_code_are_refused(small, capsys, file):
    (path,) = small.glob(f"{file}*")
    torch.save({"param": Harmful()}, path)
    refused(small.parent, "asks to import", UnsafeCheckpointError)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tag", ["../..", "..", "/etc", ".", "", "a/b", "a\0b"])
def test_a_tag_that_leads_out_is_refused(small, tag):
    (small.parent / "latest_universal").write_text(tag)
    refused(small.parent, "must be the name of a directory in", UnsafeCheckpointError)


def test_a_tag_is_chosen_by_name(small):
    root = small.parent
    small.rename(root / "other")
    refused(root, "must name a universal checkpoint in .* has no directory `zero`")
    assert universal.read(root, ReadOptions(tag="other")).step == 1
    assert universal.read(root / "other", ReadOptions()).step == 1
    assert universal.recognises(root)
    assert universal.recognises(root / "other")
    assert not universal.recognises(root.parent)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "optimizer_state.pt", "x" * 256, "nul\0"])
def test_a_name_that_is_no_file_name_is_not_written(tmp_path, name):
    torch.save({name: torch.ones(2)}, tmp_path / "source.pt")
    with pytest.raises(CheckpointError, match="The name of a Parameter must"):
        convert(tmp_path / "source.pt", tmp_path / "output", Request(to="universal"))
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_optimizers_other_than_adam_are_not_written(tmp_path):
    model = torch.nn.Linear(2, 2)
    for optimizer in (
        torch.optim.SGD(model.named_parameters(), momentum=0.9),
        torch.optim.AdamW(model.named_parameters(), amsgrad=True),
    ):
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, tmp_path / "source.pt")
        with pytest.raises(CheckpointError, match=r"of `weight` must be Adam's"):
            convert(tmp_path / "source.pt", tmp_path / "output", Request(to="universal"))
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_endless_structures_are_left_out_with_a_note(small):
    endless: list = []
    endless.append(endless)
    doubled: list = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    for path in small.glob("*.pt"):
        change(path, lambda c: c.update(endless=endless, doubled=doubled, noise=torch.ones(3)))
    checkpoint = universal.read(small, ReadOptions())
    assert not {"endless", "doubled", "noise"} & checkpoint.extra.keys()
    assert len(checkpoint.notes) == 3
