"""Output is hashed while it is written, in any order."""

import hashlib
import random

import pytest

from tp_embed.checkpoint.files.hashes import RunningHash, finish_all

MIB = 2**20


def write(hashing, path, offset, data):
    with hashing.following(offset, memoryview(data)), path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def expected(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def laid_out(tmp_path):
    """Creates a file with a header, and space for data."""
    path = tmp_path / "file"
    path.write_bytes(b"header" + bytes(6 * MIB))
    return path


ORDERS = {
    "in order": [0, 1, 2, 3, 4, 5],
    "last first": [5, 4, 3, 2, 1, 0],
    "a gap that is filled later": [0, 1, 4, 5, 2, 3],
    "written twice": [0, 1, 2, 1, 3, 4, 5, 0],
    "not all": [0, 1, 3],
    "nothing": [],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
@pytest.mark.parametrize("piece", [MIB, MIB // 8])  # With and without a thread.
def test_any_order_of_writing(laid_out, order, piece):
    draw = random.Random(0)
    hashing = RunningHash(laid_out)
    for index in order:
        for start in range(6 + index * MIB, 6 + (index + 1) * MIB, piece):
            write(hashing, laid_out, start, draw.randbytes(piece))
    assert finish_all([hashing]) == [expected(laid_out)]


def test_what_comes_in_order_is_not_read_again(laid_out):
    hashing = RunningHash(laid_out)
    data = random.Random(0).randbytes(6 * MIB)
    write(hashing, laid_out, 6, data)
    laid_out.write_bytes(b"header" + bytes(6 * MIB))
    assert hashing.finish() == hashlib.sha256(b"header" + data).hexdigest()


def test_what_fails_to_be_written_fails_as_itself(laid_out):
    hashing = RunningHash(laid_out)
    with pytest.raises(OSError, match="full"), hashing.following(6, memoryview(bytes(MIB))):
        raise OSError("full")
