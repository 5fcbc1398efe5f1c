"""Compares tables with an optimizer of their own, in engines, with one process of plain torch."""

from __future__ import annotations

import pytest
import torch

import row_tables_job as job
from forks import run_script
from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.lookup.gradient import as_sparse
from tp_embed.optim import LazyAdam, RowwiseAdagrad, RowwiseAdam
from tp_embed.partition import Partition

KINDS = {"lazy_adam": LazyAdam, "rowwise_adagrad": RowwiseAdagrad, "rowwise_adam": RowwiseAdam}
REPLICAS = {"tp2dp2": 2, "tp4": 1, "dp4": 4}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("row_tables")
    run_script(job.__file__, out, ranks=4)
    return out


@pytest.fixture(scope="module")
def seen(out):
    return [torch.load(out / f"seen{rank}.pt", weights_only=True) for rank in range(4)]


def train_alone(replicas, kind, rates, table_rates):
    """Dense gradients, one norm over all, AdamW, and the table's optimizer on the rows in use."""
    model = job.build()
    others = [p for p in model.parameters() if p is not model.ngram.weight]
    optimizer = torch.optim.AdamW(others)
    own = KINDS[kind]([model.ngram.weight], weight_decay=job.DECAY)
    all_ids = torch.stack([job.batches(i) for i in range(replicas)], dim=1)
    losses, norms, own_norms = [], [], []
    for ids, rate, table_rate in zip(all_ids, rates, table_rates, strict=True):
        model.zero_grad()
        loss = torch.stack([model(row) for row in ids.flatten(0, 1)]).mean()
        loss.backward()
        own_norms.append(model.ngram.weight.grad.norm().item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.CLIP)
        used = torch.stack([model.pairs(row) for row in ids.flatten(0, 1)]).unique()
        used = used[used != model.ngram.padding_idx]
        grad = model.ngram.weight.grad
        rows = as_sparse(used, grad[used], len(grad))
        optimizer.param_groups[0]["lr"], own.param_groups[0]["lr"] = rate, table_rate
        optimizer.step()
        own.step(grads={model.ngram.weight: rows})
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, own_norms, model


@pytest.mark.parametrize("case", job.CASES)
def test_trains_as_one_process(seen, case):
    stage, layout, kind, _ = case
    for rank in seen:
        found = rank[f"{case}"]
        rates = found["rates"]
        assert rates[0] != rates[-1]
        table_rates = [0.3] * len(rates) if stage % 2 else rates
        losses, norms, _, model = train_alone(REPLICAS[layout], kind, rates, table_rates)
        assert min(norms) > job.CLIP  # So that all gradients are clipped.
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        if stage:
            assert found["norms"] == pytest.approx(norms, rel=1e-5)
        torch.testing.assert_close(found["table"], model.ngram.weight, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found["mix"], model.mix.weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", job.CASES)
def test_monitors_count_the_rows_that_a_step_updates(seen, case):
    model, rows = job.build(), []
    all_ids = torch.stack([job.batches(i) for i in range(REPLICAS[case[1]])], dim=1)
    for ids in all_ids:
        used = torch.stack([model.pairs(row) for row in ids.flatten(0, 1)]).unique()
        rows.append({"ngram": (used != model.ngram.padding_idx).sum().item()})
    assert len({row["ngram"] for row in rows}) > 1
    assert seen[0][f"{case}"]["updated"] == rows
    assert seen[1][f"{case}"]["updated"] == []


def test_monitors_count_the_exchange_of_gradients(seen):
    model, shards = job.build(), Partition(job.W, 2)
    for way in seen[0]["ways"]:
        of_ranks = [rank["ways"][way] for rank in seen]
        for number, found in enumerate(of_ranks):
            shard, ids, sent = shards.shard(number % 2), job.batches(number // 2), 0
            for step in ids:
                used = torch.stack([model.pairs(row) for row in step]).unique().tolist()
                rows = [row for row in used if row in shard and row != model.ngram.padding_idx]
                sent += 8 + len(rows) * (4 * job.E + 8)
            assert found["sent"][0] == sent
        total = sum(sum(found["sent"]) for found in of_ranks) / 4
        assert of_ranks[0]["monitored bytes"] == pytest.approx(total)
        # With a wall-clock breakdown: the table's gang, and its data-parallel ranks.
        assert of_ranks[0]["timed gangs"] == (2 if "groups" in way else 0)


@pytest.mark.parametrize(
    ("stage", "half", "dtype"),
    [
        (0, None, "torch.float32"),
        (1, "bf16", "torch.bfloat16"),
        (2, "fp16", "torch.float16"),
        (3, "bf16", "torch.bfloat16"),
        (3, "world", "torch.float32"),
        (1, "world", "torch.float32"),
    ],
)
def test_resumes_from_a_checkpoint(seen, stage, half, dtype):
    for rank in seen:
        found = rank[f"resume {stage} {half}"]
        assert found["dtype"] == dtype
        assert found["mine"] == 3
        assert found["again"] == found["on"]
        assert found["on"]["losses"] != found["first"]["losses"]
        assert found["same"]
        assert found["master"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_in_the_table_skips_the_step(seen, stage):
    for rank in seen:
        applied, same, steps, scales = zip(*rank[f"overflow {stage}"], strict=True)
        assert applied == (True, False, True)
        assert same == (False, True, False)
        assert steps == (1, 1, 2)
        assert scales == (16.0, 8.0, 8.0)


def test_ways_to_build_an_engine(seen):
    for rank, seen_by in enumerate(seen):
        for found in seen_by["ways"].values():
            rates = found["rates"]
            table_rates = [0.3] * len(rates)
            losses, _, norms, _ = train_alone(2, "rowwise_adagrad", rates, table_rates)
            assert found["losses"] == pytest.approx(losses, rel=1e-5)
            assert found["monitored"] == ([] if rank else pytest.approx(norms, rel=1e-5))


def test_replicas_start_from_the_table_of_the_first(seen):
    for rank in seen:
        assert torch.equal(rank["unequal"], job.build().ngram.weight)


@pytest.mark.parametrize("stage", [1, 3])
def test_exports_and_state_dicts_hold_the_whole_table(seen, stage):
    for rank in seen:
        found = rank[f"whole {stage}"]
        assert torch.equal(found["master"].bfloat16(), found["table"])
        assert torch.equal(found["hooked"], found["table"])
        assert found["cleared"]
        assert ["export()" in message for message in found["refused"]] == [True, True]
        assert torch.equal(found["exported"], found["master"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimizer": "adam"}, r"`tp_embed\.tables\.ngram\.optimizer` .* is 'adam'"),
        ({"optimizer": "rowwise_adam", "lr": -1.0}, "`lr` must be at least 0"),
        ({"optimizer": "rowwise_adam", "betas": [0.9]}, r"`tp_embed\.tables\.ngram\.betas`"),
        ({"optimizer": "rowwise_adagrad", "betas": [0.9, 0.9]}, "`betas` must be left out"),
        (
            {"optimizer": "rowwise_adagrad", "rate": 1.0},
            "betas, eps, lr, memory, optimizer, resident, weight_decay",
        ),
        ({}, r"`tp_embed\.tables\.ngram\.optimizer`"),
    ],
)
def test_section_refuses(table, message):
    with pytest.raises(ValueError, match=message):
        read_section({"tp_embed": {"tables": {"ngram": table}}})
