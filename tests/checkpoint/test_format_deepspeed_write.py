"""Real engines load our DeepSpeed checkpoints and continue training. Our files are compared with
the engines' own, key by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.nn.utils import clip_grad_norm_

import convert_load_job as job
from convert_job import build
from forks import run_script
from tp_embed.checkpoint import Request, convert, formats, plan
from tp_embed.checkpoint.contents import MASTER, Key, ReadOptions
from tp_embed.checkpoint.cuts import Rule
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
    run_script(job.__file__, out, file, ranks=ranks)
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
