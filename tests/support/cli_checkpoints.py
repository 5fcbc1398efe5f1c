"""A small checkpoint, and the command `tp-embed` in this process."""

from __future__ import annotations

import json

import torch
from torch import nn

from tp_embed import cli

ROWS, COLUMNS = 40, 8


def trained(names=True):
    """A model with tied tables, and its optimizer after a step."""
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(ROWS, COLUMNS),
            "fc": nn.Linear(COLUMNS, COLUMNS),
            "lm_head": nn.Linear(COLUMNS, ROWS, bias=False),
        }
    )
    model.lm_head.weight = model.embed_tokens.weight
    parameters = list(model.named_parameters() if names else model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    sum(each.square().sum() for each in model.parameters()).backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}


def save_trained(tmp_path):
    path = tmp_path / "source" / "model.pt"
    path.parent.mkdir()
    torch.save(trained(), path)
    return path


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def tp_embed(*arguments):
    return cli.main([str(argument) for argument in arguments])


def read_report(capsys):
    """The object that ``--json`` has printed."""
    return json.loads(capsys.readouterr().out)
