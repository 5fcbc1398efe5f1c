"""ZeRO 3 gathers the weight of a head whose loss is fused around the head only."""

from __future__ import annotations

import pytest
import torch

import fused_zero3_job as job
from forks import run_script
from fuse_loss_job import STEPS, alone


def test_the_weight_is_whole_while_the_head_runs(tmp_path):
    run_script(job.__file__, tmp_path, 2)
    expected = alone("llama")
    for rank in range(2):
        found = torch.load(tmp_path / f"seen{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(expected, rel=1e-5)
        # In the first layer, as logits are deferred, as the loss is computed, after the forward.
        step = ["NOT_AVAILABLE", "AVAILABLE", "AVAILABLE", "NOT_AVAILABLE"]
        assert found["seen"] == step * STEPS
