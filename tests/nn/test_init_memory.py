"""What initial tables need of memory, and read of files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest

from parity import SHARDED

# The peak of this process alone: `ru_maxrss` would start at the parent's peak.
MEASURE = """
import re, sys
from functools import partial
from pathlib import Path
import tp_embed
from tp_embed import FakeGang
from tp_embed.nn import init
from tp_embed.parameter.sharded import local

def mib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

kind, size, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
init_fn = partial(init.from_tensor, source=path) if path else init.scaled
kind, gang = getattr(tp_embed, kind), FakeGang("cpu", rank=1, size=size)
kind(gang, 8, 8, init_fn=init.scaled)
before = mib("VmRSS")
embed = kind(gang, 1 << 18, 1 << 10, init_fn=init_fn)
weight = local(embed.weight)
print(mib("VmHWM") - before, weight.nbytes / 2**20, weight.count_nonzero().item())
"""


def measured(kind, size, path=""):
    """Returns by how many MiB initializing a shard of a 1 GiB table raises the peak, the MiB of the
    shard, and its non-zeros."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, str(size), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return [float(number) for number in run.stdout.split()]


@pytest.fixture
def file_of_1_gib(tmp_path):
    """Writes a sparse file: a table of zeros, with ones in row 1024 i and column 4 i."""
    header = {"wte": {"dtype": "F32", "shape": [1 << 18, 1 << 10], "data_offsets": [0, 1 << 30]}}
    text = json.dumps(header).encode()
    path = tmp_path / "table.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + (1 << 30))
        for row in range(0, 1 << 18, 1 << 10):
            file.seek(start + 4 * (1024 * row + row // 256))
            file.write(struct.pack("<f", 1.0))
    return path


@pytest.mark.parametrize("kind", [cls.__name__ for cls in SHARDED.values()])
def test_peak_memory_is_the_shard(kind):
    growth, shard, nonzeros = measured(kind, 4)
    assert shard == 256
    assert nonzeros > 0.99 * (1 << 26)
    assert growth < shard + 64


@pytest.mark.parametrize("kind", [cls.__name__ for cls in SHARDED.values()])
def test_peak_memory_of_a_table_from_a_file_is_the_shard(file_of_1_gib, kind):
    growth, shard, nonzeros = measured(kind, 4, file_of_1_gib)
    assert (shard, nonzeros) == (256, 64)
    assert growth < shard + 64


def test_no_more_than_the_own_rows_of_a_file_are_read(file_of_1_gib):
    growth, shard, nonzeros = measured("VocabShardedEmbedding", 64, file_of_1_gib)
    assert (shard, nonzeros) == (16, 4)
    assert growth < shard + 64
