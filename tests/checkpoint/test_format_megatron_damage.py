"""Checkpoints in the layout of Megatron-LM that are damaged or hostile."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_checkpoints import (
    FC2,
    HIDDEN,
    LAST_NORM,
    TABLE,
    VOCAB,
    args_of,
    load,
    move,
    save,
    save_all,
    whole_model,
)
from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError
from tp_embed.checkpoint.formats.megatron.files import TRACKER


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EVIL_DIRECTORY"],)


def damage_malicious(path: Path, rank: int) -> None:
    root = load(path, rank)
    save(path / "iter_0000100", f"{rank:02d}", root["model"], args=Namespace(hook=Evil()))


def damage_root(path: Path, **changes: Any) -> None:
    root = {**load(path, 1), **changes}
    save(path / "iter_0000100", "01", root.pop("model"), **root)


def damage_model(path: Path, **changes: Any) -> None:
    model = {**load(path, 1)["model"], **changes}
    damage_root(path, model={name: value for name, value in model.items() if value is not None})


def damage_recursion(path: Path) -> None:
    model: dict[str, Any] = {}
    model["again"] = model
    damage_root(path, model=model)


def damage_version(path: Path) -> None:
    for rank in range(2):
        model = {"layers.0.query_key_value.weight": torch.randn(4, 4)}
        save(path / "iter_0000100", f"{rank:02d}", model, checkpoint_version=1.0)


def second(path: Path) -> Path:
    return path / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"


DAMAGES: dict[str, tuple[Any, str]] = {
    "a missing first rank": (
        lambda path: (path / "iter_0000100/mp_rank_00").rename(path / "gone"),
        r"each of 2 tensor-parallel ranks",
    ),
    "a missing last rank": (
        lambda path: (path / "iter_0000100/mp_rank_01").rename(path / "gone"),
        r"tensor_model_parallel_size.* must be 1",
    ),
    "a missing file": (lambda path: second(path).unlink(), "must be there"),
    "a missing iteration": (
        lambda path: (path / "iter_0000100").rename(path / "other"),
        "must hold `iter_0000100`",
    ),
    "a tracker of garbage": (
        lambda path: (path / TRACKER).write_bytes(b"\xff../../etc"),
        "must be `release` or a number",
    ),
    "a truncated file": (
        lambda path: os.truncate(second(path), second(path).stat().st_size // 2),
        r"mp_rank_01.*damaged",
    ),
    "an empty file": (lambda path: second(path).write_bytes(b""), r"mp_rank_01"),
    "another iteration": (lambda path: damage_root(path, iteration=200), "same iteration"),
    "an iteration of text": (lambda path: damage_root(path, iteration="x"), "must be numbers"),
    "no model": (lambda path: damage_root(path, model=None), "state dict as `model`"),
    "a model that is a list": (lambda path: damage_root(path, model=[1]), "state dict"),
    "names that are numbers": (lambda path: damage_root(path, model={1: 2}), "state dict"),
    "a model in itself": (damage_recursion, "state dict"),
    "args of text": (lambda path: damage_root(path, args="x"), "must be a namespace"),
    "args of another size": (
        lambda path: damage_root(path, args=args_of(4)),
        "tensor_model_parallel_size",
    ),
    "args of expert ranks": (
        lambda path: damage_root(path, args=args_of(2, expert_model_parallel_size=2)),
        "expert",
    ),
    "other names": (lambda path: damage_model(path, other=torch.zeros(1)), "as `other`"),
    "fewer names": (lambda path: damage_model(path, **{LAST_NORM: None}), LAST_NORM),
    "a shorter table": (
        lambda path: damage_model(path, **{TABLE: torch.zeros(9, HIDDEN)}),
        "shards of one shape",
    ),
    "a narrower shard": (
        lambda path: damage_model(path, **{FC2.format(0): torch.zeros(HIDDEN, 2)}),
        r"fc2.*shape",
    ),
    "a norm of another shape": (
        lambda path: damage_model(path, **{LAST_NORM: torch.zeros(2)}),
        "same on every rank",
    ),
    "a norm of other values": (
        lambda path: damage_model(path, **{LAST_NORM: torch.zeros(HIDDEN)}),
        "same on every rank",
    ),
    "another dtype": (
        lambda path: damage_model(path, **{LAST_NORM: torch.zeros(HIDDEN).half()}),
        "one dtype",
    ),
    "a record of ours that is wrong": (
        lambda path: [
            save(path / "iter_0000100", f"{r:02d}", load(path, r)["model"],
                 tp_embed={TABLE: {"vocab_size": 10**9}})
            for r in range(2)
        ],
        "must say how",
    ),
    "an old order of queries": (damage_version, "checkpoint_version"),
    "code in the first rank": (lambda path: damage_malicious(path, 0), "mkdir"),
    "code in the second rank": (lambda path: damage_malicious(path, 1), "mkdir"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_written(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL_DIRECTORY", str(tmp_path / "evil"))
    path = save_all(tmp_path / "a", whole_model(), 2, args=args_of(2))
    act, message = DAMAGES[damage]
    act(path)
    error = UnsafeCheckpointError if damage.startswith("code") else CheckpointError
    with pytest.raises(error, match=message):
        move(path, tmp_path / "out" / "b", 4, vocab_size=VOCAB)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
