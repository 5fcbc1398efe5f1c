"""Conversions change or drop nothing silently."""

import json
import multiprocessing
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tp_embed.checkpoint import (
    CheckpointError,
    ReadOptions,
    Request,
    Rule,
    UnsafeCheckpointError,
    convert,
    differences,
    plan,
    read,
)
from tp_embed.checkpoint.files import arrays
from tp_embed.checkpoint.files.safetensors_file import lay_out


def saved(tmp_path, value, name="source.pt"):
    path = tmp_path / name
    torch.save(value, path)
    return path


def converted(source, to="pt", **request):
    """Converts a file and returns the state dict."""
    output = source.with_name(f"{to}.pt")
    convert(source, output, Request(to=to, **request), verify=True, overwrite=True)
    if to != "pt":
        end = source.with_name("end.pt")
        convert(output, end, Request(to="pt"), overwrite=True)
        output = end
    return torch.load(output)["model"]


def rules(*texts):
    return ReadOptions(rules=tuple(map(Rule.parse, texts)))


@pytest.mark.parametrize("to", ["pt", "hf", "tp-embed", "dcp", "universal", "megatron"])
def test_tensors_of_all_kinds_arrive(tmp_path, to):
    base = torch.randn(6, 8)
    state = {
        "dense": base.clone(),
        "transposed": torch.randn(5, 7).t(),
        "columns": base[:, 2:5],
        "rows": base[1:4],
        "steps": base[::2, ::3],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor([2**53 + 1, -1]),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3).half(),
        "odd name\n/é": torch.randn(2),
    }
    if to == "universal":  # Names become directories.
        state.pop("odd name\n/é")
        state.pop("half")  # Parameters are in fp32.
    found = converted(saved(tmp_path, state), to)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_what_fp32_cannot_hold_is_no_universal_checkpoint(tmp_path, dtype):
    source = saved(tmp_path, {"w": torch.ones(2, dtype=dtype)})
    if dtype.is_complex:
        assert torch.equal(converted(source, "universal")["w"], torch.ones(2, dtype=dtype))
    else:
        with pytest.raises(CheckpointError, match=r"must be in fp32 .* Pass `--dtype float32`"):
            convert(source, tmp_path / "out", Request(to="universal"))


def trained(tmp_path, values, master, **state):
    """Creates a checkpoint with a master copy of one weight."""
    return saved(
        tmp_path,
        {
            "model": {"w": values},
            "optimizer": {
                "state": {0: {"fp32": master, **state}},
                "param_groups": [{"lr": 0.1, "params": [0], "param_names": ["w"]}],
            },
        },
    )


def test_other_dtypes_are_cast_from_masters(tmp_path):
    master = torch.tensor([1.001, -3.003])
    source = trained(tmp_path, master.bfloat16(), master)
    assert torch.equal(converted(source)["w"], master.bfloat16())
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(converted(source, dtype=dtype)["w"], master.to(dtype))


def test_a_master_that_is_not_its_weight_is_kept(tmp_path):
    source = trained(tmp_path, torch.tensor([5.0]), torch.tensor([1.001]))
    convert(source, tmp_path / "out.pt", Request(to="pt"))
    found = torch.load(tmp_path / "out.pt")
    assert found["model"]["w"] == 5
    assert found["optimizer"]["state"][0]["fp32"] == torch.tensor(1.001)


def test_a_state_cannot_take_the_place_of_its_weight(tmp_path):
    source = trained(tmp_path, torch.zeros(1), torch.zeros(1), weight=torch.ones(1))
    with pytest.raises(CheckpointError, match="must not have a state called `weight`"):
        convert(source, tmp_path / "out.pt", Request(to="pt"))
    convert(source, tmp_path / "out", Request(to="hf"))  # It holds no optimizer.


def test_what_is_left_out_is_named(tmp_path):
    state = {
        "model": {"w": torch.ones(1), "_extra": {"a": 1}},
        "ema": {"w": torch.zeros(1)},
        "step": torch.tensor(5),
        "epoch": 3,
        "optimizer": {
            "state": {0: {"row": torch.ones(1, 2), "count": 3}},
            "param_groups": [{"params": [0], "param_names": ["w"]}],
        },
    }
    checkpoint = read(saved(tmp_path, state), ReadOptions())
    assert checkpoint.step == 5
    notes = "\n".join(checkpoint.notes)
    for name in ("`_extra`", "`ema`", "`epoch`", "`count` of `w`", "w (row)"):
        assert name in notes


def test_unnamed_optimizers_do_not_block_what_has_none(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.NAdam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    source = saved(tmp_path, state)
    assert torch.equal(converted(source, "hf")["weight"], model.weight)
    with pytest.raises(CheckpointError, match="must say the names of its 2 Parameters"):
        convert(source, tmp_path / "out", Request(to="pt"))
    weights = Request(to="pt", read=ReadOptions(with_optimizer=False))
    convert(source, tmp_path / "weights.pt", weights)
    assert "optimizer" not in torch.load(tmp_path / "weights.pt")


def test_a_mapping_without_tensors_is_not_the_model(tmp_path):
    state = {"model": {"layers": 2}, "state_dict": {"w": torch.ones(1)}}
    assert read(saved(tmp_path, state), ReadOptions()).names == ["w"]


def test_rules_of_tables_are_followed_when_they_are_written(tmp_path):
    source = saved(tmp_path, {"embed_tokens.weight": torch.randn(6, 2)})
    request = Request(to="tp-embed", tp_size=2, read=rules("embed_tokens.weight=0:4,2"))
    [cut] = plan(source, request).target.cuts.values()
    assert cut.ranges == ((range(2), range(4, 5)), (range(2, 4), range(5, 6)))


def test_padding_is_cut_off_the_bias_of_a_head_too(tmp_path):
    state = {"lm_head.weight": torch.randn(8, 2), "lm_head.bias": torch.randn(8)}
    found = converted(saved(tmp_path, state), vocab_size=5)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "lm_head.weight": (5, 2),
        "lm_head.bias": (5,),
    }


def test_a_cut_of_a_padded_table_is_that_of_the_rest(tmp_path):
    source = saved(tmp_path, {"embed_tokens.weight": torch.randn(10, 4)})
    convert(source, tmp_path / "padded", Request(to="tp-embed", tp_size=2, dim="vocab"))
    request = Request(to="tp-embed", tp_size=2, vocab_size=7)
    convert(tmp_path / "padded", tmp_path / "cut", request, verify=True)
    found = converted(tmp_path / "cut")["embed_tokens.weight"]
    assert torch.equal(found, torch.load(source)["embed_tokens.weight"][:7])


def test_differences_beside_tensors_are_found(tmp_path):
    def state(lr, **model):
        groups = [{"lr": lr, "betas": (0.9, 0.99), "params": [0], "param_names": ["a"]}]
        return {"model": model, "optimizer": {"state": {}, "param_groups": groups}}

    one = torch.ones(2)
    first = read(saved(tmp_path, state(0.1, a=one, b=one), "a.pt"), ReadOptions())
    second = read(saved(tmp_path, state(0.5, a=one), "b.pt"), ReadOptions())
    found = [str(each) for each in differences(first, second)]
    assert found[0].startswith("b: is another name of `a`, and missing in")
    assert "a (lr): is 0.1 and 0.5" in found
    assert list(differences(first, first)) == []


def test_lazy_conjugates_are_refused(tmp_path):
    for tensor in (torch.ones(2, dtype=torch.complex64).conj(),):
        with pytest.raises(CheckpointError, match=r"Save it with `resolve_conj\(\)`"):
            read(saved(tmp_path, {"w": tensor}), ReadOptions())
        with pytest.raises(CheckpointError, match=r"Save it with `resolve_conj\(\)`"):
            read(saved(tmp_path, {"w": tensor.imag}), ReadOptions())


def test_numbers_in_another_byte_order_are_refused(tmp_path):
    source = saved(tmp_path, {"w": torch.ones(2)})
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"big" if name.endswith("/byteorder") else content)
    with pytest.raises(CheckpointError, match="in the byte order of this machine, little"):
        read(source, ReadOptions())


class Bomb:
    """A small pickle that allocates many bytes."""

    def __reduce__(self):
        return bytearray, (10**9,)


def test_a_file_cannot_ask_for_any_number_of_bytes(tmp_path):
    source = saved(tmp_path, {"model": {"w": torch.ones(1)}, "more": Bomb.__reduce__(Bomb())[0]})
    with pytest.raises(UnsafeCheckpointError, match=r"builtins\.bytearray"):
        read(source, ReadOptions())
    nested = [1]
    for _ in range(12):
        nested = [nested] * 10  # A small pickle, and a text of 10**12 characters.
    source = saved(tmp_path, {"model": {"w": torch.ones(1)}, "more": nested})
    assert len("".join(read(source, ReadOptions()).notes)) < 500


def test_a_transposed_table_is_not_read_many_times(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**16)
    table = torch.randn(64, 8192).t()
    source = saved(tmp_path, {"w": table})
    before = read_bytes()
    assert torch.equal(converted(source)["w"], table)
    assert read_bytes() - before < 16 * table.nbytes


def grow(connection, source, output, request):
    """Converts, and sends the growth of the process's peak memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = peak()
    convert(source, output, request)
    connection.send(peak() - before)


def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize(
    ("to", "dim"), [("tp-embed", "vocab"), ("tp-embed", "embed"), ("dcp", "vocab"), ("pt", "vocab")]
)
def test_memory_does_not_grow_with_the_table(tmp_path, to, dim):
    source = tmp_path / "table.safetensors"
    shape = (131_072, 1024)  # 512 MiB, none of it on disk.
    lay_out(source, {"embed_tokens.weight": (shape, torch.float32)})
    request = Request(to=to, tp_size=4 if to == "tp-embed" else None, dim=dim)
    saved(tmp_path, {"w": torch.ones(1)})
    converted(tmp_path / "source.pt", "dcp")  # Imports everything, here and in the process.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=grow, args=(sender, source, tmp_path / "output", request))
    process.start()
    assert receiver.poll(120)
    assert receiver.recv() < 128 * 2**20
    process.join(60)
    assert process.exitcode == 0
    shutil.rmtree(tmp_path)


def read_bytes():
    """Returns the number of bytes this process has read."""
    text = Path("/proc/self/io").read_text()
    return int(text.partition("rchar: ")[2].split()[0])


def test_steps_that_no_format_could_hold_are_refused(tmp_path):
    for step in (-1, True, 10**20, "3"):
        source = saved(tmp_path, {"model": {"w": torch.ones(1)}, "step": step})
        with pytest.raises(CheckpointError, match=r"The step in .* must be a number from 0 on"):
            read(source, ReadOptions())


def test_a_changed_config_is_not_resumed_with_the_old_one(tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps({"a": 1}))
    source = saved(tmp_path, {"w": torch.ones(1)})
    request = Request(to="hf", hf_config=config)
    first = plan(source, request).identity
    assert plan(os.path.relpath(source), request).identity == first
    (config / "config.json").write_text(json.dumps({"a": 2}))
    assert plan(source, request).identity != first


def test_an_output_inside_its_source_is_refused(tmp_path):
    source = tmp_path / "source"
    convert(saved(tmp_path, {"weight": torch.zeros(4, 2)}), source, Request(to="dcp"))
    with pytest.raises(CheckpointError, match=re.escape(f"the source `{source}`. Choose another")):
        convert(source, source / "output", Request(to="dcp"))
    assert not (source / "output").exists()
