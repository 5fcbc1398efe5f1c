"""If ranks look up different ids, all of them raise instead of hanging."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from parity import SHARDED, assert_same_bits
from tp_embed import BatchLayout, GangError, OutputHead, StandardEmbedding, shard_embeddings
from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.lookup.same_ids import SameIds, check_interval

SIZES = [2, 3]
KINDS = sorted(SHARDED)
LAYERS = [
    ("embed", "replicated"),
    ("embed", "sequence"),
    ("embed", "shard"),
    ("vocab", "replicated"),
    ("vocab", "sequence"),
]
V, E = 11, 6
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def table():
    embed = StandardEmbedding(V, E)
    with torch.no_grad():
        embed.weight.copy_(torch.arange(float(V * E)).view(V, E))
    return embed


def other(what, rank):
    """Returns the ids and the layout of the last rank."""
    ids, layout = IDS.clone(), BatchLayout.of(IDS, [4, 3])
    if what == "value":
        ids[1, 1] = 0
    elif what == "order":
        ids[0, 2], ids[0, 3] = 4, 3
    elif what == "order of rows":
        ids = ids.flip(0)
    elif what == "longer":
        ids = torch.cat([ids, ids], 1)
    elif what == "other shape":
        ids = ids.view(4, 2)
    elif what == "flat":
        ids = ids.flatten()
    elif what == "none":
        ids = ids[:0]
    elif what == "out of range":
        ids[0, 1] = 99
    elif what == "padding":
        layout = BatchLayout.of(IDS, [4, 2])
    return ids, layout if what == "padding" else None


DIFFERENCES = {
    "value": "rank {last} has 0 at position (1, 1) where rank 0 has 6 (1 of 8 differ)",
    "order": "rank {last} has 4 at position (0, 2) where rank 0 has 3 (2 of 8 differ)",
    "order of rows": "rank {last} has 5 at position (0, 0) where rank 0 has 1 (8 of 8 differ)",
    "longer": "their shapes are (2, 4) on rank 0, ",
    "other shape": "(4, 2) on rank {last}",
    "flat": "(8,) on rank {last}",
    "none": "(0, 4) on rank {last}",
    "out of range": "rank {last} has 99 at position (0, 1) where rank 0 has 2 (1 of 8 differ)",
    "padding": "rank {last} has padding at position (1, 2) where rank 0 has 7 (1 of 8 differ)",
}


def refused(embed, ids, layout=None):
    try:
        embed(ids, layout)
    except GangError as e:
        return str(e)
    return None


def differ(gang, kind, output, what):
    """Returns the errors of a first and a later lookup; then looks up again."""
    layout = BatchLayout.of(IDS, [4, 3]) if what == "padding" else None
    ids = IDS
    if gang.rank == gang.size - 1:
        ids, layout = other(what, gang.rank)
    errors = []
    for dedup in (True, False):
        embed = SHARDED[kind].from_embedding(
            table(), gang, output=output, dedup=dedup, check_ids=True
        )
        errors.append(refused(embed, ids, layout))
        expected = embed(IDS)
        errors.append(refused(embed, ids, layout))
        with torch.no_grad():
            errors.append(refused(embed.eval(), ids, layout))
        assert_same_bits(embed(IDS), expected, "outputs")
    return errors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "output"), LAYERS)
@pytest.mark.parametrize("what", DIFFERENCES)
def test_other_ids_of_one_rank_are_refused_on_all(pool, what, kind, output, size):
    found = pool(size, differ, kind, output, what)
    name = SHARDED[kind].__name__
    for rank, errors in enumerate(found):
        for number, error in zip([1, 3, 4] * 2, errors, strict=True):
            assert error is not None
            assert f"Gang(rank={rank}, size={size}, " in error
            assert f"the same ids in {name}({V}, {E}, {output!r}), but in lookup {number}" in error
            assert f"rank {size - 1} and rank 0 disagree: " in error
            assert DIFFERENCES[what].format(last=size - 1) in error
            for fix in ("DistributedSampler", "gang.broadcast(ids)", '`output="sequence"`'):
                assert fix in error


def at_lookup(gang, kind, every, odd):
    """Returns which of 12 lookups finds a difference in the ``odd``-th, and its error."""
    embed = SHARDED[kind].from_embedding(table(), gang, check_ids=every)
    for number in range(1, 13):
        ids = IDS.roll(1, 1) if number == odd and gang.rank == 1 else IDS
        if error := refused(embed, ids):
            return number, error
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_lookups_between_comparisons_count_too(pool, kind):
    for every, odd, found in [(4, 1, 1), (4, 2, 5), (4, 4, 5), (4, 5, 5), (4, 6, 9), (1, 6, 6)]:
        for number, error in pool(2, at_lookup, kind, every, odd):
            assert number == found
            if found == odd:
                assert "rank 1 has 4 at position (0, 0) where rank 0 has 1" in error
            else:
                assert "since the last comparison others differed, and were used" in error
                assert "TP_EMBED_CHECK_IDS=1" in error
    for every in (0, False):
        assert pool(2, at_lookup, kind, every, 2) == [None] * 2


def right(gang, kind, output, dtype):
    """Runs lookups of all kinds, checked or not, with gradients; returns what the check sends."""
    results = []
    for check_ids in (False, None, True, 3):
        embed = SHARDED[kind].from_embedding(table(), gang, output=output, check_ids=check_ids)
        outputs, counts = [], []
        for ids, lens in ((IDS, [4, 2]), (IDS[:1], [3]), (IDS.repeat(2, 2), [8] * 4)):
            with CommDebugMode() as comm:
                outputs.append(embed(ids.to(dtype), BatchLayout.of(ids, lens)))
            counts.append(comm.get_total_counts())
            outputs[-1].square().sum().backward()
        outputs.append(embed.weight.grad)
        results.append(([x.detach() for x in outputs], counts))
    return results


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize(("kind", "output"), LAYERS)
def test_checks_change_nothing_but_one_collective(pool, kind, output, dtype):
    for size in (1, *SIZES):
        for unchecked, *checked in pool(size, right, kind, output, dtype):
            for (outputs, counts), more in zip(
                checked, ([1, 0, 0], [1, 1, 1], [1, 0, 0]), strict=True
            ):
                for found, expected in zip(outputs, unchecked[0], strict=True):
                    assert_same_bits(found, expected, "outputs")
                assert counts == [
                    n + (m if size > 1 else 0) for n, m in zip(unchecked[1], more, strict=True)
                ]


def out_of_range(gang, kind):
    """Looks up the same bad id on all ranks; then a bad id on one rank alone."""
    embed = SHARDED[kind].from_embedding(table(), gang, check_ids=True)
    bad = IDS.clone()
    bad[1, 0] = V
    with pytest.raises(IndexError, match=r"the id at position \(1, 0\) is 11 instead"):
        embed(bad)
    return refused(embed, bad if gang.rank == 1 else IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_out_of_range_on_one_rank_ends_all(pool, kind):
    for error in pool(3, out_of_range, kind):
        assert "rank 1 has 11 at position (1, 0) where rank 0 has 5" in error


def other_table(gang):
    first = SHARDED["embed"](gang, V, E, check_ids=True)
    second = SHARDED["embed"](gang, V + 1, E, check_ids=True)
    return refused(first if gang.rank == 0 else second, IDS)


def other_number(gang):
    """Rank 0 looks up once more, in a copy that no other rank has."""
    embed = SHARDED["embed"](gang, V, E, check_ids=2)
    embed(IDS)
    embed(IDS)
    if gang.rank == 0:
        embed._lookup.same_ids._history.count += 2
    return refused(embed, IDS)


def test_other_branches(pool):
    for error in pool(2, other_table):
        assert "rank 1 and rank 0 disagree: they look up different tables" in error
    for error in pool(2, other_number):
        assert "it is lookup number 5 on rank 0, 3 on rank 1" in error


def copied(gang):
    """Copies restart the count, with the same n, on every rank."""
    embed = SHARDED["vocab"](gang, V, E, check_ids=5)
    for _ in range(3):
        embed(IDS)
    counts = []
    for copy_of in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        again = copy_of(embed)
        assert again._lookup.same_ids.every == 5
        again(IDS)
        counts.append(again._lookup.same_ids._history.count)
        error = refused(copy_of(embed), IDS.roll(gang.rank))
        assert "in lookup 1 rank 1 and rank 0 disagree" in error
    return [*counts, embed._lookup.same_ids._history.count]


def test_copies_count_their_own_lookups(pool):
    assert pool(2, copied) == [[1, 1, 3]] * 2


def deferred(gang, every):
    """Reads results two lookups later, as on an accelerator, but on the CPU."""
    check, calls = SameIds(every, lag=2), []
    for number in range(1, 9):
        try:
            check(IDS.roll(gang.rank) if number == 3 else IDS, None, gang, "it")
        except GangError as e:
            return number, str(e)
    check.flush()
    return calls


def test_deferred_check_raises_at_the_same_lookup_on_every_rank(pool):
    for every, number, how in (
        (1, 5, "in lookup 3 rank 1 and rank 0 disagree: the values or their order differ."),
        (2, 7, "in lookup 3 rank 1 and rank 0 disagree: the values or their order differ."),
        (4, 7, "these ids are the same, but since the last"),
    ):
        for found, error in pool(2, deferred, every):
            assert (found, how in error) == (number, True), error


def compiled(gang, kind):
    embed = SHARDED[kind].from_embedding(table(), gang, check_ids=True)
    run = torch.compile(embed, backend="aot_eager", fullgraph=True)
    assert_same_bits(run(IDS).detach(), table().weight.detach()[IDS], "outputs")
    return refused(run, IDS.roll(gang.rank)), refused(run, IDS.flip(1) if gang.rank else IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_lookups_are_checked(pool, kind):
    for errors in pool(2, compiled, kind):
        for error in errors:
            assert "disagree: rank 1 has " in error


def tied(gang):
    model = torch.nn.Sequential(torch.nn.Embedding(V, E), torch.nn.Linear(E, V, bias=False))
    model[1].weight = model[0].weight
    shard_embeddings(model, gang, strategy="vocab", check_ids=7)
    assert isinstance(model[1], OutputHead)
    every = model[0]._lookup.same_ids.every
    model(IDS).sum().backward()
    return every, refused(model[0].from_embedding(table(), gang, check_ids=1), IDS.roll(gang.rank))


def test_shard_embeddings_passes_it_on(pool):
    for every, error in pool(2, tied):
        assert every == 7
        assert "disagree: rank 1 has 8 at position (0, 0) where rank 0 has 1" in error


def disagree_on_it(gang, monkeypatch_environment):
    import os

    model = torch.nn.Sequential(torch.nn.Embedding(V, E))
    if monkeypatch_environment and gang.rank == 1:
        os.environ["TP_EMBED_CHECK_IDS"] = "7"
    try:
        check_ids = None if monkeypatch_environment else gang.rank
        with pytest.raises(GangError) as error:
            shard_embeddings(model, gang, check_ids=check_ids)
    finally:
        os.environ.pop("TP_EMBED_CHECK_IDS", None)
    return str(error.value)


def test_ranks_agree_on_the_interval(pool):
    for error in pool(2, disagree_on_it, False):
        assert "must agree on `check_ids`, but disagree: rank 0: 0, rank 1: 1" in error
    for error in pool(2, disagree_on_it, True):
        assert "must agree on `check_ids`, but disagree: rank 0: 128, rank 1: 7" in error


def test_interval(monkeypatch):
    monkeypatch.delenv("TP_EMBED_CHECK_IDS", raising=False)
    assert [check_interval(x) for x in (None, True, False, 0, 1, 9)] == [128, 1, 0, 0, 1, 9]
    for value in (-1, 2.0, "1"):
        with pytest.raises(ValueError, match=f"`check_ids` must be True .*, but is {value!r}"):
            check_interval(value)
    monkeypatch.setenv("TP_EMBED_CHECK_IDS", "3")
    assert [check_interval(x) for x in (None, True, False, 9)] == [3] * 4
    for value in ("", "-1", "yes", "1.0"):
        monkeypatch.setenv("TP_EMBED_CHECK_IDS", value)
        with pytest.raises(ValueError, match=f"TP_EMBED_CHECK_IDS must be 0 .* is '{value}' inst"):
            check_interval(None)


def test_section_of_a_deepspeed_config():
    for value in (True, False, 0, 9, None):
        _, section = read_section({"tp_embed": {"check_ids": value}})
        assert section.check_ids is value
    for value in (-1, "1", 0.5):
        with pytest.raises(ValueError, match=r"`tp_embed\.check_ids.*` of the DeepSpeed config is"):
            read_section({"tp_embed": {"check_ids": value}})
