"""Compares engines whose models compute their loss from hidden states with one process."""

from __future__ import annotations

import pytest
import torch

import fuse_loss_job as job
from forks import run_script
from hf_models import build

LOOPS = {
    "Accelerate, ZeRO 1": "llama",
    "Accelerate, ZeRO 3": "tied llama",
    **{f"initialize, ZeRO {stage}": "qwen3" for stage in range(4)},
    "from_pretrained": "llama",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("fused")
    build("llama").save_pretrained(out / "initial")
    run_script(job.__file__, out)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", job.TRAINERS)
def test_trainer_computes_what_it_does_alone(seen, case, tmp_path):
    expected = job.train(case, tmp_path)
    for rank in range(2):
        found = seen[rank][case]
        for name in ("losses", "eval", "accuracy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
        assert found["norms"] in ([], pytest.approx(expected["norms"], rel=1e-4))


def test_trainer_holds_logits_only_where_they_are_asked_for(seen):
    usual = ["evaluation: Tensor", "training: DeferredLogits"]
    expected = dict.fromkeys(job.TRAINERS, usual)
    expected["label smoothing"] = ["evaluation: Tensor", "training: Tensor"]
    expected["loss only"] = ["evaluation: DeferredLogits", "training: DeferredLogits"]
    for rank in range(2):
        assert {name: seen[rank][name]["kinds"] for name in expected} == expected


@pytest.mark.parametrize("case", LOOPS)
def test_loop_computes_what_it_does_alone(seen, case):
    expected = job.alone(LOOPS[case])
    for rank in range(2):
        assert seen[rank][case] == pytest.approx(expected, rel=1e-5)


def test_what_needs_logits_or_a_sharded_head_is_refused(seen):
    expected = {
        "metrics": "TypeError: Unsupported types .*DeferredLogits.*: pass True",
        "smoothing": "`log_softmax` needs the values of logits, which were not computed",
        "whole head": "The output head must be sharded with `tp_embed.fuse_loss`, but is Linear",
        "both": "`tp_embed.shard_logits` .* is True: must be false with `fuse_loss`, which holds",
        "value": "`tp_embed.fuse_loss` of the DeepSpeed config is 'sometimes'",
    }
    for rank in range(2):
        found = seen[rank]["refusals"]
        assert found.keys() == expected.keys()
        for name, message in expected.items():
            with pytest.raises(ValueError, match=message):
                raise ValueError(found[name])
