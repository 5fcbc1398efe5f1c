"""Checkpoints in the layout of fairseq2, which the tests write and read with plain torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tp_embed.checkpoint import Plan, Request, convert, formats
from tp_embed.checkpoint.contents import Checkpoint, Key, ReadOptions
from tp_embed.checkpoint.cuts import Rule
from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError
from tp_embed.checkpoint.formats import fairseq2

VOCAB, HIDDEN = 36, 24
TABLE = "decoder_frontend.embed.weight"
QUERY = "decoder.layers.0.self_attn.q_proj.weight"
OUTPUT = "decoder.layers.0.self_attn.output_proj.weight"
NORM = "decoder.layer_norm.weight"
HEAD = "final_proj.weight"
DIMS = {TABLE: 0, QUERY: 0, OUTPUT: 1, HEAD: 0}
RULES = tuple(map(Rule.parse, ["*embed.weight=vocab", "*q_proj.weight=0", "*output_proj.weight=1",
                               "*norm.weight=replicated", HEAD + "=vocab"]))  # fmt: skip
READ = ReadOptions(rules=RULES)


def whole_model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        TABLE: torch.randn(VOCAB, HIDDEN),
        QUERY: torch.randn(HIDDEN, HIDDEN),
        OUTPUT: torch.randn(HIDDEN, HIDDEN),
        NORM: torch.randn(7),
        HEAD: torch.randn(VOCAB, HIDDEN),
    }


def shard(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    return tensor.chunk(size, DIMS[name])[rank].clone() if name in DIMS else tensor.clone()


def save(path: Path, model: Mapping[Any, Any], tp: int = 0, sdp: int = 0, pp: int = 0) -> Path:
    file = path / f"pp_{pp:02d}" / f"tp_{tp:02d}" / f"sdp_{sdp:02d}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model, file, pickle_protocol=2)
    return file


def save_all(path: Path, model: Mapping[str, Tensor], size: int) -> Path:
    for rank in range(size):
        shards = {name: shard(name, tensor, rank, size) for name, tensor in model.items()}
        save(path, shards, rank)
    return path


def load(path: Path, tp: int) -> dict[str, Tensor]:
    """Loads as fairseq2 does, which allows only tensors."""
    file = path / "pp_00" / f"tp_{tp:02d}" / "sdp_00.pt"
    held: dict[str, Tensor] = torch.load(file, weights_only=True)
    assert all(type(value) is Tensor for value in held.values())
    return held


def read(path: Path, options: ReadOptions = READ) -> Checkpoint:
    return formats.read(path, options, "fairseq2")


def move(source: Path, output: Path, size: int, **options: Any) -> Plan:
    options = {"source_format": "fairseq2", "read": READ, **options}
    return convert(source, output, Request("fairseq2", size, **options), verify=True)


def assert_holds(checkpoint: Checkpoint, model: Mapping[str, Tensor]) -> None:
    assert checkpoint.names == list(model)
    for name, tensor in model.items():
        assert torch.equal(checkpoint.tensors[Key(name)].load(), tensor), name


def test_a_round_trip_over_tensor_parallel_sizes_is_exact(tmp_path: Path) -> None:
    model = whole_model()
    path = save_all(tmp_path / "0", model, 1)
    for step, size in enumerate((2, 3, 4, 1), 1):
        output = tmp_path / str(step)
        move(path, output, size)
        assert sorted(each.name for each in (output / "pp_00").iterdir()) == [
            f"tp_{rank:02d}" for rank in range(size)
        ]
        for rank in range(size):
            held = load(output, rank)
            assert list(held) == list(model)
            for name, tensor in model.items():
                assert torch.equal(held[name], shard(name, tensor, rank, size)), (name, rank)
        path = output


def test_shards_that_were_written_compute_what_the_whole_model_does(tmp_path: Path) -> None:
    model, size = whole_model(), 3
    move(save_all(tmp_path / "a", model, 1), tmp_path / "b", size)
    ranks = [load(tmp_path / "b", rank) for rank in range(size)]
    ids = torch.arange(VOCAB)
    hidden = torch.zeros(VOCAB, HIDDEN)
    for rank, held in enumerate(ranks):
        block = len(held[TABLE])
        own = (ids >= rank * block) & (ids < (rank + 1) * block)
        hidden[own] += functional.embedding(ids[own] - rank * block, held[TABLE])
    assert torch.equal(hidden, functional.embedding(ids, model[TABLE]))
    linear = functional.linear
    expected = linear(linear(hidden, model[QUERY]), model[OUTPUT])
    parts = torch.stack([linear(linear(hidden, held[QUERY]), held[OUTPUT]) for held in ranks])
    torch.testing.assert_close(parts.sum(0), expected, atol=1e-4, rtol=1e-4)


def test_a_table_that_is_cut_over_columns_is_kept_so(tmp_path: Path) -> None:
    table = torch.randn(VOCAB, HIDDEN)
    for rank in range(2):
        save(tmp_path / "a", {TABLE: table.chunk(2, 1)[rank].clone()}, rank)
    rules = (Rule.parse("*embed.weight=embed"),)
    move(tmp_path / "a", tmp_path / "b", 4, read=ReadOptions(rules=rules))
    for rank in range(4):
        assert torch.equal(load(tmp_path / "b", rank)[TABLE], table.chunk(4, 1)[rank])


def test_shards_of_fsdp_are_put_together(tmp_path: Path) -> None:
    """Shards at the end may be empty or missing."""
    model, size = whole_model(), 5  # The norm has 7 rows: 2, 2, 2, 1 and 0.
    for tp in range(2):
        for sdp in range(size):
            held = {}
            for name, tensor in model.items():
                parts = shard(name, tensor, tp, 2).chunk(size)
                if sdp < len(parts):
                    held[name] = parts[sdp].clone()
                elif tp:
                    held[name] = torch.empty(0, *tensor.shape[1:])
            save(tmp_path, held, tp, sdp)
    assert_holds(read(tmp_path), model)


def test_pipeline_stages_are_put_together(tmp_path: Path) -> None:
    model = whole_model()
    for pp, names in enumerate(((TABLE, QUERY), (OUTPUT, NORM, HEAD))):
        for tp in range(2):
            save(tmp_path, {name: shard(name, model[name], tp, 2) for name in names}, tp, pp=pp)
    assert_holds(read(tmp_path), model)
    save(tmp_path, {NORM: model[NORM]}, 0, pp=2)
    save(tmp_path, {NORM: model[NORM]}, 1, pp=2)
    with pytest.raises(CheckpointError, match="one pipeline stage"):
        read(tmp_path)


def test_a_step_is_found_and_kept(tmp_path: Path) -> None:
    for step in (9, 10):
        save(tmp_path / "a" / f"step_{step}" / "model", {NORM: torch.full((3,), float(step))})
        (tmp_path / "a" / f"step_{step}" / "optimizer").mkdir()
    found = read(tmp_path / "a")
    assert found.step == 10
    assert "optimizer" in found.notes[0]
    for path, tag in (("a", "9"), ("a", "step_9"), ("a/step_9", None), ("a/step_9/model", None)):
        assert fairseq2.recognises(tmp_path / path)
        assert read(tmp_path / path, ReadOptions(tag=tag)).step == 9
    for tag in ("8", "../step_9"):
        with pytest.raises(CheckpointError, match="--tag step_N"):
            read(tmp_path / "a", ReadOptions(tag=tag))
    move(tmp_path / "a", tmp_path / "b", 1)
    assert torch.equal(load(tmp_path / "b" / "step_10" / "model", 0)[NORM], torch.full((3,), 10.0))
    assert not fairseq2.recognises(tmp_path)


def test_tied_parameters_stay_one(tmp_path: Path) -> None:
    table = torch.randn(VOCAB, HIDDEN)
    for rank in range(2):
        own = table.chunk(2)[rank].clone()
        save(tmp_path / "a", {TABLE: own, HEAD: own}, rank)
    move(tmp_path / "a", tmp_path / "b", 4)
    held = load(tmp_path / "b", 3)
    assert held[TABLE].data_ptr() == held[HEAD].data_ptr()
    assert torch.equal(held[HEAD], table.chunk(4)[3])


def test_what_is_cut_is_not_guessed(tmp_path: Path) -> None:
    path = save_all(tmp_path, whole_model(), 2)
    with pytest.raises(CheckpointError, match=rf"of 5, as `{TABLE}`.*--rules"):
        read(path, ReadOptions())


def test_shards_must_be_of_one_size(tmp_path: Path) -> None:
    path = save_all(tmp_path / "a", whole_model(), 1)
    with pytest.raises(CheckpointError, match="one size for fairseq2"):
        move(path, tmp_path / "b", 5)
    assert not (tmp_path / "b").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EVIL_DIRECTORY"],)


def change(path: Path, **changes: Any) -> None:
    held = {**load(path, 1), **changes}
    save(path, {name: value for name, value in held.items() if value is not None}, 1)


SECOND = Path("pp_00/tp_01/sdp_00.pt")
DAMAGES: dict[str, tuple[Any, str]] = {
    "a missing first rank": (lambda path: (path / "pp_00/tp_00/sdp_00.pt").unlink(), "1 of them"),
    "a missing shard": (lambda path: save(path, {}, 1, 1), "3 of them"),
    "a truncated file": (lambda path: os.truncate(path / SECOND, 900), "tp_01.*damaged"),
    "a list": (lambda path: torch.save([1], path / SECOND), "dict of tensors"),
    "what is no tensor": (lambda path: change(path, extra=3), "dict of tensors"),
    "a nested model": (lambda path: save(path, {"model": {}}, 1), "dict of tensors"),
    "names that are numbers": (lambda path: save(path, {1: torch.zeros(1)}, 1), "dict of tensors"),
    "other names": (lambda path: change(path, other=torch.zeros(1)), "as `other`"),
    "fewer names": (lambda path: change(path, **{NORM: None}), NORM),
    "other values": (lambda path: change(path, **{NORM: torch.zeros(7)}), "same on every rank"),
    "another shape": (lambda path: change(path, **{QUERY: torch.zeros(2, 3)}), "q_proj.*shape"),
    "another dtype": (lambda path: change(path, **{NORM: torch.zeros(7).half()}), "one dtype"),
    "a shorter shard": (
        lambda path: change(path, **{TABLE: torch.zeros(9, HIDDEN)}),
        "embed.*must have the shape",
    ),
    "code": (lambda path: change(path, extra=Evil()), "mkdir"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_written(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL_DIRECTORY", str(tmp_path / "evil"))
    path = save_all(tmp_path / "a", whole_model(), 2)
    act, message = DAMAGES[damage]
    act(path)
    error = UnsafeCheckpointError if damage == "code" else CheckpointError
    with pytest.raises(error, match=message):
        move(path, tmp_path / "out" / "b", 4)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_name_that_is_missing_between_data_parallel_shards_is_refused(tmp_path: Path) -> None:
    for sdp, held in enumerate(({NORM: torch.zeros(2)}, {}, {NORM: torch.zeros(2)})):
        save(tmp_path, held, sdp=sdp)
    with pytest.raises(CheckpointError, match="missing before a shard that has it"):
        read(tmp_path)
    save(tmp_path, {NORM: torch.zeros(2, 2)}, sdp=1)
    with pytest.raises(CheckpointError, match="along dimension 0"):
        read(tmp_path)
    save(tmp_path, {NORM: torch.zeros(2), HEAD: torch.zeros(2)}, sdp=1)
    with pytest.raises(CheckpointError, match="no other names"):
        read(tmp_path)
