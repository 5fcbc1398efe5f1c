"""Real engines load our DeepSpeed checkpoints and continue training. Our files are compared with
the engines' own, key by key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.affine import ParamAffineMap, replicated_map, sub_param_map
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.nn.utils import clip_grad_norm_

import convert_load_job as job
from convert_job import build
from launch import deepspeed_command, run
from tp_embed.checkpoint import Request, convert, formats, plan
from tp_embed.checkpoint.contents import MASTER, Checkpoint, Key, Optimizer, ReadOptions, Target
from tp_embed.checkpoint.cuts import Cut, Rule
from tp_embed.checkpoint.errors import CheckpointError
from tp_embed.checkpoint.files.arrays import Span, View
from tp_embed.checkpoint.formats import deepspeed
from universal_job import LR, NORM, batches, optimizer_names, param_groups

# How the tables of ours and the layers of AutoTP are cut in the small Llama.
CUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "0"),
    **dict.fromkeys(("o_proj", "down_proj"), "1"),
    "norm": "replicated",
    "lm_head": "vocab",
}
# Engines that continue from plain torch have no schedule, as it has none.
NO_SCHEDULE = {"scheduler": {}}


def kind(name):
    """What is special of a case is in its name."""
    return {key: key in name.split() for key in ("tied", "typed")}


def dtype(name):
    return {"dtype": "bfloat16" if "bf16" in name.split() else "float32"}


def config(name):
    """Configures DeepSpeed's own optimizer instead of torch's, or gradients summed in fp32, where
    DeepSpeed uses another class, `BF16_Optimizer`."""
    fused = {"optimizer": {"type": "AdamW", "params": {"lr": LR}}}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    return {**(fused if "fused" in name else {}), **(sums if "sums" in name else {})}


def settings(name):
    """Returns the config of a case's engine, by its name."""
    zero = {"round_robin_gradients": True} if "robin" in name.split() else {}
    return {"config": config(name), "zero": zero, **kind(name), **dtype(name)}


def rules(name, stage):
    tied = kind(name)["tied"]
    cuts = {
        **CUTS,
        "embed_tokens": "vocab" if tied else "embed",
        # An engine at ZeRO 3 cannot run a layer with an empty shard.
        "types": "embed" if stage == 3 else "vocab",
    }
    return tuple(Rule.parse(f"*{pattern}.weight={how}") for pattern, how in cuts.items())


def to_deepspeed(source, output, stage, tp=1, dp=1, **more):
    more = {"read": ReadOptions(rules=rules(output.name, stage)), **more}
    convert(source, output, Request("deepspeed", tp_size=tp, zero_stage=stage, dp_size=dp, **more))


def launch(out, name, cases, *, ranks=2):
    file = out / f"{name}.json"
    file.write_text(json.dumps(cases))
    run(deepspeed_command(job.__file__, out, file, ranks=ranks))
    return [torch.load(out / f"{name}.{rank}.pt", weights_only=True) for rank in range(ranks)]


def torch_trained(path, name):
    """Trains with plain torch and saves after two steps. Returns the losses after that."""
    model = build(kind(name))
    names = {p: name for name, p in model.named_parameters()}
    groups = param_groups(model) if kind(name)["typed"] else [{"params": list(model.parameters())}]
    for group in groups:
        group["params"] = [(names[p], p) for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    losses = []
    for step, ids in enumerate(batches()):
        if step == 2:
            root = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}
            torch.save({**root, "buffer_names": ["seen"] if kind(name)["typed"] else []}, path)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[2:]


# How engines are trained and saved: ZeRO stage and number of tensor-parallel ranks.
TRAINED = {
    "dp z2 bf16": (2, 1),
    "dp z1 typed fused": (1, 1),
    "dp z2 robin bf16": (2, 1),
    "dp z1 robin bf16 sums": (1, 1),
    "tp z1 bf16": (1, 2),
    "tp z0 typed": (0, 2),
}
# Targets of conversion: numbers of tensor- and data-parallel ranks.
FROM_ENGINE = {
    "dp z2 bf16 to dp z1 bf16": (1, 1, 2),
    "dp z2 bf16 to dp z1 bf16 sums": (1, 1, 2),
    "dp z2 bf16 to dp z3 bf16": (3, 1, 2),
    "dp z2 robin bf16 to dp z1 robin bf16": (1, 1, 2),
    "dp z1 robin bf16 sums to dp z1 robin bf16 sums": (1, 1, 2),
    "dp z1 typed fused to dp z0 typed fused": (0, 1, 2),
    "dp z1 typed fused to tp z2 typed fused": (2, 2, 1),
    "tp z1 bf16 to tp z3 bf16": (3, 2, 1),
    "tp z0 typed to tp z1 typed": (1, 2, 1),
}
FROM_TORCH = {
    **{f"torch typed to dp z{stage} typed": (stage, 1, 2) for stage in range(4)},
    "torch tied to dp z3 tied": (3, 1, 2),
    **{f"torch typed to tp z{stage} typed": (stage, 2, 1) for stage in range(4)},
    "torch tied to tp z1 tied": (1, 2, 1),
}
# Weights without an optimizer, and how they are loaded.
NO_STATES = {"load_optimizer_states": False, "load_lr_scheduler_states": False}
WEIGHTS = {
    "weights to dp z3 bf16": (3, 1, 2, NO_STATES),
    "weights to dp z1 bf16": (1, 1, 2, NO_STATES),
    "weights to dp z0": (0, 1, 2, {"load_module_only": True, **NO_STATES}),
    "weights to tp z2 bf16": (2, 2, 1, NO_STATES),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def seen(out):
    """Returns for each case the losses after two steps, before and after the conversion, and the
    client's state."""
    cases = {
        name: {"stage": stage, "tp": tp, **settings(name)} for name, (stage, tp) in TRAINED.items()
    }
    by_rank = launch(out, "train", cases)
    before = {name: by_rank[0][name]["losses"] for name in TRAINED}
    for name in ("torch typed", "torch tied"):
        before[name] = torch_trained(out / f"{name}.pt", name)
    model = build({})
    torch.save(model.state_dict(), out / "weights.pt")
    ids = batches()[2]
    before["weights"] = model(input_ids=ids, labels=ids).loss.item()
    before["weights bf16"] = model.to(torch.bfloat16)(input_ids=ids, labels=ids).loss.item()

    loaded = {}
    for name, (stage, tp, dp, *args) in {**FROM_ENGINE, **FROM_TORCH, **WEIGHTS}.items():
        source = name.partition(" to ")[0]
        is_file = (out / f"{source}.pt").exists()
        more = {"dtype": torch.bfloat16} if source == "weights" and "bf16" in name else {}
        if source.startswith("tp z0"):
            names = tuple(optimizer_names(build(kind(name))))
            more["read"] = ReadOptions(rules=rules(name, stage), optimizer_names=names)
        path = out / f"{source}.pt" if is_file else out / source
        to_deepspeed(path, out / f"{name} written", stage, tp, dp, **more)
        case = {"stage": stage, "tp": tp, "load": str(out / f"{name} written")}
        case |= settings(name.partition(" to ")[2])
        if is_file:
            # The source has no size of sub-groups, so it is the default.
            zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
            case["config"] = {**NO_SCHEDULE, "zero_optimization": zero}
        case["args"] = args[0] if args else {}
        loaded[name] = case
    ordered = dict(sorted(loaded.items(), key=lambda item: item[1]["tp"]))
    return before, launch(out, "load", ordered)


@pytest.mark.parametrize("name", [*FROM_ENGINE, *FROM_TORCH])
def test_training_goes_on_as_if_nothing_had_happened(seen, name):
    before, after = seen
    expected = torch.tensor(before[name.partition(" to ")[0]])
    # Sums over other ranks are rounded otherwise, in bf16 too.
    is_same = name.split()[0] == name.partition(" to ")[2].split()[0] and "z0" not in name
    for own in after:
        assert own[name]["steps"] == 2
        losses = torch.tensor(own[name]["losses"])
        assert torch.allclose(losses, expected, rtol=0, atol=0 if is_same else 2e-6), name
        assert own[name]["client"] == (None if name.startswith("torch") else "kept")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_loaded_without_an_optimizer(seen, name):
    before, after = seen
    for own in after:
        expected = before["weights bf16" if "bf16" in name else "weights"]
        assert abs(own[name]["losses"][0] - expected) < 1e-4


@pytest.mark.parametrize(
    "name", [name for name in (*FROM_ENGINE, *FROM_TORCH) if "sums" not in name]
)
def test_files_are_those_that_the_engine_saves_after_it(out, seen, name):
    written, saved = out / f"{name} written", out / name
    files = {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
    scripts = {Path("zero_to_fp32.py"), Path("zero_to_torch.py")}
    assert (
        files == {path.relative_to(saved) for path in saved.rglob("*") if path.is_file()} - scripts
    )
    assert (written / "latest").read_text() == (saved / "latest").read_text()
    for file in files:
        if file.suffix == ".pt":
            ours, theirs = (
                torch.load(root / file, weights_only=False) for root in (written, saved)
            )
            assert not list(differences(ours, theirs)), file


# Keys that only an engine writes, or only we.
NOT_COMPARED = {"ds_config", "loss_scaler", "clip_grad", "client", "global_samples", "param_names"}


def differences(ours, theirs, place=""):
    """Lists where two structures differ."""
    if isinstance(theirs, torch.Tensor) and theirs.dim():
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            yield f"{place}: {ours.dtype} {ours.shape}, {theirs.dtype} {theirs.shape}, or values"
    elif isinstance(theirs, Mapping):
        for key in ({**ours} | {**theirs}).keys() - NOT_COMPARED:
            if key not in ours or key not in theirs:
                yield f"{place}/{key}: {key in ours}, {key in theirs}"
            elif key == "universal_checkpoint_info":
                yield from info_differences(ours[key], theirs[key])
            elif key == "shared_params":
                # An engine writes it for the first rank only.
                assert theirs[key] in (ours[key], {})
            else:
                yield from differences(ours[key], theirs[key], f"{place}/{key}")
    elif isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{place}/{index}")
    elif ours != theirs:
        yield f"{place}: {ours}, {theirs}"


def info_differences(ours, theirs):
    """Lists differences, except that we list no frozen Parameters, and have maps of buffers."""
    replicated = "tp_replicated_parameter_patterns"
    assert {*theirs[replicated]} - {*ours[replicated]} <= {rf"^{NORM}$".replace(".", r"\.")}
    maps = {**ours["affine_map"]["params"]}
    maps.pop("^seen$", None)
    ours = {**ours, replicated: theirs[replicated], "affine_map": {"version": 1, "params": maps}}
    yield from differences(ours, theirs, "info")


@pytest.mark.parametrize(
    "name", [name for name in FROM_TORCH if " dp z" in name and "z0" not in name]
)
def test_zero_to_fp32_of_deepspeed_gets_the_weights(out, seen, name):
    model = torch.load(out / f"{name.partition(' to ')[0]}.pt")["model"]
    found = get_fp32_state_dict_from_zero_checkpoint(str(out / f"{name} written"))
    assert model.keys() - found.keys() == ({NORM} if "z1" in name else set())  # It was frozen.
    for key, value in found.items():
        assert torch.equal(value, model[key]), key


# It cannot convert an empty shard, which rank 1 has of a table of one row at ZeRO 1 and 2.
@pytest.mark.parametrize(
    "name",
    ["torch tied to tp z1 tied", "torch typed to dp z2 typed", "torch typed to tp z3 typed"],
)
def test_ds_to_universal_of_deepspeed_converts_what_is_written(out, seen, name, monkeypatch):
    new = out / f"{name} universal"
    args = ["", "--input_folder", str(out / f"{name} written" / "global_step2")]
    args += ["--output_folder", str(new), "--num_extract_workers=1", "--num_merge_workers=1"]
    args += ["--inject_missing_state"] if " dp " in name else []  # As for an engine's own.
    monkeypatch.setattr("sys.argv", args)
    ds_to_universal.main(ds_to_universal.parse_arguments())
    source = formats.read(out / f"{name.partition(' to ')[0]}.pt", ReadOptions())
    for key, array in source.tensors.items():
        if key.name in {NORM, *source.buffers}:  # The converter does not join untrained tensors.
            continue
        file = new / "zero" / key.name / f"{'fp32' if key.state == 'weight' else key.state}.pt"
        assert torch.equal(torch.load(file, weights_only=False)["param"], array.load()), key


@pytest.mark.parametrize("name", [*FROM_ENGINE, *FROM_TORCH])
def test_what_is_written_is_read_again(out, seen, name):
    source, written = out / name.partition(" to ")[0], out / f"{name} written"
    stage, tp, dp = {**FROM_ENGINE, **FROM_TORCH}[name]
    source = source if source.exists() else source.with_suffix(".pt")
    options = ReadOptions(rules=rules(name, stage))
    if source.name.startswith("tp z0"):
        options = replace(options, optimizer_names=tuple(optimizer_names(build(kind(name)))))
    work = plan(
        source, Request("deepspeed", tp_size=tp, zero_stage=stage, dp_size=dp, read=options)
    )
    again = formats.read(written, ReadOptions(rules=options.rules))
    for key, array in work.checkpoint.tensors.items():
        if key in again.tensors:
            assert torch.equal(again.tensors[key].load(), array.load()), key
        else:  # At ZeRO 3 there are only the weights in fp32.
            assert stage == 3
            master = again.tensors[Key(key.name, MASTER)].load()
            assert torch.equal(master.to(array.dtype), array.load()), key
    expected = work.checkpoint
    assert (again.step, again.buffers, again.ties) == (2, expected.buffers, expected.ties)
    assert again.optimizer.steps == expected.optimizer.steps
    for ours, theirs in zip(again.optimizer.groups, expected.optimizer.groups, strict=True):
        assert {**ours, "lr": None} == {**theirs, "lr": None}
    if tp > 1:
        for key, cut in again.cuts.items():
            assert cut == work.target.cuts[key]


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
