"""Compares engines whose table is in memory-mapped files with engines whose table is in memory."""

from __future__ import annotations

import pytest
import torch

import mapped_tables_job as job
from forks import run_script
from tp_embed.integrations.deepspeed.config import read_section


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("mapped_tables")
    run_script(job.__file__, out, ranks=2)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", job.CASES)
def test_trains_and_resumes_as_in_memory(seen, case):
    steps = job.job.STEPS
    for rank in seen:
        found = rank[f"{case}"]
        expected = found["memory"]
        for way in ("mapped", "a", "b"):
            assert found[way][:2] == expected[:2]  # Losses, norms and learning rates.
            assert torch.equal(found[way][2], expected[2])
        # After training; in a new directory, after loading; in the old one, after loading.
        assert found["steps"] == [2 * steps, 0, steps, 2 * steps, steps]
        assert found["mine"] == 3
        assert set(found["rows in files"]) == {0}


def test_refuses_what_would_lose_rows(seen):
    for rank in seen:
        assert "Set `tp_embed.rules` to {'ngram': 'world'}" in rank["vocab"]
        for case in job.CASES:
            assert "`load_optimizer_states` must be True" in rank[f"{case}"]["refused"]


def test_a_table_on_meta_is_initialized_in_its_files(seen):
    for rank in seen:
        table, trained = rank["meta"]
        assert table.shape == (job.job.W, job.job.E)
        assert torch.isfinite(table).all()
        assert 0.5 < table.std() < 1.5
        assert not table[3].any()  # The pad row.
        assert all(map(torch.isfinite, map(torch.tensor, trained["losses"])))


def test_config():
    table = {"optimizer": "lazy_adam", "resident": 1 << 20}
    with pytest.raises(ValueError, match="`resident` must be left out without `memory`"):
        read_section({"tp_embed": {"tables": {"*": table}}})
    _, section = read_section({"tp_embed": {"tables": {"*": {**table, "memory": "/data"}}}})
    assert section.tables["*"].memory == "/data"
    for key, value in (("memory", ""), ("resident", 0)):
        with pytest.raises(ValueError, match=key):
            read_section({"tp_embed": {"tables": {"*": {**table, "memory": "/data", key: value}}}})
