"""Random programs give the same results on an engine with sharded tables and on DeepSpeed's engine
of the whole model, or one of our errors.

    PYTHONPATH=tests:tests/support:tests/jobs python THIS_FILE "Program(...)"

runs one again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import strategies as st
from test_programs import INPLACE, check, op, outcome

from engine_programs import EngineSpec, Machine, start_deepspeed
from pool import Pool
from programs import OPTIMIZERS, Op, Program

SIZE = 2


def run(gang: Any, program: Program) -> str:
    start_deepspeed()
    machines = [Machine(program.spec, is_ours) for is_ours in (False, True)]
    try:
        return outcome(program, *machines)
    finally:
        for machine in machines:
            machine.close()
            if dist.get_rank() == 0:
                shutil.rmtree(*machine.directory)


ZERO: dict[str, st.SearchStrategy[Any]] = {
    "reduce_bucket_size": st.sampled_from([20, 50]),
    "contiguous_gradients": st.just(False),
    "overlap_comm": st.just(True),
    "reduce_scatter": st.just(False),
    "round_robin_gradients": st.just(True),
    "offload_optimizer": st.just({"device": "cpu"}),
    "sub_group_size": st.sampled_from([10, 50]),
    "stage3_param_persistence_threshold": st.just(0),
    "stage3_prefetch_bucket_size": st.just(0),
}


@st.composite
def specs(draw: Any) -> EngineSpec:
    rows, stage = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    tp_size = draw(st.sampled_from([1, 2, 2, SIZE]))
    by = "AutoTP" if tp_size == 2 and draw(st.booleans()) else "mpu"
    given = draw(st.sampled_from(["made", "made", "function", "config"]))
    optimizers = list(OPTIMIZERS)[:-1]
    if by == "AutoTP" and given == "made":
        # Its state is as large as layers were before AutoTP cuts them: torch raises.
        optimizers.remove("Adagrad")
    return EngineSpec(
        draw(st.sampled_from(["embed", "vocab"])),
        rows,
        draw(st.integers(1, 7)),
        pad_idx=draw(st.none() | st.integers(-rows, rows - 1)),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        reuse_grad=draw(st.booleans()),
        dedup=draw(st.sampled_from(["auto", True, False])),
        head=draw(st.sampled_from([None, "tied", "biased", "untied"])),
        optimizer=draw(st.sampled_from(optimizers)),
        tp_size=tp_size,
        neighbours=by == "AutoTP" or draw(st.booleans()),
        by=by,
        stage=stage,
        accumulated=draw(st.sampled_from([1, 1, 2])),
        clipping=draw(st.sampled_from([0.0, 0.05, 1.0])),
        given=given,
        zero=tuple(draw(st.fixed_dictionaries({}, optional=ZERO)).items()) if stage else (),
        frozen=draw(st.sampled_from([False] * 7 + [True])),
    )


LOOK_UP = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        "seed": st.integers(0, 5),
    },
    optional={
        "ids": st.sampled_from(["int32", "uint8", "int16"]),
        "layout": st.sampled_from(["strided", "transposed"]),
        "hook": st.just(True),
        "inplace": INPLACE,
    },
)


def train(*modes: str) -> st.SearchStrategy[Op]:
    needed = {"looked_up": st.lists(LOOK_UP, min_size=1, max_size=3).map(tuple)}
    others = {
        "loss": st.sampled_from(["cross entropy", "of the head"]),
        "arrives": st.sampled_from(["expanded", "transposed", "every other", "split"]),
        "inplace": INPLACE,
        "mode": st.sampled_from(modes),
    }
    return st.tuples(st.just("train"), st.fixed_dictionaries(needed, optional=others))


# The first of two micro-batches may stay on its rank.
MODES = "backward", "of torch", "retained"
FIRST, LAST, STEP = train("no_sync", *MODES), train(*MODES), op("step")
OTHERS = st.one_of(
    op("read"),
    op("write", moments=st.booleans()),
    op("save", anew=st.booleans(), changed=st.booleans()),
    op("consolidate"),
    op("save_whole"),
    train("eval"),
    op("rate"),
)


@st.composite
def programs(draw: Any) -> Program:
    spec = draw(specs())
    turn = st.tuples(
        st.lists(OTHERS, max_size=1),
        *[part.map(lambda one: [one]) for part in (FIRST, STEP) * (spec.accumulated - 1)],
        LAST.map(lambda one: [one]),
        st.lists(op("read"), max_size=1),
        STEP.map(lambda one: [one]),
        st.lists(op("read"), max_size=1),
    ).map(lambda parts: [*chain(*parts)])
    turns = draw(st.lists(turn, min_size=1, max_size=3))
    return Program(spec, SIZE, (("initialize", {}), *chain(*turns)))


@pytest.fixture(scope="module")
def engines() -> Iterator[Pool]:
    """A separate pool, since DeepSpeed changes its processes."""
    pool = Pool(SIZE)
    yield pool
    pool.stop()


def test_any_program_comes_to_the_same_or_is_refused(engines):
    check(engines, 20, programs(), run)


@pytest.mark.nightly
def test_hundreds_of_programs_come_to_the_same_or_are_refused(engines):
    check(engines, 500, programs(), run)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("kind", "rows", "dim"), [("vocab", 1, 4), ("embed", 4, 1)])
def test_reads_of_an_empty_shard(engines, stage, kind, rows, dim):
    spec = EngineSpec(kind, rows, dim, stage=stage, optimizer="AdamW")
    train = "train", {"looked_up": ({"shape": (2,), "seed": 0},)}
    ops = train, ("read", {}), ("step", {}), ("read", {}), ("write", {"moments": True}), train
    program = Program(spec, SIZE, (("initialize", {}), ("read", {}), *ops, ("save", {})))
    assert engines(SIZE, run, program) == ["same"] * SIZE


def test_sub_groups_that_differ_are_refused(engines):
    spec = EngineSpec("embed", 4, 3, stage=3, optimizer="AdamW", zero=(("sub_group_size", 50),))
    for seen in engines(SIZE, run, Program(spec, SIZE, (("initialize", {}),))):
        assert "refused: ValueError: `zero_optimization.sub_group_size` must make" in seen


def test_empty_shards_are_refused_at_zero3(engines):
    spec = EngineSpec("vocab", 1, 4, stage=3, optimizer="AdamW")
    for seen in engines(SIZE, run, Program(spec, SIZE, (("initialize", {}),))):
        assert "refused: ValueError: The table 'embed' must have a row on each of 2" in seen


@pytest.mark.parametrize("op", ["save_whole", "consolidate"])
@pytest.mark.parametrize(
    ("by", "stage", "refused"),
    [("mpu", 1, True), ("mpu", 3, True), ("AutoTP", 2, True), ("AutoTP", 3, False)],
)
def test_whole_models_are_whole_or_refused(engines, by, stage, refused, op):
    if op == "consolidate":  # DeepSpeed refuses this one for an mpu, except at ZeRO 3.
        refused = (by, stage) == ("mpu", 3)
    spec = EngineSpec("vocab", 5, 4, head="tied", by=by, stage=stage)
    train = "train", {"looked_up": ({"shape": (2,), "seed": 0},)}
    for seen in engines(SIZE, run, Program(spec, SIZE, (("initialize", {}), train, (op, {})))):
        if refused:
            assert "`tp_embed.integrations.deepspeed.export()` must save the whole model" in seen
        else:
            assert seen == "same" or ((by, stage) == ("mpu", 1) and seen.startswith("both raised"))


def main() -> None:
    program = eval(sys.argv[1])
    pool = Pool(SIZE)
    print(*pool(program.size, run, program), sep="\n")
    pool.stop()


if __name__ == "__main__":
    main()
