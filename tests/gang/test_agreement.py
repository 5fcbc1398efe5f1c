"""If ranks are about to do different things, all raise before anything happens."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tp_embed import GangError, StandardEmbedding, shard_embeddings
from tp_embed.gang.agreement import meet, raise_together
from tp_embed.nn import init


def shard_differently(gang, what):
    """Rank 1 differs from the others in one thing."""
    odd = gang.rank == 1
    torch.manual_seed(int(odd and what == "seed"))
    model = nn.Sequential(nn.Embedding(12 if odd and what == "size" else 11, 6))
    if odd and what == "dtype":
        model = model.bfloat16()
    options = {"strategy": "vocab"} if odd and what == "strategy" else {"strategy": "embed"}
    if odd and what == "class":
        model[0] = StandardEmbedding(11, 6)
    if odd and what == "init":
        options["init_fn"] = init.normal
    with pytest.raises(GangError) as error:
        shard_embeddings(model, gang, **options)
    assert isinstance(model[0], (nn.Embedding, StandardEmbedding))
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("strategy", "the strategy for '0', but disagree: rank 0: 'embed', rank 1: 'vocab', rank"),
        ("size", "the shape of '0', but disagree: rank 0: (11, 6), rank 1: (12, 6), rank 2: (11,"),
        ("dtype", "the dtype of '0', but disagree: rank 0: torch.float32, rank 1: torch.bfloat16"),
        ("seed", "the values of '0' (a checksum), but disagree: rank 0: '"),
        ("class", "the classes at '0', but disagree: rank 0: ['Embedding'], rank 1: ['Standard"),
        ("init", "whether there is an `init_fn`, but disagree: rank 0: False, rank 1: True"),
    ],
)
def test_all_ranks_are_told(pool, what, message):
    for found in pool(3, shard_differently, what):
        assert message in found
        assert found.endswith("with torch seeded alike.")


def shard_from_init(gang):
    """Ranks may have different values if all are drawn again."""
    torch.manual_seed(gang.rank)
    shard_embeddings(nn.Sequential(nn.Embedding(11, 6)), gang, init_fn=init.normal)


def test_values_do_not_matter_where_they_are_replaced(pool):
    pool(2, shard_from_init)


def fail_alone(gang, what):
    """Rank 1 has something that cannot be sharded."""
    odd = gang.rank == 1
    torch.manual_seed(0)
    options = {"max_norm": 1.0} if odd and what == "table" else {}
    model = nn.Sequential(nn.Embedding(11, 6, **options))
    strategy = "vocabb" if odd and what == "argument" else "vocab"
    with pytest.raises((GangError, ValueError)) as error:
        shard_embeddings(model, gang, strategy=strategy)
    assert type(model[0]) is nn.Embedding
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize(
    ("what", "message"), [("argument", "`strategy` must be one of"), ("table", "use `max_norm`")]
)
def test_error_of_one_rank_ends_all(pool, what, message):
    found = pool(3, fail_alone, what)
    assert [kind for kind, _ in found] == ["GangError", "ValueError", "GangError"]
    for rank in (0, 2):
        assert "Rank 1 of ProcessGroupGang(" in found[rank][1]
    assert all(message in text for _, text in found)


class OddError(Exception):
    """Can be neither pickled nor printed."""

    def __init__(self, lock):
        super().__init__(lock)

    def __str__(self):
        raise RuntimeError("no message")


EXCEPTIONS = {
    "MemoryError: no memory": lambda: MemoryError("no memory"),
    "OutOfMemoryError: 20 GiB": lambda: torch.OutOfMemoryError("20 GiB"),
    "RuntimeError: [enforce fail] can't allocate": None,
    "KeyboardInterrupt": lambda: KeyboardInterrupt(),
    "SystemExit: 3": lambda: SystemExit(3),
    "AssertionError: x": lambda: AssertionError("x"),
    "KeyError: 'x'": lambda: KeyError("x"),
    "OSError: [Errno 28] No space": lambda: OSError(28, "No space"),
    "ZeroDivisionError: integer division": lambda: 1 // 0,
    "OddError: its message can't be shown": lambda: OddError(threading.Lock()),
    f"ValueError: {'x' * 2000}... (1000000 characters)": lambda: ValueError("x" * 1_000_000),
    "ValueError: caf\u00e9 \udcff\n": lambda: ValueError("caf\u00e9 \udcff\n"),
}


def fail_with(gang, what, failing):
    """Returns the outcome of an exception on the ranks in `failing`, and of a later collective."""

    def action():
        if gang.rank in failing:
            if EXCEPTIONS[what] is None:
                torch.empty(1 << 60)
            raise EXCEPTIONS[what]()
        return "done"

    try:
        outcome = raise_together(gang, action)
    except BaseException as e:
        kind, cause = type(e).__name__, e.__cause__
        outcome = kind, "" if isinstance(e, OddError) else str(e).encode("utf8", "replace"), cause
    total = torch.ones(())
    gang.all_reduce(total)
    return outcome, total.item()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("what", EXCEPTIONS)
def test_every_exception_ends_all(pool, what, size):
    last = size - 1
    for rank, (outcome, total) in enumerate(pool(size, fail_with, what, [last])):
        assert total == size
        kind, message, cause = outcome
        assert cause is None
        if rank == last:
            assert kind == what.split(":")[0]
            continue
        assert kind == "GangError"
        start = what.split("[")[0].encode("utf8", "replace")
        assert f"Rank {last} of ProcessGroupGang(rank={rank}, ".encode() in message
        assert b"failed, so this rank stops too: " + start in message


def test_ranks_that_fail_together_raise_their_own(pool):
    found = pool(3, fail_with, "MemoryError: no memory", [0, 2])
    assert [outcome[0] for outcome, _ in found] == ["MemoryError", "GangError", "MemoryError"]
    assert b"Rank 0 of ProcessGroupGang(rank=1, " in found[1][0][1]
    assert [outcome for outcome, _ in pool(3, fail_with, "SystemExit: 3", [])] == ["done"] * 3


def agree(gang, size_of_fact):
    """Compares facts of any size; None if a rank lacks a fact."""
    meet(gang, lambda known: known.update(a="x" * size_of_fact, b=(1, torch.float32), c=None))
    facts = {"a": 1} if gang.rank else {"a": 1, "b": 2}
    with pytest.raises(GangError) as error:
        meet(gang, lambda known: known.update(facts))
    return str(error.value)


@pytest.mark.parametrize("size_of_fact", [0, 100_000])
def test_facts_that_one_rank_lacks(pool, size_of_fact):
    for message in pool(3, agree, size_of_fact):
        assert "agree on b, but disagree: rank 0: 2, rank 1: 'nothing', rank 2: 'noth" in message


def test_facts_go_in_one_round(pool):
    assert pool(4, operations) == [["all_gather", "all_gather"]] * 4


def operations(gang):
    called = []
    with gang.register_collective_hook(lambda name, _: called.append(name) or nullcontext()):
        raise_together(gang, lambda: None)
    return called


def disagree_and_fail(gang):
    """Rank 1 has a different fact, and fails before the next one."""

    def action(facts):
        facts["a"] = gang.rank == 1
        if gang.rank == 1:
            raise ValueError("wrong")
        facts["b"] = 0

    with pytest.raises((GangError, ValueError)) as error:
        meet(gang, action)
    return type(error.value).__name__, str(error.value)


def test_what_ranks_disagree_on_explains_a_failure(pool):
    found = pool(3, disagree_and_fail)
    assert found[1] == ("ValueError", "wrong")
    for kind, message in found[::2]:
        assert kind == "GangError"
        assert "must agree on a, but disagree: rank 0: False, rank 1: True, rank 2: F" in message


def fail_in_a_grid(gang, failing):
    """Ranks in rows and columns of two: each meets its row, and its column hears of it."""
    rows = [gang.create_gang(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [gang.create_gang(ranks) for ranks in ([0, 2], [1, 3])]
    (row,), (column,) = ([part for part in parts if part] for parts in (rows, columns))

    def action(facts):
        facts["row"] = gang.rank // 2  # Only ranks of a row compare facts.
        if gang.rank in failing:
            raise MemoryError(f"no memory on {gang.rank}")
        return gang.rank

    try:
        return meet(row, action, [column])
    except (GangError, MemoryError) as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize("failing", [[0], [3], [1, 2]])
def test_other_gangs_hear_of_a_failure(pool, failing):
    for rank, outcome in enumerate(pool(4, fail_in_a_grid, failing)):
        assert outcome.startswith("MemoryError" if rank in failing else "GangError: Rank ")
        assert "MemoryError: no memory on " in outcome


def test_all_of_a_grid_go_on(pool):
    assert pool(4, fail_in_a_grid, []) == [0, 1, 2, 3]
