"""Engines whose table has an optimizer of its own refuse checkpoints that would mix models and
tables, before anything changes, and on all ranks."""

from __future__ import annotations

import pytest
import torch

import table_saves_job as job
from forks import run_script
from tp_embed.checkpoint import ReadOptions, read


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("table_saves")
    (out / "printed").write_text(run_script(job.__file__, out, ranks=2))
    return out


@pytest.fixture(scope="module")
def seen(out):
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", job.WAYS)
def test_refuses_the_model_and_the_table_of_two_saves(seen, way):
    assert "must hold the model and the tables of one save" in seen[0][way]["saves"]["converted"]
    for rank in seen:
        found = rank[way]["saves"]["two"]
        assert "must hold the model and the tables of one save" in found["error"]
        assert found["table"]
        # Saving was interrupted before the table was whole.
        assert "save" in (found := rank[way]["saves"]["no note"])["error"]
        assert found["table"]


@pytest.mark.parametrize("way", job.WAYS)
def test_hyperparameters_are_resumed(seen, way):
    for rank in seen:
        group, found, expected, losses, mine, has_stamp = rank[way]["rates"]
        assert found == group
        assert losses == expected
        assert mine == 3
        assert not has_stamp


@pytest.mark.parametrize("way", job.WAYS)
def test_ranks_that_find_different_tags_all_raise(seen, way):
    for rank in seen:
        assert "must find the same tag on all ranks" in rank[way]["tags"]["error"]
        assert rank[way]["tags"]["table"]
        assert rank[way]["tags"]["model"]


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "universal 0": "Leave `memory` out of `tp_embed.tables`",
        "universal 1": "Leave `memory` out of `tp_embed.tables`",
        "in memory": "Leave `memory` out of `tp_embed.tables`",
        "in files": "Set `memory` in `tp_embed.tables` for the same tables",
        "engine's": "must have snapshots of the tables in memory-mapped files, ['ngram'], but has",
        "a rank": "",
        "no tables, memory": "must have no tables with an optimizer of their own",
        "no tables, files": "must have no tables with an optimizer of their own",
        "no tables, universal": "",
    }.items(),
)
def test_refuses_other_tables_before_anything_changes(seen, name, message):
    for rank in seen:
        found = rank["others"][name]
        assert message in found["error"]
        assert "nothing was refused" not in found["error"]
        assert found["table"]
        assert found["model"]
    if name == "a rank":
        assert "but has ['rank-0-of-2', 'rank-1-of-3']" in seen[1]["others"][name]["error"]
        assert "failed on rank 1" in seen[0]["others"][name]["error"]


def test_exports_fp32_values_of_a_table_in_files(out, seen):
    for i in range(2):
        (table,) = [
            array.load()
            for key, array in read(out / f"export{i}", ReadOptions()).tensors.items()
            if key.name == "ngram.weight"
        ]
        assert table.dtype == torch.float32
        assert torch.equal(table, torch.cat([rank["exported"][i] for rank in seen]))


def test_warns_of_a_new_model_with_an_old_table(out):
    text = (out / "printed").read_text()
    runs = text.split("RUN 2")[0], text.split("RUN 3")[0], text.split("RUN 3")[-1]
    assert "a new model trains with an old table" not in runs[0]
    assert "a new model trains with an old table" not in runs[1]
    assert "a new model trains with an old table" in runs[2]
