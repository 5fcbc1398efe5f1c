"""Checkpoints of real engines, converted and loaded at other ZeRO stages and tensor-parallel sizes,
with another vocabulary, and exported."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

import universal_job as job
from forks import run_script
from llama import DIM, VOCAB
from tp_embed.checkpoint import CheckpointError
from tp_embed.checkpoint.formats.universal.paths import model_file, parameters_of
from tp_embed.integrations.deepspeed.resize import resize_vocab
from tp_embed.integrations.deepspeed.universal import to_universal
from tp_embed.integrations.deepspeed.universal_format import read_step, read_tensor
from tp_embed.nn import init
from universal_cases import (
    GROWN,
    LOADED,
    LOADED_ALONE,
    LOADED_DP,
    LOADED_FOUR,
    LOADED_TP,
    OWN,
    TRAINED,
    TRAINED_DP,
)

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
HEAD = "lm_head.weight"


def launch(out, name, cases, *, tp_size=1, ranks=2):
    plan = out / f"{name}.json"
    plan.write_text(json.dumps(cases))
    run_script(job.__file__, tp_size, out, plan, ranks=ranks)
    return [torch.load(plan.with_suffix(f".{rank}.pt"), weights_only=True) for rank in range(ranks)]


def inner(path):
    """The universal checkpoint in ``path``."""
    return path / (path / "latest_universal").read_text()


def convert(out, names):
    for name in names:
        names_at_zero0 = job.optimizer_names(job.build(False, typed=True))
        to_universal(
            out / name / "end",
            out / f"{name} universal",
            optimizer_names=names_at_zero0 if name == "z0 typed" else None,
        )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("universal")


@pytest.fixture(scope="module")
def trained(out):
    """What the ranks have seen of the cases that were trained, by case."""
    by_rank = launch(out, "train", TRAINED, tp_size=2)
    convert(out, TRAINED)
    dp_by_rank = launch(out, "dp", {**TRAINED_DP, **LOADED_DP})
    convert(out, TRAINED_DP)
    return {
        **{name: [seen[name] for seen in by_rank] for name in TRAINED},
        **{name: [dp_by_rank[0][name]] for name in {**TRAINED_DP, **LOADED_DP}},
    }


@pytest.fixture(scope="module")
def grown(out, trained):
    torch.manual_seed(3)
    path = out / "grown universal"
    resize_vocab(
        out / "z2 universal",
        path,
        names=["*.embed_tokens.weight", "lm_head.*"],
        num_embeddings=GROWN,
        init_fn=partial(init.normal, std=0.02),
    )
    return path


@pytest.fixture(scope="module")
def broken(out, trained):
    """Checkpoints that do not go with the engine."""
    for name in ("no schedule", "other steps"):
        shutil.copytree(out / "z1 universal", out / name)
    file = model_file(inner(out / "no schedule"), 0, stage=1)
    torch.save({**torch.load(file), "lr_scheduler": None}, file)
    torch.save(torch.tensor(1.0), inner(out / "other steps") / "zero" / job.NORM / "step.pt")
    shutil.copytree(out / "z1 typed universal", out / "no frozen")
    shutil.rmtree(inner(out / "no frozen") / "zero" / job.NORM)


@pytest.fixture(scope="module")
def loaded(out, trained, grown, broken):
    by_rank = launch(out, "load", {**LOADED_TP, **OWN}, tp_size=2)
    alone = launch(out, "alone", LOADED_ALONE, ranks=1)
    by_four = launch(out, "four", LOADED_FOUR, tp_size=4, ranks=4)
    return {
        **{name: trained[name] for name in LOADED_DP},
        **{name: [seen[name] for seen in by_rank] for name in {**LOADED_TP, **OWN}},
        **{name: [alone[0][name]] for name in LOADED_ALONE},
        **{name: [seen[name] for seen in by_four] for name in LOADED_FOUR},
    }


def whole(seen, name, key, dim):
    """A Parameter or moment of the ranks of a gang, put together."""
    shards = [rank["state"][name][key] for rank in seen]
    if dim is None:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    return torch.cat(shards, dim)


def watched(case):
    """The Parameters that were watched, and how they are cut."""
    table = 0 if case["tied"] else 1
    others = (None, None) if case["mpu"] else (0, 1)
    return zip(job.WATCHED, (table, *others, None), strict=True)


def assert_state_is(seen, case, universal):
    for name, dim in watched(case):
        for key in seen[0]["state"][name]:
            expected = read_tensor(universal / "zero" / name, key)
            assert torch.equal(whole(seen, name, key, dim), expected), (name, key)


@pytest.mark.parametrize("name", [*TRAINED, *TRAINED_DP])
def test_universal_checkpoint_is_exact(out, trained, name):
    universal = inner(out / f"{name} universal")
    case = {**TRAINED, **TRAINED_DP}[name]
    assert_state_is(trained[name], case, universal)
    model = job.build(case["tied"], case["typed"])
    expected = dict(model.named_parameters())
    assert parameters_of(universal).keys() == expected.keys()
    for name, path in parameters_of(universal).items():
        assert read_tensor(path, "fp32").shape == expected[name].shape
        if expected[name].requires_grad:
            assert read_tensor(path, "exp_avg").shape == expected[name].shape
            assert float(read_step(path)) == 2


@pytest.mark.parametrize("name", OWN)
def test_engine_loads_its_own_checkpoint(trained, loaded, name):
    for seen, before in zip(loaded[name], trained[OWN[name]["own"]], strict=True):
        assert seen["losses"] == before["losses"]
        for parameter, states in before["state"].items():
            for key, tensor in states.items():
                assert torch.equal(seen["state"][parameter][key], tensor)


@pytest.mark.parametrize("name", LOADED)
def test_loading_is_exact(out, trained, loaded, name):
    seen, case = loaded[name], LOADED[name]
    assert_state_is(seen, case, inner(out / case["load"]))
    for rank in seen:
        assert rank["steps"] == 2
        assert rank["client"] == "kept"
        assert case["load"] in rank["path"]


@pytest.mark.parametrize("name", [name for name in LOADED if "grown" not in name])
def test_training_goes_on(trained, loaded, name):
    case = LOADED[name]
    expected = trained[case["load"].removesuffix(" universal")][0]["losses"]
    tolerance = 2e-3 if case["bf16"] else 1e-5
    for rank in loaded[name]:
        assert rank["losses"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", [name for name in LOADED if LOADED[name]["typed"]])
def test_buffers_and_param_groups_are_loaded(trained, loaded, name):
    for rank in loaded[name]:
        assert rank["buffer"] == 2 * 32
        assert rank["decay"] == [0.0, 0.1]


def test_missing_frozen_parameters_can_stay(out, loaded):
    seen = loaded["no frozen"][0]
    assert f"but lacks `{job.NORM}`" in seen["error"]
    assert "or pass `strict=False`" in seen["error"]
    before = job.build(False, typed=True, seed=1).get_parameter(job.NORM)
    assert torch.equal(seen["state"][job.NORM]["fp32"], before)
    table = read_tensor(inner(out / "no frozen") / "zero" / job.TABLE, "fp32")
    assert torch.equal(seen["state"][job.TABLE]["fp32"], table)


def test_16_bit_at_zero0_is_refused(loaded):
    errors = loaded["z0 bf16"][0]["errors"]
    load, full = errors["z1 bf16 universal"], errors["full precision"]
    assert load.startswith("ValueError: `engine` must have an optimizer in fp32 at ZeRO 0")
    assert full.startswith("ValueError: `dtype` must be None or torch.bfloat16 at ZeRO 0")


def test_round_robin_gradients_are_refused(loaded):
    errors = loaded["round robin"][0]["errors"]
    expected = "ValueError: `engine` must have `zero_optimization.round_robin_gradients` off"
    assert errors["z1 bf16 universal"].startswith(expected)
    expected = "ValueError: `dtype` must be None or torch.bfloat16 with `round_robin_gradients`"
    assert errors["full precision"].startswith(expected)


def test_grown_vocabulary(out, grown):
    torch.manual_seed(3)
    for name, path in parameters_of(inner(out / "z2 universal")).items():
        new = inner(grown) / "zero" / name
        for key in KEYS:
            old, tensor = read_tensor(path, key), read_tensor(new, key)
            if name not in (job.TABLE, HEAD):
                assert torch.equal(tensor, old)
                continue
            assert tensor.shape == (GROWN, DIM)
            assert torch.equal(tensor[:VOCAB], old)
            added = tensor[VOCAB:]
            assert added.std() == pytest.approx(0.02, rel=0.1) if key == "fp32" else not added.any()


def test_grown_vocabulary_is_trained(loaded):
    for stage in (1, 3):
        expected = loaded["grown to z0"][0]["losses"]
        assert loaded[f"grown to z{stage}"][0]["losses"] == pytest.approx(expected, rel=1e-5)


def test_shrunk_vocabulary(out, trained, tmp_path):
    source, names = out / "z1 universal", [job.TABLE, HEAD]
    with pytest.raises(ValueError, match=r"at least 101, .* is 90\. Pass `shrink=True`"):
        resize_vocab(source, tmp_path / "new", names=names, num_embeddings=90)
    assert not list(tmp_path.iterdir())
    resize_vocab(source, tmp_path / "new", names=names, num_embeddings=90, shrink=True)
    for name in names:
        for key in KEYS:
            new = read_tensor(inner(tmp_path / "new") / "zero" / name, key)
            assert torch.equal(new, read_tensor(inner(source) / "zero" / name, key)[:90])


def test_resize_errors(out, trained, tmp_path):
    source, new = out / "z1 universal", tmp_path / "new"
    resize = partial(resize_vocab, num_embeddings=200)
    with pytest.raises(ValueError, match=r"'\*\.bias' matches none of"):
        resize(source, new, names=["lm_head.*", "*.bias"])
    with pytest.raises(ValueError, match="Parameters with one number of rows, but match"):
        resize(source, new, names=["*"])
    with pytest.raises(ValueError, match="`num_embeddings` must be greater than or equal to 1"):
        resize_vocab(source, new, names=[HEAD], num_embeddings=0, shrink=True)
    with pytest.raises(FileNotFoundError, match="must have a file `latest_universal`"):
        resize(out / "z1" / "end", new, names=[HEAD])
    with pytest.raises(FileNotFoundError, match="must have a file `latest_universal`"):
        resize(out / "nothing", new, names=[HEAD])
    with pytest.raises(FileExistsError, match="holds something already"):
        resize(source, out, names=[HEAD])
    assert not list(tmp_path.iterdir())


def test_output_in_source_is_refused(out, trained):
    source = out / "z1 universal"
    with pytest.raises(ValueError, match="`output` must not be in `source`"):
        resize_vocab(source, source / "grown", names=[HEAD], num_embeddings=200)


def test_output_may_be_a_link_to_an_empty_directory(out, trained, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = [job.TABLE, HEAD]
    resize_vocab(out / "z1 universal", tmp_path / "link", names=names, num_embeddings=200)
    assert read_tensor(inner(tmp_path / "real") / "zero" / HEAD, "fp32").shape[0] == 200


def test_order_of_an_optimizer_of_the_user_has_to_be_said(out, trained, tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    shutil.copytree(out / "z0" / "end", source)
    for file in source.iterdir():
        state = torch.load(file, weights_only=False)
        del state["ds_config"]["optimizer"]
        torch.save(state, file)
    with pytest.raises(ValueError, match="must be built by DeepSpeed from its config"):
        to_universal(source, new)
    names = [name for name, _ in job.build(False).named_parameters()]
    to_universal(source, new, optimizer_names=names)
    for name in names:
        expected = read_tensor(inner(out / "z0 universal") / "zero" / name, "exp_avg")
        assert torch.equal(read_tensor(inner(new) / "zero" / name, "exp_avg"), expected)


def test_conversion_errors(out, trained, tmp_path):
    new = tmp_path / "new"
    for source, message in [
        (out / "nothing", "but there is nothing"),
        (out / "z1 universal", "neither `--tag` nor a file `latest` says which"),
        (out / "z0 typed" / "end", r"has 2 with 12, .* Pass `--optimizer-names`"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            to_universal(source, new)
    with pytest.raises(FileExistsError, match="holds something already"):
        to_universal(out / "z1" / "end", out)
    with pytest.raises(ValueError, match=r"must be 12 different names .* with \['x'\] unknown"):
        to_universal(out / "z0" / "end", new, optimizer_names=["x"])
    wrong = list(reversed(job.optimizer_names(job.build(False))))
    with pytest.raises(ValueError, match="The optimizer has another order than the model"):
        to_universal(out / "z0" / "end", new, optimizer_names=wrong)
    assert not list(tmp_path.iterdir())


def test_conversion_of_bad_files(out, trained, tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    shutil.copytree(out / "dp z3" / "end", source)
    (source / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    (source / "zero_pp_rank_0_mp_rank_01_model_states.pt").touch()
    (source / "zero_pp_rank_1_mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"lacks .* rank 0 and data-parallel rank 1"):
        to_universal(source, new)

    shutil.rmtree(source)
    shutil.copytree(out / "z0" / "end", source)
    for file in source.iterdir():
        state = torch.load(file, weights_only=False)
        for entry in state["optimizer"]["state"].values():
            entry["max_exp_avg_sq"] = entry["exp_avg_sq"]
        torch.save(state, file)
    with pytest.raises(ValueError, match=r"must be Adam's, .* 'max_exp_avg_sq'"):
        to_universal(source, new)
    for file in source.iterdir():
        state = torch.load(file, weights_only=False)
        del state["universal_checkpoint_info"]
        torch.save(state, file)
    with pytest.raises(
        ValueError,
        match="over its 2 tensor-parallel ranks, but the `universal_",
    ):
        to_universal(source, new)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_errors_change_nothing(trained, loaded):
    for rank, seen in enumerate(loaded["errors"]):
        assert seen["losses"] == trained["z1"][rank]["losses"]
        errors = seen["errors"]
        for tag, message in {
            "z1 tied universal": "ValueError: The checkpoint must have all Parameters of the "
            "model, but lacks `lm_head.weight`",
            "z1 typed universal": "ValueError: The optimizer must have 2 param groups",
            "grown universal": f"ValueError: `{job.TABLE}` must have the shape (101, 36), but its "
            "`fp32` in the checkpoint has (128, 36)",
            "no schedule": "ValueError: The checkpoint must have the state of a learning-rate",
            "other steps": "ValueError: All Parameters must have made 2 steps for ZeRO 1 to 3, but "
            f"`{job.NORM}` has made 1",
            "z1": "FileNotFoundError: `",
            "tag": "ValueError: `",
            "dtype": "ValueError: `dtype` must be one of",
            "export": "GangError: The export failed on rank 0" if rank else "FileExistsError: `",
        }.items():
            assert errors[tag].startswith(message), errors[tag]


@pytest.mark.parametrize("name", [*TRAINED, *TRAINED_DP])
def test_export_is_the_whole_model(out, trained, name):
    case = {**TRAINED, **TRAINED_DP}[name]
    universal = inner(out / f"{name} universal")
    kind = job.TypedLlama if case["typed"] else LlamaForCausalLM
    for directory, dtype in (
        (out / f"{name} model", torch.bfloat16 if case["bf16"] else torch.float32),
        (out / f"{name} model fp32", torch.float32),
    ):
        model, info = kind.from_pretrained(directory, dtype="auto", output_loading_info=True)
        assert not any(info.values()), info
        assert model.dtype == dtype
        for param_name, param in model.named_parameters():
            master = read_tensor(universal / "zero" / param_name, "fp32")
            assert torch.equal(param, master.to(dtype)), param_name
        if case["typed"]:
            assert model.seen == 2 * 32
    # In files of at most 30 kB, but for one that holds one larger tensor.
    files = sorted(path.name for path in (out / f"{name} model").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (out / f"{name} model fp32" / "model.safetensors").is_file()
    assert (out / f"{name} model fp32" / "generation_config.json").is_file()
