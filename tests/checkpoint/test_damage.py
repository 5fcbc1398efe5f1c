"""Damaged checkpoints of every format give a named error and no output, or a complete output. The
damage is random, with seeds from the test's parameters."""

import pickle
import random
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tp_embed.checkpoint import CheckpointError, Request, Rule, UnsafeCheckpointError, convert, read
from tp_embed.checkpoint.contents import ReadOptions
from tp_embed.checkpoint.formats import FORMATS

RULES = ReadOptions(
    rules=tuple(map(Rule.parse, ("embed_tokens.weight=vocab", "layer.weight=0", "*=replicated")))
)
ROUNDS, DAMAGES = 6, 40


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Writes a small checkpoint in each format, with optimizer state if the format holds it."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(8, 4), "layer": torch.nn.Linear(4, 4)}
    )
    optimizer = torch.optim.AdamW(model.named_parameters())
    model.layer(model.embed_tokens(torch.arange(8))).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    torch.save(state, root / "source.pt")
    return {name: convert_to(root / "source.pt", root / f"{name}.pt", name, 2) for name in FORMATS}


def convert_to(source, output, name, tp_size=1):
    convert(source, output, Request(to=name, tp_size=tp_size, dim="vocab", read=RULES))
    return output


@contextmanager
def limits(seconds, nbytes):
    """Fails if the block takes too long or too much memory."""

    def stop(signum, frame):
        raise TimeoutError(f"It has taken more than {seconds} s.")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, old[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def damage(path, rng):
    """Damages one file of the checkpoint ``path``, and returns how."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    size = len(content)
    kind = rng.choice(
        ["flip", "flip", "flip", "cut", "add", "zero", "swap", "other", "gone", "set"]
    )
    at = rng.randrange(size) if size else 0
    if rng.random() < 0.5:  # Near the start, where headers are.
        at = min(at, rng.randrange(1, 200))
    if kind == "flip" and size:
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[min(size - 1, at + rng.randrange(16))] ^= 1 << rng.randrange(8)
    elif kind == "set" and size:  # Numbers at their limits.
        value = rng.choice(
            [b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8, b"9" * 8, b"-1", b"../.."]
        )
        content[at : at + len(value)] = value
    elif kind == "cut":
        del content[at:]
    elif kind == "add":
        content[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    elif kind == "zero":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "swap":
        other = rng.randrange(size) if size else 0
        content[at : at + 16], content[other : other + 16] = (
            content[other : other + 16],
            content[at : at + 16],
        )
    elif kind == "other":
        content = bytearray(rng.choice(files).read_bytes())
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{kind} at {at} of {size} in {file.relative_to(path.parent)}"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, ROUNDS))]
)
def test_damage_gives_a_named_error_or_a_whole_output(checkpoints, tmp_path, name, seed):
    rng = random.Random(f"{name} {seed}")
    source, damaged = checkpoints[name], tmp_path / checkpoints[name].name
    output = tmp_path / "output.pt"
    refused = 0
    for _ in range(DAMAGES):
        shutil.copytree(source, damaged) if source.is_dir() else shutil.copy(source, damaged)
        what = damage(damaged, rng)
        try:
            with limits(20, 2**30):
                convert(damaged, output, Request(to="pt", source_format=name, read=RULES))
        except CheckpointError as e:
            refused += 1
            message, left = str(e), list(tmp_path.iterdir())
        except BaseException as e:
            e.add_note(f"{name}, seed {seed}: {what}")
            raise
        else:
            message = ""
            assert read(output, ReadOptions()).tensors, what
            output.unlink()
            left = [damaged]
        assert left in ([damaged], []), (what, message)
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink(missing_ok=True)
    assert refused > DAMAGES // 4


class Attack:
    """Runs code when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


PICKLED = ["pt", "dcp", "deepspeed", "universal", "megatron", "fairseq2"]


@pytest.mark.parametrize("name", PICKLED)
def test_no_code_of_a_pickle_is_run(checkpoints, tmp_path, name):
    source, hostile, mark = checkpoints[name], tmp_path / "hostile.pt", tmp_path / "mark"
    shutil.copytree(source, hostile) if source.is_dir() else shutil.copy(source, hostile)
    files = [hostile] if hostile.is_file() else sorted(hostile.rglob("*"))
    attacked = 0
    for file in files:
        if file.suffix not in (".pt", ".distcp") and file.name != ".metadata":
            continue
        content = file.read_bytes()
        if file.name == ".metadata":
            file.write_bytes(pickle.dumps(Attack(mark)))
        else:
            torch.save({"model": Attack(mark)}, file)
        if file.suffix == ".distcp":  # A part of it is read, from where an archive was.
            file.write_bytes(file.read_bytes().ljust(len(content), b"\0"))
        for to in ("pt", "hf"):
            with pytest.raises(CheckpointError) as error:
                convert(hostile, tmp_path / "out", Request(to=to, source_format=name, read=RULES))
            assert file.suffix == ".distcp" or isinstance(error.value, UnsafeCheckpointError)
        file.write_bytes(content)
        attacked += 1
    assert attacked
    assert not mark.exists()
    assert sorted(tmp_path.iterdir()) == [hostile]
    convert(hostile, tmp_path / "out", Request(to="pt", source_format=name, read=RULES))


@pytest.mark.parametrize("name", ["hf", "tp-embed", "deepspeed", "universal"])
def test_no_name_leaves_its_directory(checkpoints, tmp_path, name):
    """The named file exists, so that nothing else can cause the error."""
    hostile = tmp_path / "deep" / "hostile"
    if name == "hf":
        request = Request(to="hf", max_shard_size=64, read=RULES)
        convert(checkpoints["pt"], hostile, request)
    else:
        shutil.copytree(checkpoints[name], hostile)
    files = [file for file in hostile.iterdir() if file.is_file() and file.suffix != ".safetensors"]
    [file] = [file for file in files if not file.name.endswith("_model_states.pt")]
    text = file.read_text()
    tried = 0
    for entry in sorted(hostile.iterdir(), key=lambda entry: -len(entry.name)):
        for place in ("../", f"{tmp_path}/", "x/../../"):
            (hostile / "x").mkdir(exist_ok=True)
            if entry.name in text:
                target = hostile / f"{place}{entry.name}"
                shutil.copytree(entry, target) if entry.is_dir() else shutil.copy(entry, target)
                file.write_text(text.replace(entry.name, f"{place}{entry.name}"))
                with pytest.raises(UnsafeCheckpointError):
                    convert(
                        hostile, tmp_path / "out", Request(to="pt", source_format=name, read=RULES)
                    )
                shutil.rmtree(target) if target.is_dir() else target.unlink()
                file.write_text(text)
                tried += 1
    assert tried
    assert not (tmp_path / "out").exists()
