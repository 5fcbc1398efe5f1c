"""Random programs give the same as with `nn.Embedding` and `nn.Linear`, or one of our errors.

    PYTHONPATH=tests/support python tests/test_programs.py "Program(...)"

runs one again.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from compatibility import plain
from model_matrix import is_ours
from parity import bits
from programs import OPTIMIZERS, Machine, Op, Program, Seen, Spec

TOLERANCES = {"float32": 2e-5, "float64": 1e-10, "bfloat16": 5e-2}


def run(gang: Any, program: Program) -> str:
    """Returns the outcome of ``program`` on this rank: "same", "both raised: ...", "refused: ..."
    or "FAILED ..."."""
    return outcome(program, Machine(program.spec), Machine(program.spec, gang))


def outcome(program: Program, expected: Any, found: Any) -> str:
    """Runs ``program`` on two machines, one after the other, and returns the outcome."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    references = _attempts(expected, program.ops)
    found_ones = _attempts(found, program.ops[: len(references)])
    for step, (reference, ours) in enumerate(zip(references, found_ones)):  # noqa: B905
        where = f"at {step}, {program.ops[step]}: "
        if isinstance(ours, Exception) and isinstance(reference, Exception):
            return f"both raised: {_text(reference)}"
        if isinstance(reference, NotImplementedError):
            return "torch cannot"  # Add up sparse gradients in bf16.
        if isinstance(reference, Exception):
            return f"FAILED {where}torch raises {_text(reference)}, ours does not"
        if isinstance(ours, Exception):
            kind = "refused: " if is_ours(ours) else "FAILED " + where
            return f"{kind}{_text(ours)}"
        if different := _different(program, found, ours, reference):
            return f"FAILED {where}{different}"
    return "same"


def _attempts(machine: Any, ops: Sequence[Op]) -> list[Seen | Exception]:
    """Returns the observations after each operation, up to the first that raises."""
    seen: list[Seen | Exception] = []
    for op in ops:
        try:
            seen.append({k: v if v is None else v.clone() for k, v in machine.run(op).items()})
        except Exception as error:
            return [*seen, error]
    return seen


def _text(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({last.filename[-40:]})"


def _different(program: Program, ours: Any, found: Seen, expected: Seen) -> str:
    for name, whole in expected.items():
        value = found[name]
        if whole is None or value is None:
            if whole is not value:
                return f"{name} is {value} for {whole}"
            continue
        whole = ours.part(whole) if name.startswith("part") else whole
        whole = whole.to_dense()
        value = plain(value)
        if (value.shape, value.dtype) != (whole.shape, whole.dtype):
            return f"{name} is {value.shape} {value.dtype} for {whole.shape} {whole.dtype}"
        if program.exact and torch.equal(bits(value), bits(whole)):
            continue
        tolerance = 0.0 if program.exact else TOLERANCES[program.spec.dtype]
        largest = max([1.0, *whole.abs().flatten().tolist()])
        if program.exact or not torch.allclose(value, whole, tolerance, tolerance * largest):
            return f"{name} is\n{value} for\n{whole}"
    return ""


@st.composite
def specs(draw: Any) -> Spec:
    kind = draw(st.sampled_from(["standard", "embed", "vocab"]))
    rows = draw(st.integers(1, 9))
    sparse, reuse_grad = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    outputs = {"standard": [], "embed": ["sequence", "shard"], "vocab": ["sequence"]}[kind]
    output = draw(st.sampled_from(["replicated", "replicated", *outputs]))
    heads = [None] if sparse or output != "replicated" else [None, "tied", "biased"]
    optimizers = ["SparseAdam", "SGD", "Adagrad"] if sparse else list(OPTIMIZERS)[:-1]
    return Spec(
        kind,
        rows,
        draw(st.integers(1, 7)),
        pad_idx=draw(st.none() | st.integers(-rows, rows - 1)),
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "bfloat16"])),
        sparse=sparse,
        reuse_grad=reuse_grad,
        scale=draw(st.sampled_from([None, None, 2.0, 0.3])),
        output=output,
        dedup=draw(st.sampled_from(["auto", True, False])),
        head=draw(st.sampled_from(heads)),
        optimizer=draw(st.sampled_from(optimizers)),
    )


def op(name: str, **arguments: Any) -> st.SearchStrategy[Op]:
    return st.tuples(st.just(name), st.fixed_dictionaries({}, optional=arguments))


def _of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def _possible(op: Op) -> Op:
    """Drops what torch cannot do: a full backward hook makes the output an immutable view."""
    name, arguments = op
    if arguments.get("hook") == "full backward":
        arguments = {key: value for key, value in arguments.items() if key != "inplace"}
    return name, arguments


INPLACE = _of("mul_", "+=", "masked", "relu_", "of a view", "copy_")
LOOK_UP = st.tuples(
    st.just("look_up"),
    st.fixed_dictionaries(
        {"shape": st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)},
        optional={
            "seed": st.integers(0, 5),
            "ids": _of("int32", "uint8", "int16"),
            "layout": _of("strided", "transposed"),
            "mode": _of(
                "no_grad",
                "inference_mode",
                "checkpoint",
                "autocast",
                "functional_call",
                "functional_call of the same",
            ),
            "hook": _of("tensor", "retained", "forward", "forward pre", "full backward"),
            "inplace": INPLACE,
            "arrives": _of("expanded", "transposed", "every other", "split", "squared"),
        },
    ),
).map(_possible)
# torch refuses the last two, which ends the program.
MODES = ["autograd.grad", "second order", "retained twice"]
BACKWARD = op("backward", mode=_of(*MODES * 7, "ids changed", "twice"))
CLIP = op("clip", by=_of("torch", "tp_embed"), norm=_of(1.0, 2.0, float("inf")))
STEP = op("step")
ZERO = op("zero_grad", set_to_none=st.booleans())
OTHERS = st.one_of(
    op("copy", how=_of("pickle", "state dict", "assigned state dict")),
    op("hook_weight"),
    op("freeze", frozen=st.booleans()),
)


def _some(ops: st.SearchStrategy[Op], at_least: int, at_most: int) -> st.SearchStrategy[list[Op]]:
    return st.lists(ops, min_size=at_least, max_size=at_most)


# A typical loop, with operations left out or inserted.
TURN = st.tuples(
    _some(OTHERS, 0, 1),
    _some(LOOK_UP, 1, 3),
    _some(BACKWARD, 1, 1),
    _some(CLIP, 0, 1),
    _some(STEP, 0, 1),
    _some(ZERO, 0, 1),
).map(lambda parts: [*chain(*parts)])
OPS = st.lists(TURN, min_size=1, max_size=4).map(lambda turns: tuple(chain(*turns)))
PROGRAMS = st.builds(Program, specs(), st.integers(1, 3), OPS)


def check(pool: Any, examples: int, programs: Any = PROGRAMS, run: Any = run) -> None:
    @settings(max_examples=examples, print_blob=True)
    @given(programs)
    def any_program(program: Program) -> None:
        outcomes = pool(program.size, run, program)
        event(outcomes[0].split("(")[0][:120])
        if any("failed on rank" in outcome for outcome in outcomes):
            pool.stop()  # The ranks may be at different collectives.
        assert not any(o.startswith("FAILED") for o in outcomes), f"{program}\n{outcomes}"
        assert len(set(outcomes)) == 1, f"{program}\n{outcomes}"

    any_program()


def test_any_program_comes_to_the_same_or_is_refused(pool):
    check(pool, 100)


@pytest.mark.nightly
def test_thousands_of_programs_come_to_the_same_or_are_refused(pool):
    check(pool, 2000)


def main() -> None:
    from pool import Pool

    program = eval(sys.argv[1])
    pool = Pool()
    print(*pool(program.size, run, program), sep="\n")
    pool.stop()


if __name__ == "__main__":
    main()
