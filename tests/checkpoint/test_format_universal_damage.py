"""Universal checkpoints that are damaged, hostile, or not as our engines write them."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape, load_hp_checkpoint_state

from tp_embed.checkpoint import (
    CheckpointError,
    ReadOptions,
    Request,
    Rule,
    UnsafeCheckpointError,
    convert,
)
from tp_embed.checkpoint.formats import universal
from universal_checkpoints import change, copy, refused, save_small


@pytest.fixture
def small(tmp_path) -> Path:
    """Returns the directory of a small universal checkpoint."""
    save_small(tmp_path / "small.pt")
    convert(tmp_path / "small.pt", tmp_path / "small", Request(to="universal"), verify=True)
    return tmp_path / "small" / "global_step1_universal"


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
        ("zero/0.weight/fp32.pt", {"param": torch.zeros(3, 4).int()}, "floating-point tensor, but"),
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
