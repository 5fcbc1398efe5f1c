"""The unpickler of `.metadata` of `torch.distributed.checkpoint`."""

from __future__ import annotations

import pathlib
import pickle

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

from tp_embed.checkpoint.errors import CheckpointError, UnsafeCheckpointError
from tp_embed.checkpoint.formats.dcp.metadata import NAME, read

CLASSES = [
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.TensorProperties,
    metadata.ChunkStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
    pathlib.PosixPath,
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("state", ["slots", "dict"])
def test_a_pickle_changes_no_class(tmp_path, cls, state):
    """`BUILD` sets attributes of whatever it is given, a class too."""
    named = f"c{cls.__module__}\n{cls.__name__}\n".encode()
    attributes = pickle.dumps({"changed": 1}, protocol=0)[:-1]
    given = b"N" + attributes + b"\x86" if state == "slots" else attributes
    (tmp_path / NAME).write_bytes(b"\x80\x04" + named + given + b"b.")
    with pytest.raises(CheckpointError):
        read(tmp_path / NAME)
    assert not hasattr(cls, "changed")


@pytest.mark.parametrize("each", metadata._MEM_FORMAT_ENCODING)
def test_a_pickle_changes_no_value_of_an_enum(tmp_path, each):
    state = pickle.dumps({"changed": 1}, protocol=0)[:-1]
    (tmp_path / NAME).write_bytes(pickle.dumps(each, protocol=4)[:-1] + state + b"b.")
    with pytest.raises(CheckpointError):
        read(tmp_path / NAME)
    assert not hasattr(each, "changed")


@pytest.mark.parametrize("name", ["load", "nn", "Tensor", "Size.__init__", "ops"])
def test_of_torch_only_sizes_and_dtypes_are_allowed(tmp_path, name):
    (tmp_path / NAME).write_bytes(b"\x80\x04" + f"ctorch\n{name}\n.".encode())
    with pytest.raises(UnsafeCheckpointError, match=f"torch.{name}"):
        read(tmp_path / NAME)
