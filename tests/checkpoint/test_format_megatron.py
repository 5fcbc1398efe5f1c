"""Checkpoints in the layout of Megatron-LM, which the tests write and read with plain torch."""

from __future__ import annotations

import io
import random
import sys
import types
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_checkpoints import (
    FC1,
    FC2,
    HEAD,
    HIDDEN,
    LAST_NORM,
    LAYERS,
    NORM,
    PROJ,
    QKV,
    READ,
    RULES,
    TABLE,
    VOCAB,
    args_of,
    assert_holds,
    assert_is_layout,
    load,
    move,
    read,
    save,
    save_all,
    shard,
    whole_model,
)
from tp_embed.checkpoint import Request, convert
from tp_embed.checkpoint.contents import Key, ReadOptions
from tp_embed.checkpoint.cuts import Rule
from tp_embed.checkpoint.errors import CheckpointError
from tp_embed.checkpoint.formats import megatron


def test_shards_are_joined_and_padding_is_left_out(tmp_path: Path) -> None:
    model = whole_model()
    for size in (1, 2, 3, 4):
        path = save_all(tmp_path / str(size), model, size)
        found = read(path, ReadOptions(rules=RULES, vocab_size=VOCAB))
        assert_holds(found, model)
        assert (found.tp_size, found.step) == (size, 100)


def test_padding_stays_if_the_size_of_the_vocabulary_is_not_known(tmp_path: Path) -> None:
    found = read(save_all(tmp_path, whole_model(), 2))
    assert found.shape(TABLE) == (512, HIDDEN)
    assert any("--vocab-size" in note and TABLE in note for note in found.notes)


def test_a_round_trip_over_tensor_parallel_sizes_is_exact(tmp_path: Path) -> None:
    model = whole_model()
    path = save_all(tmp_path / "0", model, 1, args=args_of(1))
    sizes = (2, 3, 4, 1)
    for step, size in enumerate(sizes, 1):
        output = tmp_path / str(step)
        # Our checkpoint records the rest.
        options = {"vocab_size": VOCAB} if step == 1 else {"read": ReadOptions()}
        move(path, output, size, **options)
        assert_is_layout(output, model, size)
        path = output


def test_blocks_of_different_sizes_are_cut_one_by_one(tmp_path: Path) -> None:
    name = "attention.linear_qkv.weight"
    model = {name: torch.randn(16, 5)}
    save(tmp_path / "a", "00", model)
    rules = (Rule.parse("*qkv.weight=0:8,4,4"),)
    move(tmp_path / "a", tmp_path / "b", 2, read=ReadOptions(rules=rules))
    queries, keys, values = model[name].split([8, 4, 4])
    for rank in range(2):
        expected = torch.cat([each.chunk(2)[rank] for each in (queries, keys, values)])
        assert torch.equal(load(tmp_path / "b", rank)["model"][name], expected)
    move(tmp_path / "b", tmp_path / "c", 1, read=ReadOptions())
    assert torch.equal(load(tmp_path / "c", 0)["model"][name], model[name])


def test_shards_that_were_written_compute_what_the_whole_model_does(tmp_path: Path) -> None:
    model, size = whole_model(), 4
    path = save_all(tmp_path / "a", model, 2)
    move(path, tmp_path / "b", size, vocab_size=VOCAB)
    ranks = [load(tmp_path / "b", rank)["model"] for rank in range(size)]
    ids = torch.arange(VOCAB)

    hidden = functional.embedding(ids, model[TABLE])
    partial = []
    for rank, held in enumerate(ranks):
        block = len(held[TABLE])
        own = (ids >= rank * block) & (ids < (rank + 1) * block)
        rows = functional.embedding((ids - rank * block) * own, held[TABLE])
        partial.append(rows * own[:, None])
    assert torch.equal(sum(partial), hidden)

    gate, up = functional.linear(hidden, model[FC1.format(0)]).chunk(2, dim=-1)
    expected = functional.linear(functional.silu(gate) * up, model[FC2.format(0)])
    partial = []
    for held in ranks:
        gate, up = functional.linear(hidden, held[FC1.format(0)]).chunk(2, dim=-1)
        partial.append(functional.linear(functional.silu(gate) * up, held[FC2.format(0)]))
    torch.testing.assert_close(sum(partial), expected, atol=1e-3, rtol=1e-4)

    logits = torch.cat([functional.linear(hidden, held[HEAD]) for held in ranks], dim=-1)
    torch.testing.assert_close(logits[:, :VOCAB], functional.linear(hidden, model[HEAD]))
    assert not logits[:, VOCAB:].any()


def test_what_megatron_compares_on_loading_is_carried_over(tmp_path: Path) -> None:
    path = save_all(tmp_path / "a", whole_model(), 2, args=args_of(2))
    move(path, tmp_path / "b", 4, vocab_size=VOCAB)
    root = load(tmp_path / "b", 3)
    args = root["args"]
    assert type(args) is Namespace
    assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (LAYERS, HIDDEN, 4)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (4, 1)
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by) == (512, 128)
    assert args.params_dtype is torch.float32
    assert (root["checkpoint_version"], root["iteration"]) == (3.0, 100)
    assert (tmp_path / "b" / "latest_checkpointed_iteration.txt").read_text() == "100"


def test_without_a_step_it_is_a_release(tmp_path: Path) -> None:
    model = {TABLE: torch.randn(VOCAB, HIDDEN), LAST_NORM: torch.randn(HIDDEN)}
    torch.save(model, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "a", Request("megatron", 2, source_format="pt",
            read=READ), verify=True)  # fmt: skip
    assert (tmp_path / "a" / "latest_checkpointed_iteration.txt").read_text() == "release"
    root = load(tmp_path / "a", 1, "release")
    assert "args" not in root  # Megatron wants all of them, or none.
    assert read(tmp_path / "a").step is None
    move(tmp_path / "a", tmp_path / "b.pt", 1, to="pt")
    assert torch.equal(torch.load(tmp_path / "b.pt")["model"][TABLE], model[TABLE])


def test_other_classes_of_real_files_are_read_without_importing_them(tmp_path: Path) -> None:
    module = types.ModuleType("megatron.core.enums")

    class ModelType:
        def __init__(self, value: int) -> None:
            self.value = value

        def __reduce__(self) -> tuple[Any, ...]:
            return ModelType, (self.value,)

    ModelType.__module__, ModelType.__qualname__ = module.__name__, "ModelType"
    module.ModelType = ModelType  # type: ignore[attr-defined]
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    model = {
        LAST_NORM: torch.randn(HIDDEN),
        "decoder.a._extra_state": None,
        "decoder.b._extra_state": io.BytesIO(b"statistics"),
        "decoder.c._extra_state": torch.zeros(3, dtype=torch.uint8),
        "count": 3,
    }
    names = ["megatron", "megatron.core", "megatron.core.enums"]
    sys.modules |= dict.fromkeys(names, module)
    try:
        args = args_of(1, model_type=ModelType(1))
        file = save(tmp_path, "00", model, args=args, rng_state=[rng], optimizer={"state": {}})
    finally:
        for name in names:
            del sys.modules[name]
    assert b"megatron.core.enums" in file.read_bytes()
    assert b"numpy" in file.read_bytes()
    found = read(tmp_path)
    assert found.names == [LAST_NORM]
    assert not set(names) & set(sys.modules)
    assert found.extra[megatron.ARGS]["num_layers"] == LAYERS
    assert "model_type" not in found.extra[megatron.ARGS]
    for what in ("_extra_state", "`count`", "optimizer"):
        assert any(what in note for note in found.notes), what


def test_nested_names_are_made_flat(tmp_path: Path) -> None:
    table, norm = torch.randn(128, HIDDEN), torch.randn(HIDDEN)
    embedding = {"embedding": {"word_embeddings": {"weight": table}}}
    encoder = {"encoder": {"final_layernorm.weight": norm}}
    save(tmp_path, "00", {"language_model": {**embedding, **encoder}})
    assert_holds(
        read(tmp_path),
        {
            "language_model.embedding.word_embeddings.weight": table,
            "language_model.encoder.final_layernorm.weight": norm,
        },
    )


def split_layers(model: Mapping[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """Returns the layers of a stage, numbered from 0, and the tensors its position adds."""
    names = [NORM, QKV, PROJ, FC1, FC2]
    stage = {each.format(i): model[each.format(n)] for i, n in enumerate(layers) for each in names}
    if 0 in layers:
        stage = {TABLE: model[TABLE], **stage}
    if LAYERS - 1 in layers:
        stage |= {name: model[name] for name in (LAST_NORM, HEAD)}
    return stage


def save_stage(path: Path, stage: int, size: int, content: Mapping[str, Any], **root: Any) -> None:
    for rank in range(size):
        models = {
            key: {name: shard(name, tensor, rank, size) for name, tensor in model.items()}
            for key, model in content.items()
        }
        save(path, f"{rank:02d}_{stage:03d}", models.pop("model", None), **models, **root)


def test_pipeline_stages_are_put_together(tmp_path: Path) -> None:
    model = whole_model()
    for stage, layers in enumerate(([0], [1, 2, 3])):
        save_stage(tmp_path, stage, 2, {"model": split_layers(model, layers)})
    assert_holds(read(tmp_path, ReadOptions(rules=RULES, vocab_size=VOCAB)), model)


def test_virtual_pipeline_stages_go_round(tmp_path: Path) -> None:
    model = whole_model()
    for stage in range(2):
        chunks = {f"model{i}": split_layers(model, [stage + 2 * i]) for i in range(2)}
        save_stage(tmp_path, stage, 1, chunks)
    assert_holds(read(tmp_path, ReadOptions(vocab_size=VOCAB)), model)


def test_the_copy_of_a_tied_table_on_the_last_stage_is_compared(tmp_path: Path) -> None:
    model = whole_model()
    model[HEAD] = model[TABLE]
    args = args_of(1, untie_embeddings_and_output_weights=False)
    args.pipeline_model_parallel_size = 2
    for stage, layers in enumerate(([0, 1], [2, 3])):
        save_stage(tmp_path, stage, 1, {"model": split_layers(model, layers)}, args=args)
    found = read(tmp_path, ReadOptions(vocab_size=VOCAB))
    assert HEAD not in found.names
    assert torch.equal(found.tensors[Key(TABLE)].load(), model[TABLE])

    model[HEAD] = model[TABLE] + 1
    save_stage(tmp_path, 1, 1, {"model": split_layers(model, [2, 3])}, args=args)
    with pytest.raises(CheckpointError, match="last pipeline stage"):
        read(tmp_path).tensors[Key(TABLE)].load()


def test_layers_of_a_stage_must_be_numbered_from_zero(tmp_path: Path) -> None:
    for stage in range(2):
        save(tmp_path, f"00_{stage:03d}", {NORM.format(2 * stage): torch.randn(3)})
    with pytest.raises(CheckpointError, match="numbered from 0"):
        read(tmp_path)


def test_a_tag_says_which_iteration_to_take(tmp_path: Path) -> None:
    for iteration in (7, 100):
        model = {LAST_NORM: torch.full((3,), float(iteration))}
        save(tmp_path / f"iter_{iteration:07d}", "00", model, iteration=iteration)
    with pytest.raises(CheckpointError, match="--tag"):
        read(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert read(tmp_path).step == 100
    assert read(tmp_path, ReadOptions(tag="7")).step == 7
    assert read(tmp_path, ReadOptions(tag="iter_0000007")).step == 7
    assert read(tmp_path / "iter_0000007").step == 7
    for tag in ("8", "../x", "release"):
        with pytest.raises(CheckpointError, match=r"must hold|must be `release`"):
            read(tmp_path, ReadOptions(tag=tag))


def test_it_is_recognised_by_its_files(tmp_path: Path) -> None:
    assert not megatron.recognises(tmp_path)
    save_all(tmp_path, {LAST_NORM: torch.randn(3)}, 1)
    assert megatron.recognises(tmp_path)
    assert megatron.recognises(tmp_path / "iter_0000100")


def test_what_is_cut_is_not_guessed(tmp_path: Path) -> None:
    path = save_all(tmp_path, whole_model(), 2)
    with pytest.raises(CheckpointError, match=rf"of {5 * LAYERS + 1}, as .*layernorm.*--rules"):
        read(path, ReadOptions())


def test_tables_are_cut_over_the_vocabulary_only(tmp_path: Path) -> None:
    path = save_all(tmp_path / "a", whole_model(), 1)
    for options in (
        {"dim": "embed"},
        {"read": ReadOptions(rules=(Rule.parse(f"{TABLE}=replicated"), *RULES))},
    ):
        with pytest.raises(CheckpointError, match="--dim vocab"):
            move(path, tmp_path / "b", 2, **options)
    assert not (tmp_path / "b").exists()


def test_shards_must_be_of_one_size(tmp_path: Path) -> None:
    path = save_all(tmp_path / "a", whole_model(), 1)
    with pytest.raises(CheckpointError, match="one size for Megatron-LM"):
        move(path, tmp_path / "b", 5)
    assert not (tmp_path / "b").exists()
