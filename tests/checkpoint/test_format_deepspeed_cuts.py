"""How checkpoints of engines are cut, as they say it themselves, by patterns or by maps."""

from __future__ import annotations

import shutil
from argparse import Namespace
from functools import partial

import pytest
import torch
from deepspeed.checkpoint import affine, ds_to_universal

from deepspeed_checkpoints import change, copy_tag, model_files, read, train_engines
from once import once
from tp_embed.checkpoint.contents import MASTER, Key
from tp_embed.checkpoint.cuts import Cut, Rule
from tp_embed.checkpoint.errors import CheckpointError
from tp_embed.checkpoint.files.arrays import Span, View
from tp_embed.checkpoint.formats.deepspeed.affine import AffineMap
from universal_job import NORM, TABLE


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return once(tmp_path_factory, "deepspeed_engines", train_engines)


@pytest.fixture
def source(out, tmp_path):
    return partial(copy_tag, out, tmp_path)


def test_cuts_are_those_of_the_engine(out):
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


def test_given_cuts_come_first_and_rules_last(out, source):
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
def by_patterns(out):
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
