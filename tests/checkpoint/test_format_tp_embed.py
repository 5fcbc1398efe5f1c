"""The format ``tp-embed``: a directory with one file per tensor-parallel rank and a manifest."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from launch import ROOT
from tp_embed import shard_embeddings
from tp_embed.checkpoint import (
    CheckpointError,
    Key,
    ReadOptions,
    Rule,
    convert,
    differences,
    hook_state_dict,
    read,
)
from tp_embed.checkpoint.contents import Optimizer, Target
from tp_embed.checkpoint.files import plain_values
from tp_embed.checkpoint.files.derived import Cast
from tp_embed.checkpoint.formats import tp_embed as tp_embed_directory
from tp_embed_directories import (
    BLOCKS,
    RULES,
    E,
    Model,
    V,
    file_of,
    request,
    save,
    trained,
    write_two_ranks,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "model.pt", *trained())


@pytest.fixture(scope="module")
def written(source):
    return write_two_ranks(source, source.with_name("written"))


def assert_same_tensors(state, expected):
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(
            state[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("dims", [["vocab"], ["embed"], ["vocab", "embed"]])
def test_nothing_is_lost_over_many_sizes(source, tmp_path, dims):
    at, options = source, {"source": "pt", "rules": RULES}
    for step, size in enumerate((1, 2, 3, 4, 1)):
        to = tmp_path / f"{step}"
        dim = dims[step % len(dims)]
        convert(at, to, request(tp_size=size, dim=dim, **options), verify=True)
        # With more than one rank, a checkpoint says how all of it is cut.
        at, options = to, {"rules": RULES if size == 1 else ()}
    convert(at, tmp_path / "back.pt", request(to="pt"))

    first, last = (torch.load(file) for file in (source, tmp_path / "back.pt"))
    assert_same_tensors(last["model"], first["model"])
    assert last["model"]["head.weight"].data_ptr() == last["model"]["embed.weight"].data_ptr()
    assert (last["step"], set(last["buffer_names"])) == (3, {"positions", "scale"})
    groups = last["optimizer"]["param_groups"]
    assert repr([dict(sorted(group.items())) for group in groups]) == repr(
        [dict(sorted(group.items())) for group in first["optimizer"]["param_groups"]]
    )
    assert last["optimizer"]["state"].keys() == first["optimizer"]["state"].keys()
    for index, state in first["optimizer"]["state"].items():
        found = last["optimizer"]["state"][index]
        assert_same_tensors({key: found[key] for key in state}, state)
    trained()[1].load_state_dict(last["optimizer"])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_files_of_ranks_hold_what_torch_would_cut(source, tmp_path, size):
    convert(source, tmp_path / "out", request(source="pt", rules=RULES, tp_size=size))
    model = Model()
    saved = torch.load(source)["model"]
    expected = [{} for _ in range(size)]
    for name, tensor in saved.items():
        dim = {"out.weight": 1}.get(name, 0)
        blocks = BLOCKS.get(name, [tensor.shape[dim]] if name == "out.weight" else None)
        if name == "head.weight":
            continue
        for rank in range(size):
            expected[rank][name] = tensor
            if blocks:
                chunks = [
                    [*block.chunk(size, dim), *[block.narrow(dim, 0, 0)] * size][rank]
                    for block in tensor.split(blocks, dim)
                ]
                expected[rank][name] = torch.cat(chunks, dim)
    for rank in range(size):
        state = load_file(file_of(tmp_path / "out", rank, size))
        weights = {name: state[name] for name in expected[rank]}
        assert_same_tensors(weights, expected[rank])
        moments = {
            f".{moment}/{name}"
            for moment in ("exp_avg", "exp_avg_sq")
            for name, _ in model.named_parameters()
        }
        assert state.keys() == weights.keys() | moments
        assert state[".exp_avg/embed.weight"].shape == state["embed.weight"].shape


def test_manifest_says_what_is_in_the_files(written):
    manifest = json.loads((written / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["tp_size"]) == ("tp-embed", 1, 2)
    assert manifest["step"] == 3
    assert manifest["ties"] == {"head.weight": "embed.weight"}
    for name, file in manifest["files"].items():
        data = (written / name).read_bytes()
        assert file == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    tensors = manifest["tensors"]
    assert tensors["gqa.weight"] == {
        "shape": [16, E],
        "dtypes": {"weight": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"},
        "buffer": False,
        "partition": {
            "dim": 0,
            "ranges": [[[0, 4], [8, 10], [12, 14]], [[4, 8], [10, 12], [14, 16]]],
        },
    }
    assert tensors["scale"] == {
        "shape": [],
        "dtypes": {"weight": "float32"},
        "buffer": True,
        "partition": "replicated",
    }
    assert tensors["out.weight"]["dtypes"]["exp_avg"] == "bfloat16"
    assert sorted(path.name for path in written.iterdir()) == ["manifest.json", *manifest["files"]]


def test_every_tensor_is_aligned_and_ties_are_in_the_file(written):
    data = file_of(written, 0, 2).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"head.weight": "embed.weight"}
    sizes = {"F32": 4, "BF16": 2, "I64": 8}
    assert {entry["dtype"] for entry in header.values()} == sizes.keys()
    assert all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for e in header.values())


def test_the_reader_in_the_docs_reads_it(source, written, tmp_path):
    page = ROOT / "docs" / "manifest.md"
    code = page.read_text().rpartition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    expected = torch.load(source)["model"]
    convert(written, tmp_path / "five", request(tp_size=5, dim="embed"))
    for path in (written, tmp_path / "five"):
        state = names["whole_weights"](path)
        assert_same_tensors({name: state[name] for name in expected}, expected)
        assert state["head.weight"] is state["embed.weight"]


class Tables(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(V, E)
        self.few = nn.Embedding(3, E)
        self.mix = nn.Linear(E, E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embed_tokens.weight


def load_own_file(gang, path, strategy):
    model = Tables(seed=1)
    shard_embeddings(model, gang, strategy=strategy)
    file = file_of(Path(path), gang.rank, gang.size)
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        for other, name in opened.metadata().items():
            state[other] = state[name]
    with hook_state_dict(model, "sharded"):
        model.load_state_dict(state)
    assert model.head.weight is model.embed_tokens.weight
    with hook_state_dict(model, "full"):
        return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("strategy", ["vocab", "embed"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_loads_its_own_file(pool, tmp_path, size, strategy):
    torch.save(Tables().state_dict(), tmp_path / "tables.pt")
    rules = (Rule.parse(f"few.weight={strategy}"), Rule.parse("mix.*=replicated"))
    convert(
        tmp_path / "tables.pt",
        tmp_path / "out",
        request(source="pt", rules=rules, tp_size=size, dim=strategy),
    )
    expected = {name: tensor.tolist() for name, tensor in Tables().state_dict().items()}
    assert pool(size, load_own_file, str(tmp_path / "out"), strategy) == [expected] * size


def test_what_a_single_rank_does_not_say_is_asked_for_later(source, tmp_path):
    convert(source, tmp_path / "one", request(source="pt", tp_size=1))
    with pytest.raises(CheckpointError, match="it must be known how each Parameter is cut"):
        convert(tmp_path / "one", tmp_path / "two", request(tp_size=2))
    convert(tmp_path / "one", tmp_path / "two", request(tp_size=2, rules=RULES))
    convert(tmp_path / "two", tmp_path / "back", request(tp_size=1), verify=True)
    one, back = (read(tmp_path / name, ReadOptions(), "tp-embed") for name in ("one", "back"))
    assert not list(differences(one, back))


def write(path, checkpoint, **target):
    """Does what :func:`convert` does, for a checkpoint in memory."""
    cuts = dict.fromkeys(checkpoint.names)
    path.mkdir()
    output = tp_embed_directory.lay_out(
        checkpoint, Target(**{"tp_size": 1, "cuts": cuts} | target), path
    )
    for key, array in output.arrays.items():
        array.write((0,) * len(array.shape), checkpoint.tensors[key].load())
    output.finish()
    return read(path, ReadOptions(), "tp-embed")


def test_other_states_and_master_weights(tmp_path):
    amsgrad = partial(torch.optim.AdamW, amsgrad=True)
    source = save(tmp_path / "amsgrad.pt", *trained(amsgrad))
    checkpoint = read(source, ReadOptions(), "pt")
    half = {
        key: Cast(key.name, array, torch.bfloat16) if key.state == "weight" else array
        for key, array in checkpoint.tensors.items()
        if key.name not in checkpoint.buffers
    }
    weights = {Key(key.name): checkpoint.tensors[Key(key.name)] for key in half}
    master = {Key(key.name, "fp32"): array for key, array in weights.items()}
    mixed = replace(checkpoint, tensors=half | master, buffers=frozenset())
    assert not list(differences(mixed, write(tmp_path / "one", mixed)))

    convert(tmp_path / "one", tmp_path / "three", request(tp_size=3, rules=RULES), verify=True)
    state = load_file(file_of(tmp_path / "three", 0, 3))
    assert state[".max_exp_avg_sq/embed.weight"].shape == state["embed.weight"].shape == (4, E)
    assert state["embed.weight"].dtype == torch.bfloat16
    assert torch.equal(state[".fp32/embed.weight"], weights[Key("embed.weight")].load()[:4])

    # What is in fp32 only.
    only = replace(mixed, tensors=master, optimizer=None)
    assert write(tmp_path / "only", only).tensors.keys() == master.keys()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(
            st.text() | st.integers() | st.tuples(st.text()) | st.just("$tuple"), inner
        )
    ),
)


@given(PLAIN)
def test_plain_values_survive(value):
    text = json.dumps(plain_values.to_json("it", value), allow_nan=False)
    # As text, since NaN is not NaN and 1 is True.
    assert repr(plain_values.from_json("it", json.loads(text))) == repr(value)


def test_extra_survives(written, tmp_path):
    checkpoint = read(written, ReadOptions())
    extra = {"lr_scheduler": {"base_lrs": [0.1], "warmup": (0, math.inf)}, "seen": {1: None}}
    assert write(tmp_path / "out", replace(checkpoint, extra=extra)).extra == extra


def test_values_that_are_not_plain_are_refused(written, tmp_path):
    checkpoint = read(written, ReadOptions())
    endless = []
    endless.append(endless)
    bad = {
        "must consist of numbers.* but has a Tensor": replace(
            checkpoint, extra={"rng": torch.zeros(1)}
        ),
        "nested too deeply, or in themselves": replace(checkpoint, extra={"endless": endless}),
        "names .* must be names of Parameters, but is .'other'": replace(
            checkpoint, optimizer=Optimizer(({"params": ["other"]},), {})
        ),
        "must be names, each in one group": replace(
            checkpoint, optimizer=Optimizer(({"params": ["embed.weight"] * 2},), {})
        ),
        "must be a number, but is nan": replace(
            checkpoint, optimizer=Optimizer(({"params": []},), {"embed.weight": math.nan})
        ),
        "without a dot": replace(
            checkpoint,
            tensors={Key(".x"): checkpoint.tensors[Key("embed.weight")]},
            ties={},
            optimizer=None,
        ),
        "of a dtype that safetensors has": replace(
            checkpoint,
            tensors={Key("x"): Cast("x", checkpoint.tensors[Key("scale")], torch.complex128)},
            ties={},
            optimizer=None,
        ),
    }
    for index, (message, each) in enumerate(bad.items()):
        with pytest.raises(CheckpointError, match=message):
            write(tmp_path / f"{index}", each)


def test_a_killed_run_is_finished_by_the_next(written, tmp_path):
    checkpoint = read(written, ReadOptions())
    cuts = {name: cut and cut.over(3) for name, cut in checkpoint.cuts.items()}
    path = tmp_path / "out"
    path.mkdir()
    first = tp_embed_directory.lay_out(checkpoint, Target(3, cuts), path).arrays
    assert not (path / "manifest.json").exists()
    with pytest.raises(CheckpointError, match="was not finished"):
        read(path, ReadOptions())
    key = Key("embed.weight")
    first[key].write((0, 0), checkpoint.tensors[key].load())
    again, finish = tp_embed_directory.lay_out(checkpoint, Target(3, cuts), path)
    assert torch.equal(again[key].load(), checkpoint.tensors[key].load())
    for array in (again[key] for key in again):
        array.write((0,) * len(array.shape), torch.zeros(array.shape, dtype=array.dtype))
    finish()
    assert read(path, ReadOptions()).tensors[key].load().count_nonzero() == 0
    # Killed after the manifest, before the directory had its name.
    tp_embed_directory.lay_out(checkpoint, Target(3, cuts), path).finish()
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        *(file_of(path, rank, 3).name for rank in range(3)),
    ]
