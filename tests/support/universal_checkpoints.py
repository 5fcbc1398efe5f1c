"""Universal checkpoints of DeepSpeed: small ones, copies, and how they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tp_embed.checkpoint import CheckpointError, Request, convert


def copy(source: Path, output: Path, **options) -> None:
    request = Request(to="universal", source_format="universal", **options)
    convert(source, output, request, verify=True)


def save_small(file: Path) -> None:
    """Saves a torch checkpoint with two Parameters, one of them frozen, and a buffer."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model[1].requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named)
    model(torch.rand(5, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": 1,
            "buffer_names": [name for name, _ in model.named_buffers()],
        },
        file,
    )


def refused(source: Path, match: str, kind: type = CheckpointError) -> None:
    """Asserts that reading ``source`` fails and nothing is written."""
    output = source.parent / "refused"
    with pytest.raises(kind, match=match):
        convert(source, output, Request(to="universal", source_format="universal"))
    assert not output.exists()
    assert not list(source.parent.glob(".refused*"))


def change(path: Path, edit) -> None:
    content = torch.load(path, weights_only=True)
    edited = edit(content)
    torch.save(content if edited is None else edited, path)
