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

import format_universal_job as job
import universal_job
from forks import run_script
from tp_embed.checkpoint import Cut, ReadOptions, Request, Rule, convert
from tp_embed.checkpoint.formats import universal
from tp_embed.integrations.deepspeed.universal import to_universal
from universal_checkpoints import change, copy, refused

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
    run_script(job.__file__, out, plan, ranks=2)
    ranks = [torch.load(plan.with_suffix(f".{rank}.pt"), weights_only=True) for rank in range(2)]
    return {name: [seen[name] for seen in ranks] for name in cases}


def to_pt(source: Path, output: Path, **options) -> dict:
    """Converts ``source`` and loads the result with torch."""
    request = Request(to="pt", source_format="universal", read=ReadOptions(**options))
    convert(source, output, request, verify=True)
    return torch.load(output, weights_only=True)


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
