"""Output appears complete or not at all, even if processes are killed or file systems fill up."""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tp_embed.checkpoint import (
    CheckpointError,
    ReadOptions,
    Request,
    convert,
    differences,
    read,
    staging,
)
from tp_embed.checkpoint.files import arrays
from tp_embed.checkpoint.files.torch_file import placeholder
from tp_embed.checkpoint.staging import staged

# 24 tensors of 1 MiB: more than one flush of the journal, which comes sooner in these tests.
COUNT, ROWS, COLUMNS = 24, 512, 512


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.pt"
    generator = torch.Generator().manual_seed(0)
    placeholder((), torch.float32)  # Imports what the processes need.
    torch.save(
        {f"w{i}": torch.randn(ROWS, COLUMNS, generator=generator) for i in range(COUNT)}, path
    )
    return path


def run(progress, source, output, flags, to):
    # Ignored if the tests run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    staging._FLUSH_BYTES = 2 * 2**20
    arrays.CHUNK_BYTES = 2**18  # Most are killed in the middle of a tensor.
    request = Request(to=to, source_format="pt")

    def report(nbytes):
        progress.send(nbytes)
        time.sleep(0.005)

    convert(source, output, request, progress=report, **dict.fromkeys(flags, True))


class Run:
    """A conversion in a process of its own."""

    def __init__(self, source, output, *flags, to="pt"):
        context = multiprocessing.get_context("fork")
        self.progress, progress = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(progress, source, output, flags, to))
        self.process.start()
        progress.close()

    def wait_for(self, count):
        """Waits until ``count`` parts of 256 KiB are written."""
        for _ in range(count):
            assert self.progress.poll(60)
            self.progress.recv()

    def end(self, signum=None):
        if signum:
            os.kill(self.process.pid, signum)
        with suppress(EOFError):
            while True:
                self.progress.recv()
        self.process.join(60)
        return self.process.exitcode


def kill_after(count, *args):
    run = Run(*args)
    run.wait_for(count)
    assert run.end(signal.SIGKILL) == -signal.SIGKILL


def assert_same(source, output):
    expected, found = torch.load(source), torch.load(output)["model"]
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_killed_run_leaves_nothing_and_is_resumed(source, tmp_path):
    output = tmp_path / "out.pt"
    kill_after(47, source, output)
    assert not output.exists()
    written = (tmp_path / ".out.pt.partial" / "journal").read_text().splitlines()[1:]
    assert 32 < len(written) <= 49
    assert Run(source, output, "resume", "verify").end() == 0
    assert names(tmp_path) == ["out.pt"]
    assert_same(source, output)


def test_only_what_a_killed_run_has_not_written_is_written_by_the_next(source, tmp_path):
    output = tmp_path / "out.pt"
    kill_after(47, source, output)
    partial = tmp_path / ".out.pt.partial" / "out.pt"
    names_written = (partial.parent / "journal").read_text().splitlines()[1:]
    marked, *_ = json.loads(names_written[1])  # After a line with the names of the files.
    # A mark in the output shows that resuming leaves it alone; --verify would find it.
    row = torch.load(source)[marked][0]
    offset = partial.read_bytes().index(row.numpy().tobytes())
    with partial.open("r+b") as file:
        file.seek(offset)
        file.write(b"\1\2\3\4")
    assert Run(source, output, "resume").end() == 0
    found = torch.load(output)["model"][marked]
    assert bytes(found[0, :1].view(torch.uint8).tolist()) == b"\1\2\3\4"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        pass


@pytest.mark.parametrize("is_directory", [False, True])
def test_a_run_killed_while_names_change_is_not_resumed_with_the_old_output(
    source, tmp_path, is_directory
):
    """The partial directory then holds the previous output."""
    output = tmp_path / "out"
    if is_directory:
        output.mkdir()
        (output / "model.safetensors").write_bytes(b"old")
        (output / "other").write_bytes(b"old")
    else:
        torch.save({"old": torch.ones(3)}, output)
    before = output.stat().st_ino
    run = Run(source, output, "overwrite", to="hf" if is_directory else "pt")
    wait_until(lambda: output.stat().st_ino != before)
    run.end(signal.SIGKILL)
    to = "hf" if is_directory else "pt"
    assert Run(source, output, "overwrite", "resume", to=to).end() == 0
    found = read(output, ReadOptions(), to)
    assert list(differences(read(source, ReadOptions(), "pt"), found)) == []


def test_a_run_is_not_resumed_in_other_files(source, tmp_path):
    output = tmp_path / "out.pt"
    kill_after(47, source, output)
    (tmp_path / ".out.pt.partial" / "out.pt").unlink()
    with pytest.raises(
        CheckpointError, match="must hold the files that the interrupted run created"
    ):
        convert(source, output, Request(to="pt", source_format="pt"), resume=True)
    assert not output.exists()


def test_a_source_that_changes_meanwhile_is_refused(source, tmp_path):
    changing, output = tmp_path / "source.pt", tmp_path / "out.pt"
    changing.write_bytes(source.read_bytes())
    request = Request(to="pt", source_format="pt")
    with pytest.raises(CheckpointError, match="must not change while it is converted"):
        convert(changing, output, request, progress=lambda nbytes: os.utime(changing))
    assert names(tmp_path) == ["source.pt"]


@pytest.mark.parametrize("count", [1, 47, 4 * COUNT])
def test_a_killed_run_leaves_the_old_output_whole(source, tmp_path, count):
    output = tmp_path / "out.pt"
    torch.save({"old": torch.ones(3)}, output)
    kill_after(count, source, output, "overwrite")
    assert list(torch.load(output)) == ["old"] or count == 4 * COUNT
    assert Run(source, output, "overwrite", "resume").end() == 0
    assert_same(source, output)
    assert names(tmp_path) == ["out.pt"]


def test_an_interrupted_run_is_resumed(source, tmp_path):
    output = tmp_path / "out.pt"
    interrupted = Run(source, output)
    interrupted.wait_for(47)
    assert interrupted.end(signal.SIGINT) == 1
    assert names(tmp_path) == [".out.pt.partial"]
    assert Run(source, output, "resume").end() == 0
    assert_same(source, output)


def test_another_conversion_is_not_resumed(source, tmp_path):
    output = tmp_path / "out.pt"
    kill_after(47, source, output)
    request = Request(to="pt", source_format="pt", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="must come from the same conversion"):
        convert(source, output, request, resume=True)
    convert(source, output, request)
    assert torch.load(output)["model"]["w0"].dtype == torch.bfloat16
    assert names(tmp_path) == ["out.pt"]


def test_two_runs_do_not_write_one_output(source, tmp_path):
    output = tmp_path / "out.pt"
    other = Run(source, output)
    other.wait_for(1)
    with pytest.raises(CheckpointError, match="another is writing it"):
        convert(source, output, Request(to="pt", source_format="pt"))
    assert other.end() == 0
    assert_same(source, output)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system with 16 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_disk_that_is_too_small_is_refused_before_writing(source, small_disk):
    with pytest.raises(CheckpointError, match=r"must have 25\d{6} bytes free.*but has 16"):
        convert(source, small_disk / "out.pt", Request(to="pt", source_format="pt"))
    assert names(small_disk) == []


def test_a_disk_that_fills_up_leaves_the_old_output(source, small_disk, tmp_path):
    small = tmp_path / "small.pt"
    torch.save({f"w{i}": torch.ones(512, 1024) for i in range(5)}, small)  # 10 MiB
    output = small_disk / "out.pt"
    torch.save({"old": torch.ones(3)}, output)

    def fill(nbytes):  # Another process takes the space.
        if not (small_disk / "other").exists():
            (small_disk / "other").write_bytes(b"\1" * (10 * 2**20))

    with pytest.raises(CheckpointError, match=r"has not been written.*is full. Free some"):
        convert(small, output, Request(to="pt", source_format="pt"), overwrite=True, progress=fill)
    assert list(torch.load(output)) == ["old"]
    assert names(small_disk) == ["other", "out.pt"]


def test_a_read_only_disk_is_named(source, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match="mounted read-only"):
        convert(source, small_disk / "out.pt", Request(to="pt", source_format="pt"))


@pytest.fixture
def public_directory():
    """Creates a directory that other users can reach."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def test_a_directory_that_may_not_be_written_to_is_named(public_directory):
    source, output = public_directory / "source.pt", public_directory / "out.pt"
    torch.save({"w": torch.ones(3)}, source)
    request = Request(to="pt", source_format="pt")
    convert(source, output, request)  # Imports everything before switching to nobody.
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="must be open to you for writing"):
            convert(source, output, request, overwrite=True)
    finally:
        os.seteuid(0)
    assert torch.load(output)["model"]["w"].sum() == 3
    assert names(public_directory) == ["out.pt", "source.pt"]


def test_directories_are_replaced_at_one_moment(tmp_path):
    output = tmp_path / "out"
    with staged(output) as stage:
        stage.path.mkdir()
        (stage.path / "a").write_text("old")
    with pytest.raises(FileExistsError, match="must be new or an empty directory"), staged(output):
        pass
    with staged(output, overwrite=True) as stage:
        stage.path.mkdir()
        (stage.path / "b").write_text("new")
        assert names(output) == ["a"]
    assert names(output) == ["b"]
    assert names(tmp_path) == ["out"]


def test_what_raises_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "deep" / "out") as stage:
        stage.path.write_text(str(1 / 0))
    assert not any((tmp_path / "deep").iterdir())


def test_the_output_must_be_apart_from_the_source(source, tmp_path):
    for output in (source, source / "x", source.parent):
        with pytest.raises((CheckpointError, FileExistsError)):
            convert(source, output, Request(to="pt", source_format="pt"), overwrite=True)
    assert source.is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["device", "pipe", "link to nothing"])
def test_what_is_no_file_is_never_replaced(tmp_path, kind, overwrite):
    output = tmp_path / "output"
    if kind == "device":
        os.mknod(output, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        output.symlink_to(output)
    before = output.lstat()
    with (
        pytest.raises(
            (CheckpointError, RuntimeError), match=r"must be new, a file or|Symlink loop"
        ),
        staged(output, overwrite=overwrite),
    ):
        raise AssertionError("the block must not run")
    assert output.lstat() == before
    assert os.listdir(tmp_path) == ["output"]


def test_a_mount_point_is_refused_before_anything_is_written(source, small_disk):
    with pytest.raises(CheckpointError, match="is the root of a mounted file system"):
        convert(source, small_disk, Request(to="pt", source_format="pt"))
    assert not list(small_disk.parent.glob(".*.partial"))


@pytest.mark.parametrize("kind", ["link", "directory", "file"])
def test_the_partial_name_of_somebody_else_is_left_alone(tmp_path, kind):
    output, partial, victim = (tmp_path / name for name in ("output", ".output.partial", "victim"))
    if kind == "file":
        partial.write_text("precious")
    else:
        directory = victim if kind == "link" else partial
        directory.mkdir()
        (directory / "precious").write_text("precious")
        if kind == "link":
            partial.symlink_to(victim)
    refused = pytest.raises(CheckpointError, match="must be free for the output in progress")
    with refused, staged(output):
        raise AssertionError("the block must not run")
    assert (partial if kind == "file" else partial / "precious").read_text() == "precious"


def test_an_output_that_appeared_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    output, lock = tmp_path / "output", staging._lock

    def lock_later(*args):
        output.write_text("of another process")
        return lock(*args)

    monkeypatch.setattr(staging, "_lock", lock_later)
    with pytest.raises(FileExistsError, match="holds something already"), staged(output):
        raise AssertionError("the block must not run")
    assert output.read_text() == "of another process"


def write_often(output, seconds):
    """Writes files that must all be of one process."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(CheckpointError), staged(output, overwrite=True) as stage:
            stage.path.mkdir()
            for name in "abc":
                (stage.path / name).write_text(str(os.getpid()))


def test_many_writers_leave_a_whole_output(tmp_path):
    """Each removes its lock in the end, while the others wait for it."""
    output, context = tmp_path / "output", multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(output, 2)) for _ in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with suppress(FileNotFoundError):  # Until the first has written.
            directory = os.open(output, os.O_RDONLY)
            found = sorted(os.listdir(directory))
            if os.path.samestat(os.fstat(directory), output.stat()):  # Else it was replaced.
                assert found == ["a", "b", "c"]
            os.close(directory)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    assert len({(output / name).read_text() for name in "abc"}) == 1
    assert os.listdir(tmp_path) == ["output"]
