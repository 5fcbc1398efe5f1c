"""Conversions between any formats and numbers of ranks keep everything a format can hold."""

import shutil
from itertools import pairwise

import pytest
import torch

from conversions import BEGIN, END, Model, save_model, table
from launch import ROOT
from tp_embed.checkpoint import ReadOptions, Request, Rule, convert, differences, read

PAGE = ROOT / "docs" / "checkpoints.md"


def test_the_table_of_the_docs_is_current(tmp_path):
    page = PAGE.read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip().splitlines() == table(tmp_path)


def options(table_rule):
    rules = (table_rule, "up.*=0", "down.weight=1", "*=replicated")
    return ReadOptions(rules=tuple(map(Rule.parse, rules)))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Creates a checkpoint with sizes that two, three and four do not divide."""
    path = tmp_path_factory.mktemp("uneven") / "model.pt"
    sizes = Model.VOCAB, Model.EMBED
    Model.VOCAB, Model.EMBED = 23, 7
    try:
        save_model(path)
    finally:
        Model.VOCAB, Model.EMBED = sizes
    return path


@pytest.mark.parametrize("name", ["tp-embed", "deepspeed", "universal"])
def test_uneven_shards_go_from_one_rank_to_four_and_back_along_both_dimensions(
    uneven, tmp_path, name
):
    steps = [(1, "vocab"), (2, "vocab"), (3, "embed"), (4, "vocab"), (3, "vocab"), (1, "embed")]
    paths = [uneven]
    for number, (tp_size, dim) in enumerate(steps):
        paths.append(tmp_path / str(number))
        # Rules are needed once: from then on the checkpoints say it.
        read_options = options("lm_head.weight=vocab") if tp_size <= 2 else ReadOptions()
        convert(paths[-2], paths[-1], Request(to=name, tp_size=tp_size, dim=dim, read=read_options))
    for first, second in pairwise(paths):
        assert list(differences(read(first, ReadOptions()), read(second, ReadOptions()))) == []
    convert(paths[-1], tmp_path / "end.pt", Request(to="pt"))
    expected, found = torch.load(uneven), torch.load(tmp_path / "end.pt")
    for key, value in expected["model"].items():
        assert torch.equal(found["model"][key], value)
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, expected["model"][n].requires_grad_()) for n in group["param_names"]]}
            for group in expected["optimizer"]["param_groups"]
        ]
    )
    optimizer.load_state_dict(found["optimizer"])
    for group, other in zip(
        expected["optimizer"]["param_groups"], found["optimizer"]["param_groups"], strict=True
    ):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
        for index, other_index in zip(group["params"], other["params"], strict=True):
            one, two = (
                state["optimizer"]["state"][i]
                for state, i in ((expected, index), (found, other_index))
            )
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_every_zero_stage_is_written_and_read(uneven, tmp_path, stage, dp_size):
    written, end = tmp_path / "written", tmp_path / "end.pt"
    request = Request(
        to="deepspeed",
        tp_size=2,
        zero_stage=stage,
        dp_size=dp_size,
        read=options("*embed_tokens.weight=embed"),
    )
    convert(uneven, written, request)
    convert(written, end, Request(to="pt"))
    assert list(differences(read(uneven, ReadOptions()), read(end, ReadOptions()))) == []


def test_masters_and_16_bit_weights_are_both_carried(uneven, tmp_path):
    """With `float32`, weights become the masters; else they stay as they were."""
    state = torch.load(uneven)
    names = [name for group in state["optimizer"]["param_groups"] for name in group["param_names"]]
    masters = {name: state["model"][name] for name in names}
    for number, name in enumerate(names):
        state["optimizer"]["state"][number]["fp32"] = masters[name]
    state["model"] = {name: value.bfloat16() for name, value in state["model"].items()}
    source = tmp_path / "source.pt"
    torch.save(state, source)
    previous = source
    for name in ("tp-embed", "deepspeed", "dcp", "tp-embed", "pt"):
        output = tmp_path / f"{name}-{previous.name}"
        request = Request(to=name, tp_size=2, read=options("*embed_tokens.weight=vocab"))
        convert(previous, output, request)
        assert list(differences(read(source, ReadOptions()), read(output, ReadOptions()))) == []
        previous = output
    convert(previous, tmp_path / "fp32.pt", Request(to="pt", dtype=torch.float32))
    found = torch.load(tmp_path / "fp32.pt")["model"]
    assert all(torch.equal(found[name], masters[name]) for name in names)
    shutil.rmtree(tmp_path)
