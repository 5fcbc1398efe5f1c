"""Compares tables with an optimizer of their own with one process, in engines of up to three ranks;
test_row_tables_engines.py has four."""

from __future__ import annotations

import pytest
import torch
from test_row_tables_engines import train_alone

import row_tables_ranks_job as job
from forks import run_script
from row_tables_job import CLIP


@pytest.mark.parametrize("size", [1, 2, 3])
def test_trains_as_one_process(size, tmp_path):
    run_script(job.__file__, tmp_path, ranks=size)
    for rank in range(size):
        seen = torch.load(tmp_path / f"seen{rank}.pt", weights_only=True)
        for case in job.CASES:
            stage, layout, kind, _ = case
            found, replicas = seen[f"{case}"], size if layout == "dp" else 1
            rates = found["rates"]
            table_rates = [0.3] * len(rates) if stage % 2 else rates
            losses, norms, _, model = train_alone(replicas, kind, rates, table_rates)
            assert min(norms) > CLIP  # So that all gradients are clipped.
            assert found["losses"] == pytest.approx(losses, rel=1e-5), case
            weight = model.ngram.weight
            torch.testing.assert_close(found["table"], weight, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(found["mix"], model.mix.weight, rtol=1e-4, atol=2e-5)
