"""Checkpoints of engines whose tables have an optimizer of their own: from two ranks to three, by
the engine and by universal checkpoints, and converted to other formats."""

from __future__ import annotations

import pytest
import torch

import row_checkpoints_job as job
from forks import run_script
from row_tables_job import STEPS
from tp_embed.checkpoint import ReadOptions, Request, Rule, convert, differences, read
from tp_embed.integrations.deepspeed import to_universal


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("row_checkpoints")
    run_script(job.__file__, out, "save", ranks=2)
    for name in {saved for saved, way, _ in job.LOADED.values() if way in ("universal", "config")}:
        to_universal(out / name, out / f"{name} universal")
    request = Request(to="deepspeed", zero_stage=2, dp_size=3)
    convert(out / "cyclic", out / "cyclic converted", request)
    return out


@pytest.fixture(scope="module")
def saved(out):
    return [torch.load(out / f"save{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def loaded(out):
    run_script(job.__file__, out, "load", ranks=3)
    return [torch.load(out / f"load{rank}.pt", weights_only=True) for rank in range(3)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("name", job.LOADED)
def test_three_ranks_load_what_two_have_saved(saved, loaded, name):
    source, _, case = job.LOADED[name]
    expected = saved[0][source]
    for rank in loaded:
        assert_same(rank[name]["state"], expected["state"])
        assert rank[name]["mine"] == 3
        if case[1] == "tp":  # The same batches.
            rel = 1e-5 if case[-1] == "fp32" else 2e-2
            assert rank[name]["losses"] == pytest.approx(expected["on"], rel=rel)


def test_each_rank_saves_a_part_and_deepspeed_none(out, saved):
    for name in job.SAVED:
        tag = out / name / (out / name / "latest").read_text()
        sizes = [file.stat().st_size for file in (tag / "tp_embed_own_tables").glob("__[01]_*")]
        assert len(sizes) == 2
        for file in tag.glob("*model_states.pt"):
            state = torch.load(file, weights_only=False)
            assert "ngram.weight" not in state["module"]
            assert state["global_steps"] == STEPS


def test_a_failure_leaves_the_latest_checkpoint(out, saved):
    assert "FileExistsError" in saved[0]["failed"]
    assert "Saving tables failed on rank 0" in saved[1]["failed"]
    assert (out / "embed" / "latest").read_text() != "next"


def test_loads_weights_alone_and_refuses_other_engines(saved):
    for rank in saved:
        for name in ("copies", "ZeRO 3"):
            state = rank[f"weights of {name}"]
            assert torch.equal(state["weight"], rank[name]["state"]["weight"])
            assert state.keys() == {"weight", "group"}
        assert "must be a `LazyAdam`, but in" in rank["other"]
        assert rank["unchanged"]
        assert "must have no tables with an optimizer of their own, since" in rank["without"]


def arrays(path, name="ngram.weight"):
    found = read(path, ReadOptions())
    return {key.state: array.load() for key, array in found.tensors.items() if key.name == name}


# For sources that do not say it.
RULES = ReadOptions(rules=(Rule.parse("ngram.weight=vocab"), Rule.parse("*=replicated")))


@pytest.mark.parametrize("name", job.SAVED)
@pytest.mark.parametrize("to", ["universal", "dcp", "deepspeed", "tp-embed", "pt"])
def test_conversions_keep_the_states(out, saved, tmp_path, name, to):
    one = tmp_path / ("one.pt" if to == "pt" else "one")
    size = {} if to in ("pt", "dcp") else {"tp_size": 3}
    parallel = {"zero_stage": 2, "dp_size": 2} if to == "deepspeed" else {}
    work = convert(out / name, one, Request(to=to, read=RULES, **size, **parallel), verify=True)
    assert not [note for note in work.source.notes if "ngram" in note]
    expected = saved[0][name]["state"]
    found = arrays(one)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found.pop(key), value), key
    assert found.pop("decay").item() == expected["decay"]
    assert not found
    stage, *_, half = job.SAVED[name]
    dtype = torch.bfloat16 if to == "universal" and half == "bf16" else None  # It has fp32 only.
    back = Request(to="deepspeed", tp_size=2, zero_stage=stage, dtype=dtype, read=RULES)
    convert(one, tmp_path / "two", back, verify=True)
    both = [read(path, ReadOptions()) for path in (out / name, tmp_path / "two")]
    assert [str(each) for each in differences(*both)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype(out, saved, tmp_path, dtype):
    work = convert(out / "cyclic", tmp_path / "one", Request(to="dcp", dtype=dtype), verify=True)
    state = saved[0]["cyclic"]["state"]
    found = arrays(tmp_path / "one")
    assert torch.equal(found["weight"], fp32_values(state).to(dtype))
    assert torch.equal(found["exp_avg"], state["exp_avg"])
    assert not {"master", "remainder"} & found.keys()
    dropped = [what for what in work.dropped if "ngram" in what]
    expected = ["the fp32 values of `ngram.weight`, which has another dtype now"]
    assert dropped == ([] if dtype == torch.float32 else expected)


def test_cut_along_the_columns(out, saved, tmp_path):
    request = Request(to="tp-embed", tp_size=3, dim="embed", read=RULES)
    convert(out / "vocab", tmp_path / "one", request, verify=True)
    expected = saved[0]["vocab"]["state"]
    found = arrays(tmp_path / "one")
    for key in ("weight", "sum", "row_decay"):
        assert torch.equal(found[key], expected[key])


def fp32_values(state):
    if "remainder" not in state:
        return state["weight"]
    high = state["weight"].view(torch.int16).int() * (1 << 16)
    return (high + state["remainder"]).view(torch.float32)


@pytest.mark.parametrize("name", job.SAVED)
def test_exports_whole_tables(out, saved, name):
    state = saved[0][name]["state"]
    assert torch.equal(arrays(out / f"{name} exported")["weight"], state["weight"])
    assert torch.equal(arrays(out / f"{name} in fp32")["weight"], fp32_values(state))


@pytest.mark.parametrize("name", job.SAVED)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_to_hugging_face(out, saved, tmp_path, name, dtype):
    work = convert(out / name, tmp_path / "hf", Request(to="hf", dtype=dtype))
    state = saved[0][name]["state"]
    expected = state["weight"] if dtype is None else fp32_values(state)
    assert torch.equal(arrays(tmp_path / "hf")["weight"], expected)
    (dropped,) = [what for what in work.dropped if "optimizer" in what]
    assert "row_decay" in dropped
