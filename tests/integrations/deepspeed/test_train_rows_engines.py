"""Compares `train_rows` on engines with a masking hook in one process of plain torch."""

from __future__ import annotations

import pytest
import torch

import train_rows_job as job
from forks import run_script
from tp_embed.integrations.deepspeed.config import read_section


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("train_rows")
    run_script(job.__file__, out, ranks=4)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("case", job.CASES)
def test_trains_as_with_a_masked_gradient(seen, case):
    losses, table = job.train_alone()
    for rank in seen:
        found = rank[f"{case}"]
        assert found[0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(found[1], table, atol=2e-5, rtol=1e-5)


def test_hooks_and_attributes_of_zero_init(seen):
    for rank in seen:
        refused, attribute, frozen = rank["zero.Init"]
        assert "'embed' must have no hook that expects the whole table" in refused
        assert attribute
        assert frozen


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ([1, -2], [1, -2]),
        ("3:5", slice(3, 5)),
        ("32000:", slice(32000, None)),
        (":-2", slice(None, -2)),
        ("::2", slice(None, None, 2)),
    ],
)
def test_section(given, rows):
    _, section = read_section({"tp_embed": {"train_rows": {"*.embed": given}}})
    assert section.rows == {"*.embed": rows}


@pytest.mark.parametrize("given", ["3", "a:b", "1:2:3:4", 3, [1.5], None])
def test_section_refuses(given):
    with pytest.raises(ValueError, match=r"`tp_embed\.train_rows.*"):
        read_section({"tp_embed": {"train_rows": {"*.embed": given}}})
