"""Files that are written as DeepSpeed's: how they are cut and padded, and what they cannot hold."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from deepspeed.checkpoint.affine import ParamAffineMap, replicated_map, sub_param_map

from tp_embed.checkpoint import Request, convert, formats
from tp_embed.checkpoint.contents import MASTER, Checkpoint, Key, Optimizer, ReadOptions, Target
from tp_embed.checkpoint.cuts import Cut, Rule
from tp_embed.checkpoint.errors import CheckpointError
from tp_embed.checkpoint.files.arrays import Span, View
from tp_embed.checkpoint.formats import deepspeed


def to_deepspeed(source, output, stage, tp, dp=1, *, read):
    convert(
        source,
        output,
        Request("deepspeed", tp_size=tp, zero_stage=stage, dp_size=dp, read=read),
    )


def source_of(path, model, *, groups=None, steps=3, states=("exp_avg", "exp_avg_sq")):
    """Writes a torch file with a model and, given param groups, optimizer state."""
    root = {"model": model, "step": 3}
    if groups is not None:
        names = [name for group in groups for name in group]
        indices = iter(range(len(names)))
        root["optimizer"] = {
            "state": {
                index: {"step": torch.tensor(float(steps))}
                | {key: torch.rand(model[name].shape) for key in states}
                for index, name in enumerate(names)
            },
            "param_groups": [
                {"lr": 0.5, "params": [next(indices) for _ in group], "param_names": group}
                for group in groups
            ],
        }
    torch.save(root, path)
    return path


ODD = {
    "a.weight": (7, 5),
    "qkv.weight": (18, 5),
    "norm.weight": (5,),
    "scale": (),
    "b.weight": (3, 7),
}
ODD_RULES = ("a.weight=0", "qkv.weight=0:10,4,4", "b.weight=1", "*=replicated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "tp", "dp"), [(1, 2, 3), (2, 1, 4), (3, 3, 2), (3, 2, 5)])
def test_sizes_that_do_not_divide_are_padded_with_zeros(tmp_path, stage, tp, dp, dtype):
    model = {name: torch.rand(shape).to(dtype) for name, shape in ODD.items()}
    groups = [["norm.weight", "scale"], ["qkv.weight", "b.weight", "a.weight"]]
    source = source_of(tmp_path / "source.pt", model, groups=groups)
    options = ReadOptions(rules=tuple(map(Rule.parse, ODD_RULES)))
    to_deepspeed(source, tmp_path / "written", stage, tp, dp, read=options)
    again = formats.read(tmp_path / "written", ReadOptions())
    expected = formats.read(source, ReadOptions())
    for key, array in expected.tensors.items():
        found = again.tensors.get(key, again.tensors.get(Key(key.name, MASTER)))
        assert torch.equal(found.load().to(array.dtype), array.load()), key
    total = sum(t.float().abs().sum() for t in model.values())
    saved = 0.0
    for file in (tmp_path / "written").rglob("*_mp_rank_00_optim_states.pt"):
        zero = torch.load(file, weights_only=False)["optimizer_state_dict"]
        flats = zero["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        saved += sum(flat.abs().sum() for flat in flats)
    assert saved <= total * 1.001
    if tp == 1:
        assert torch.isclose(saved, total)


def test_the_maps_of_fused_layers_are_those_of_deepspeed(tmp_path):
    model = {"qkv.weight": torch.rand(18, 5), "norm.weight": torch.rand(5)}
    source = source_of(tmp_path / "source.pt", model)
    options = ReadOptions(rules=tuple(map(Rule.parse, ODD_RULES)))
    to_deepspeed(source, tmp_path / "written", 1, 2, read=options)
    files = sorted((tmp_path / "written").rglob("mp_rank_*_model_states.pt"))
    states = [torch.load(file, weights_only=False) for file in files]
    info = states[0]["universal_checkpoint_info"]
    for name, whole in model.items():
        entry = info["affine_map"]["params"][rf"^{name}$".replace(".", r"\.")]
        shards = dict(enumerate(state["module"][name] for state in states))
        layout = ParamAffineMap.from_dict(entry)
        layout.validate_coverage()
        assert torch.equal(layout.rebuild(shards), whole)
    assert layout.to_dict() == replicated_map((5,), 2).to_dict()
    widths = [[5, 5], [2, 2], [2, 2]]
    theirs = sub_param_map((18, 5), (10, 4, 4), widths, 0).to_dict()
    assert info["affine_map"]["params"][r"^qkv\.weight$"] == theirs
    assert info["sub_param_shard_widths"] == {r"^qkv\.weight$": widths}


def test_files_are_laid_out_without_memory_and_space(tmp_path):
    shape = (50_000_000, 128)
    flat = Span(tmp_path / "nowhere", 0, shape[0] * shape[1], torch.bfloat16)
    checkpoint = Checkpoint(
        "pt",
        tmp_path,
        {Key("embed_tokens.weight"): View(flat, shape)},
        optimizer=Optimizer(({"lr": 0.1, "params": ["embed_tokens.weight"]},), {}),
    )
    cuts = {"embed_tokens.weight": Cut.even(0, (shape[0],), 2)}
    for stage in (1, 3):
        path = tmp_path / str(stage)
        path.mkdir()
        target = Target(2, cuts, zero_stage=stage, dp_size=2)
        arrays = deepspeed.lay_out(checkpoint, target, path).arrays
        assert {key: array.shape for key, array in arrays.items()} == {
            key: array.shape for key, array in checkpoint.tensors.items()
        }
        stats = [file.stat() for file in path.rglob("*.pt")]
        assert sum(stat.st_size for stat in stats) > 4 * shape[0] * shape[1]
        assert sum(stat.st_blocks for stat in stats) * 512 < 2**20
        # A second run finds the files laid out.
        mtimes = [os.stat(file).st_mtime_ns for file in path.rglob("*.pt")]
        assert deepspeed.lay_out(checkpoint, target, path).arrays.keys() == arrays.keys()
        assert mtimes == [os.stat(file).st_mtime_ns for file in path.rglob("*.pt")]


TWO = {"x.weight": torch.ones(2, 2), "y.weight": torch.ones(2)}
BOTH = {"groups": [["x.weight", "y.weight"]]}


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (4, {}, "`--zero-stage` must be 0, 1, 2 or 3"),
        (0, {"dtype": torch.bfloat16}, "At ZeRO 0 the weights must be in float32"),
        (3, {"dtype": torch.float16}, "At ZeRO 3 the weights must not be in float16"),
        (1, {"dtype": torch.float64}, "weights must all have one dtype of .* has torch.float64"),
        (1, {"groups": [["x.weight", "x.weight"]]}, "`x.weight` is there twice"),
        (1, {"groups": [["x.weight"]]}, "`y.weight` must be in a param group"),
        (1, {"groups": [["x.weight", "y.weight", "z"]]}, "`z` is no Parameter"),
        (1, {"groups": [["x.weight", "y.weight"], []]}, "Param group 1 .* must not be empty"),
        (1, {"groups": [None]}, "must have the names of its Parameters"),
        (1, {"groups": ()}, "must be in a param group of the optimizer"),
        (2, {"without": Key("y.weight", "exp_avg")}, "must have the same optimizer states"),
        (2, {"steps": {"x.weight": 3.0, "y.weight": 2.0}}, "the same number of steps"),
        (2, {"steps": dict.fromkeys(TWO, float("nan"))}, "must be a whole number"),
        (0, {"steps": dict.fromkeys(TWO, 1.5)}, "must be a whole number"),
        (2, {"shape": Key("y.weight", "exp_avg")}, r"must have the shape \(2,\)"),
        (2, {"extra": {"client": [torch.ones(1)]}}, "must be plain Python values"),
        (2, {"lr": torch.ones(1)}, "hyperparameters of the optimizer must be plain"),
        (1, {"cut": Cut.even(0, (1,), 2)}, "Tensor-parallel rank 1 must have elements"),
    ],
)
def test_what_deepspeed_cannot_hold_is_refused(tmp_path, stage, change, message):
    dtype = change.get("dtype", torch.float32)
    model = {name: value.to(dtype) for name, value in TWO.items()}
    if "cut" in change:
        model = {"x.weight": torch.ones(1, 2), "y.weight": torch.ones(2)}
    groups = [["y.weight"], ["x.weight"]] if "cut" in change else BOTH["groups"]
    source = source_of(tmp_path / "source.pt", model, groups=groups)
    checkpoint = formats.read(source, ReadOptions())
    tensors = dict(checkpoint.tensors)
    tensors.pop(change.get("without"), None)
    if "shape" in change:
        tensors[change["shape"]] = View(tensors[change["shape"]], (1, 2))
    names = change.get("groups", groups)
    checkpoint = replace(
        checkpoint,
        tensors=tensors,
        extra=change.get("extra", {}),
        optimizer=Optimizer(
            tuple({"lr": change.get("lr", 0.1), "params": own} for own in names),
            change.get("steps", checkpoint.optimizer.steps),
        ),
    )
    (tmp_path / "new").mkdir()
    cuts = {"x.weight": change.get("cut"), "y.weight": None}
    target = Target(2 if "cut" in change else 1, cuts, zero_stage=stage)
    with pytest.raises(CheckpointError, match=message):
        deepspeed.lay_out(checkpoint, target, tmp_path / "new")
