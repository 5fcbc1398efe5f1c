"""The layers that `benchmarks/exchange.py` times: their outputs and communication volumes."""

from __future__ import annotations

import pytest
import torch

from token_ids import draw
from turns import Case, measure
from ways import WAYS, our_name

HIDDEN = "DeepSpeed HiddenParallelEmbedding"
N = 96


def measured(gang, case):
    return measure(case, gang)


def run(pool, size, **changes):
    sizes = {"vocab": 40, "dim": 24, "tokens": N, "dtype": "fp32", "ids": "zipf"} | changes
    case = Case(size, **sizes, ways=tuple(WAYS), seconds=0.0)
    return pool(size, measured, case)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_layer_differs_from_that_of_torch(pool, size, dtype):
    # `measure` raises if a layer does.
    found = run(pool, size, vocab=48, dtype=dtype, batch=4)
    assert [row["name"] for row in found["rows"] if row["both"]] == list(WAYS)
    assert all(len(row["forward"]) == 3 for row in found["rows"])


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_distinct_rows_where_a_peer_sends_all(pool, size):
    found = run(pool, size)
    rows = {row["name"]: row for row in found["rows"]}
    sent = {name: row["sent_forward"] for name, row in rows.items()}
    unique = len(draw("zipf", 40, (1, N)).unique())
    assert found["unique"] == unique < 0.85 * N
    assert sent[HIDDEN] == (size - 1) * N * 24 // size * 4
    assert sent[our_name("embed")] <= 1.02 * unique / N * sent[HIDDEN]
    assert sent["Megatron-LM"] == sent["DTensor row-wise"] == 2 * sent[HIDDEN]
    assert sent["nn.Embedding, replicated table"] == 0
    assert all(row["sent_backward"] == 0 for row in rows.values() if row["output"] == "replicated")


def test_a_gradient_that_is_wrong_is_not_timed(pool):
    with pytest.raises(AssertionError, match=r"gradient of .* has an error"):
        pool(2, measured_with_a_wrong_gradient)


def measured_with_a_wrong_gradient(gang):
    case = Case(gang.size, 40, 24, N, "fp32", "zipf", ("wrong",))
    right = WAYS["Megatron-LM"]

    def build(setting):
        layer = right.build(setting)
        layer.weight.register_hook(lambda grad: grad * 1.01)
        return layer

    WAYS["wrong"] = type(right)("wrong", right.who, right.cut, build)
    try:
        measure(case, gang)
    finally:
        del WAYS["wrong"]


def test_zipf_ids_repeat_as_often_as_said():
    shares = {
        (num_ids, count): len(draw("zipf", num_ids, (count,)).unique()) / count
        for num_ids, count in [(2**15, 8192), (2**15, 4096), (2**17, 8192)]
    }
    assert shares == pytest.approx(
        {(2**15, 8192): 0.33, (2**15, 4096): 0.39, (2**17, 8192): 0.39}, abs=0.02
    )
    assert len(draw("uniform", 2**15, (8192,)).unique()) / 8192 == pytest.approx(0.88, abs=0.02)
    sorted_ids = draw("zipf-sorted", 2**15, (8192,))
    assert int(sorted_ids.mode().values) == 0
    assert torch.equal(sorted_ids, draw("zipf-sorted", 2**15, (8192,)))
