"""Compares engines of models with n-gram and per-layer tables, at TP 2 x DP 2 and
DP 4, with one process of plain torch."""

from __future__ import annotations

import pytest
import torch

import ngram_job as job
from forks import run_script
from tp_embed.lookup.gradient import as_sparse
from tp_embed.optim import RowwiseAdagrad, RowwiseAdam

OPTIMIZERS = {"rowwise_adagrad": RowwiseAdagrad, "rowwise_adam": RowwiseAdam}
KINDS = {
    "embed": "ShardedEmbedding",
    "vocab": "VocabShardedEmbedding",
    "world": "RowWiseEmbedding",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("ngram")
    run_script(job.__file__, out, ranks=4)
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(4)]


def train_alone(name, optimizer):
    """AdamW, or for the large table its own optimizer, on the rows that were looked up."""
    model, looked_up = job.build(name), []
    layer = model.get_submodule(job.TABLES[name])
    layer.register_forward_pre_hook(lambda _, args: looked_up.append(args[0].flatten()))
    table = layer.weight
    trained = [p for p in model.parameters() if p is not table or optimizer is None]
    others = torch.optim.AdamW(trained, lr=job.LR, eps=job.EPS, weight_decay=0.01)
    own = optimizer and OPTIMIZERS[optimizer]([table], lr=job.TABLE_LR, eps=job.EPS)
    losses, norms = [], []
    for ids in zip(*map(job.batches, range(job.replicas(name))), strict=True):
        looked_up.clear()
        model.zero_grad()
        loss = torch.stack([model(input_ids=i, labels=i)["loss"] for i in ids]).mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), job.CLIP).item())
        others.step()
        if own:
            used = torch.cat(looked_up).unique()
            own.step(grads={table: as_sparse(used, table.grad[used], len(table))})
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("case", job.CASES, ids=str)
def test_trains_as_one_process(seen, case):
    name, stage, strategy, optimizer = case
    losses, norms = train_alone(name, optimizer)
    assert min(norms) > job.CLIP
    assert losses[0] != losses[-1]
    for rank in seen:
        found = rank[f"{case}"]
        assert found["kind"] == KINDS[strategy]
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        if stage:
            assert found["norms"][0] == pytest.approx(norms[0], rel=2e-6)
            # In one process, fp64 gives norms that differ as much in later steps.
            assert found["norms"] == pytest.approx(norms, rel=1e-3)


def test_the_config_cuts_other_layers(seen):
    """So that tables are not all that is compared."""
    for case in job.CASES:
        cut = seen[0][f"{case}"]["cut"]
        if case[0] == "ours":
            assert cut == []
        elif case[0] == "qwen":
            assert "model.layers.1.mlp.shared_expert.down_proj" in cut
            assert "model.layers.0.linear_attn.out_proj" in cut
        else:
            assert "model.layers.1.self_attn.o_proj" in cut
            assert "model.layers.1.mlp.down_proj" in cut
        assert ("model.layers.0.mlp.down_proj" in cut) == (case[0] == "gemma4")


def test_why_there_is_a_partition_config(seen):
    """If DeepSpeed learns these plans some day, the docs can leave it out. The plan of Gemma 3n
    cuts layers that need the mean of all columns."""
    found = seen[0]["by the plan"]
    for name in ("qwen", "gemma4"):
        assert "unsupported partition style(s)" in found[name]
    ids = job.batches(0)[0]
    expected = job.build("gemma3n")(input_ids=ids, labels=ids).loss.item()
    assert abs(found["gemma3n"] - expected) > 1e-4
